"""Quality control: what is measured of each run, and a page to look at it.

A page also holds what was measured, under a key of all that it was made from, so that a job that
was cut short keeps the pages that are whole; without pages, measuring starts again. Which runs are
left out is decided elsewhere (`qc_rules`): a page tells the rules that were in force when it was
made, and is made again by the next `qc` job where what they say has changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray
import zarr.errors

from neuromamba.config import Config, Qc
from neuromamba.files import InputError, digest_file, digest_json, write_text
from neuromamba.layout import Layout
from neuromamba.qc_metrics import (
    image_metrics,
    motion_metrics,
    read_course,
    read_images,
    read_motion,
)
from neuromamba.qc_page import Inputs, Measured, read_current, render_page
from neuromamba.qc_table import METRICS
from neuromamba.qc_template import template_on
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.tables import read_table


def run_qc(config: Config, dataset: str, batch: int) -> None:
    """Measure each run that has tokens, write its page, and the table of the batch.

    Raises
    ------
    InputError
        When more runs than `compute.max_excluded` cannot be measured, or the disk is full.
    """
    layout = Layout.of(config, dataset)
    runs = usable_runs([layout.manifest("tokens", batch)])
    index = read_table(layout.manifest("index", batch), dtype=str).set_index("run")
    derivatives = Path(config.datasets[dataset].derivatives)

    def make(run: str) -> dict[str, Any]:
        row = index.loc[run]
        report = derivatives / f"{row['subject']}.html"
        inputs = Inputs(
            run=run,
            volumes=layout.array("volumes", run),
            tokens=layout.array("tokens", run),
            confounds=None if pd.isna(row["confounds"]) else str(row["confounds"]),
            repetition_time=float(str(row["repetition_time"])),
            overview=layout.overview,
            report=report if report.is_file() else None,
        )
        page = layout.qc(run) if config.qc.pages else None
        return make_qc(inputs, page, config.qc)

    manifest = layout.manifest("qc", batch)
    process_runs("qc", runs, make, manifest, config.compute.max_excluded)


def make_qc(inputs: Inputs, page: Path | None, settings: Qc) -> dict[str, Any]:
    """Measure one run and write its page, unless the page is there already.

    Parameters
    ----------
    inputs
        The run.
    page
        Where the page goes; `None` for none.
    settings
        Of the config.

    Returns
    -------
    dict
        `key`, which tells what was measured; the columns of `qc_table.METRICS`, NaN where unknown;
        `motion_note`, why motion is unknown.

    Raises
    ------
    InputError
        When the volumes or the tokens cannot be read.
    """
    try:
        with (
            xarray.open_zarr(inputs.volumes, chunks=None, mask_and_scale=False) as volumes,
            xarray.open_zarr(inputs.tokens, chunks=None, mask_and_scale=False) as tokens,
        ):
            key = _key(inputs, volumes, tokens, settings)
            facts = page and read_current(inputs, page, key, settings)
            if facts:
                return facts
            measured = _read(inputs, volumes, tokens)
    except (zarr.errors.BaseZarrError, OSError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{inputs.volumes}: these volumes or their tokens are damaged ({error}); delete them "
            "and make them again"
        ) from error
    facts = {
        "key": key,
        **_measure(measured, inputs, settings),
        "motion_note": measured.motion.note,
    }
    if page:
        write_text(page, render_page(inputs, page, measured, facts, settings))
    return facts


def _key(inputs: Inputs, volumes: xarray.Dataset, tokens: xarray.Dataset, settings: Qc) -> str:
    """Digest of all that the metrics come from. The rules are no part of it."""
    confounds = inputs.confounds
    found = digest_file(confounds) if confounds and Path(confounds).is_file() else None
    parts = [code_of("qc"), volumes.attrs["key"], tokens.attrs["key"], found]
    return digest_json([*parts, inputs.repetition_time, settings.fd_threshold])


def _read(inputs: Inputs, volumes: xarray.Dataset, tokens: xarray.Dataset) -> Measured:
    images = read_images(volumes)
    if not images.mask.any():
        raise ValueError("the brain mask is empty")
    template = template_on(images.mask.T.shape, images.affine)
    denoised = volumes.attrs.get("denoise") or {}
    n_volumes = int(denoised.get("source_n_volumes", volumes.sizes["time"]))
    return Measured(
        images=images,
        course=read_course(volumes, images.mask, template),
        motion=read_motion(inputs.confounds, n_volumes),
        template=template,
        patches=_patches(tokens, images.mask.shape),
        n_tokens=tokens.sizes["token"],
        attributes=dict(volumes.attrs),
    )


def _patches(tokens: xarray.Dataset, shape: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """(z, y, x): 0 in no patch that is kept, 1 and 2 in the patches that are, like a chessboard."""
    cells, edge = tokens["grid_index"].values.astype(int), int(tokens.attrs["patch"])
    grid = np.zeros([n // edge for n in shape], dtype=np.int8)
    grid[cells[:, 2], cells[:, 1], cells[:, 0]] = 1 + cells.sum(axis=1) % 2
    return np.kron(grid, np.ones((edge, edge, edge), dtype=np.int8))


def _measure(measured: Measured, inputs: Inputs, settings: Qc) -> dict[str, float]:
    """The columns of `METRICS`, in their order."""
    course = measured.course
    n_volumes = len(course.dvars)
    minutes = n_volumes * course.repetition_time / 60
    motion = measured.motion
    found = {
        "n_volumes": n_volumes,
        "minutes": minutes,
        "repetition_time": course.repetition_time,
        **motion_metrics(motion, settings.fd_threshold, inputs.repetition_time, minutes),
        **image_metrics(measured.images, course, measured.template),
        "n_tokens": measured.n_tokens,
    }
    return {name: found[name] for name in METRICS}
