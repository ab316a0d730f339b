"""Volumes: every run on one grid in MNI space, as a sharded Zarr store that xarray opens.

Design choices
--------------
- The grid's centre is a constant of this module and the affine does the rest: fMRIPrep's and FSL's
  grids start half a millimetre apart, so hard-coded crops would be wrong for one of them.
- The data is written once, as float16 in units of the brain's spatial SD (a linear code that
  xarray undoes); normalisation is stored as statistics beside it and applied at load.
- One chunk holds one time patch, one shard is one file and is written whole.
- A voxel that does not vary by at least half a step of the stored precision carries no signal; it
  leaves the brain mask. Which ones is known only at the end: they are guessed from the first
  volumes, and where the guess was wrong the run is streamed once more.
- Where denoising over time is asked for, the run goes through a file first (see `denoise` and
  `spool`); all that comes after is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

import neuromamba
from neuromamba.brain import BrainStream
from neuromamba.config import Config, Volumes
from neuromamba.contents import Contents
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.moments import Floats, Moments
from neuromamba.nifti import Header, read_header
from neuromamba.prefetch import prefetch
from neuromamba.resample import target_affine
from neuromamba.shards import ShardWriter
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.store import FLOAT16_MAX, Code, finish, finished, new_store
from neuromamba.tables import read_table
from neuromamba.volume_arrays import add_maps, create_bold

if TYPE_CHECKING:
    from neuromamba.spool import DenoisedStream

MANIFEST_FACTS = ("key", "n_volumes", "n_voxels", "n_constant_voxels")
DENOISED_FACTS = ("repetition_time", "n_dropped", "n_scrubbed", "dof")
CHUNKS_AHEAD = 4
"""Chunks made before they are compressed, which is in another thread."""
PROBE_VOLUMES = 10
"""Volumes that the storage scale and the guess of the constant voxels come from."""


@dataclass(frozen=True)
class Source:
    """One run's files and facts, as the index lists them; `fingerprint` tells their content."""

    run: str
    subject: str
    bold: Path
    mask: Path
    space: str
    repetition_time: float
    fingerprint: str
    confounds: Path | None = None


def run_volumes(config: Config, dataset: str, batch: int) -> None:
    """Make `volumes/{run}.zarr` for each usable run of a batch, and the batch's manifest.

    Raises
    ------
    InputError
        When more runs than `compute.max_excluded` cannot be used, or the disk is full.
    """
    layout = Layout.of(config, dataset)
    part = layout.manifest("index", batch)
    index, runs = read_table(part, dtype=str).set_index("run"), usable_runs([part])
    manifest = layout.manifest("volumes", batch)
    contents = Contents(layout, "volumes", batch)

    def make(run: str) -> dict[str, Any]:
        row = index.loc[run].to_dict()
        source = Source(
            run=run,
            subject=row["subject"],
            bold=Path(row["bold"]),
            mask=Path(row["mask"]),
            space=config.datasets[dataset].space,
            repetition_time=float(row["repetition_time"]),
            fingerprint=row["fingerprint"],
            confounds=None if pd.isna(row["confounds"]) else Path(row["confounds"]),
        )
        target = layout.array("volumes", run)
        facts = make_volumes(source, target, config.volumes, config.tokens.time_patch)
        return contents.add(run, facts)

    process_runs("volumes", runs, make, manifest, config.compute.max_excluded)


def make_volumes(source: Source, target: Path, volumes: Volumes, time_patch: int) -> dict[str, Any]:
    """Resample one run to the grid and write its store, unless it is there already.

    Parameters
    ----------
    source
        The run.
    target
        Where the store goes; it appears there only when it is whole.
    volumes
        Grid, denoising and storage.
    time_patch
        Volumes in a chunk.

    Returns
    -------
    dict
        `key`, which tells what the store was made from, `n_volumes`, `n_voxels` (in the brain
        mask) and `n_constant_voxels` (left out of it); after denoising over time also
        `DENOISED_FACTS`.

    Raises
    ------
    InputError
        When the run cannot be used: unreadable, truncated or 3D; too few volumes; NaN in the
        brain; a mask that is empty or on another grid; no voxel that varies; denoising that its
        confounds or its length do not allow.
    """
    header = read_header(source.bold)
    if not header.is_series:
        raise InputError(f"{source.bold}: is 3D; a BOLD run has a time axis")
    if header.n_volumes < volumes.min_volumes:
        raise InputError(
            f"{source.bold}: has {header.n_volumes} volumes, fewer than volumes.min_volumes = "
            f"{volumes.min_volumes}; lower that setting if the run is to be used"
        )
    facts: dict[str, Any] = {
        "run": source.run,
        "subject": source.subject,
        "space": source.space,
        "repetition_time": source.repetition_time,
        "fingerprint": source.fingerprint,
    }
    # Where the files lie is not part of the key: a dataset may be moved.
    settings = [volumes.model_dump(mode="json"), time_patch]
    key = digest_json([code_of("volumes"), facts, *settings])
    attributes = finished(target, key)
    if attributes is None:
        with ExitStack() as stack:
            run = _open(source, header, target.parent, volumes, stack)
            facts |= {
                "key": key,
                "source": str(source.bold),
                "source_sha256": digest_file(source.bold),
                "mask_source": str(source.mask),
                "mask_sha256": digest_file(source.mask),
            }
            attributes = _convert(run, target, facts, volumes, time_patch)
    names = MANIFEST_FACTS + (DENOISED_FACTS if volumes.denoise.in_time else ())
    return {name: attributes[name] for name in names}


@dataclass(frozen=True)
class _Run:
    """A run to be stored: its volumes, their times in s, and what was done to them."""

    stream: BrainStream | DenoisedStream
    times: npt.NDArray[np.float64]
    attributes: dict[str, Any]


def _open(source: Source, header: Header, folder: Path, volumes: Volumes, stack: ExitStack) -> _Run:
    """A run on the target grid, denoised as the settings say; `stack` closes it."""
    settings, affine = volumes.denoise, target_affine(volumes)
    attributes = {"smoothing": settings.smoothing} if settings.smoothing else {}
    if not settings.in_time:
        stream = BrainStream(header, source.mask, volumes.shape, affine, settings.smoothing)
        times = np.arange(header.n_volumes, dtype=np.float64) * source.repetition_time
        return _Run(stream, times, attributes)
    # Here, because what they import takes a second to load.
    from neuromamba.denoise import Denoiser
    from neuromamba.spool import DenoisedStream

    denoiser = Denoiser(
        header, source.run, source.repetition_time, source.confounds, settings, volumes.min_volumes
    )
    stream = BrainStream(header, source.mask, volumes.shape, affine, settings.smoothing)
    denoised = stack.enter_context(DenoisedStream(stream, denoiser, folder))
    return _Run(denoised, denoiser.times, attributes | denoiser.attributes)


def _convert(
    run: _Run, target: Path, facts: dict[str, Any], volumes: Volumes, time_patch: int
) -> dict[str, Any]:
    """Stream a run into a store at `target`; return the store's attributes."""
    stream = run.stream
    code, constant = _probe(stream)
    with new_store(target, facts["key"]) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        create_bold(group, len(run.times), volumes, time_patch, code)
        while True:
            moments = Moments()
            chunks = _chunks(stream, code, constant, (time_patch, *volumes.shape[::-1]), moments)
            with ShardWriter(temporary / "bold") as writer:
                for chunk in prefetch(chunks, CHUNKS_AHEAD):
                    writer.append(chunk)
            found = _constant(moments, code)
            if found.all():
                raise InputError(
                    f"{stream.path}: no voxel of the brain mask varies over time; "
                    "preprocess the run again, or leave it out"
                )
            if (found == constant).all():
                break
            constant = found
        voxels, affine = stream.voxels[~constant], target_affine(volumes)
        mean, sd = moments.mean()[~constant], moments.sd()[~constant]
        add_maps(group, volumes.shape, affine, voxels, {"mean": mean, "sd": sd}, run.times)
        attributes = facts | {
            "affine": affine.tolist(),
            "interpolation": "linear",
            "global_mean": float(mean.mean()),
            "global_sd": float(np.sqrt(np.mean(sd**2) + np.var(mean))),
            "n_volumes": moments.n,
            "n_voxels": len(voxels),
            "n_constant_voxels": int(constant.sum()),
            "neuromamba_version": neuromamba.__version__,
            **run.attributes,
        }
        finish(group, attributes)
    return attributes


def _probe(stream: BrainStream | DenoisedStream) -> tuple[Code, npt.NDArray[np.bool_]]:
    """Storage code and likely constant voxels, from the first volumes of a run."""
    volumes: list[Floats] = []
    for block in stream.blocks(ahead=0):
        volumes.append(block)
        if sum(map(len, volumes)) >= PROBE_VOLUMES:
            break
    first = np.concatenate(volumes)[:PROBE_VOLUMES]
    sd = float(first.std(dtype=np.float64))
    code = Code(scale=sd or 1.0, offset=float(first.mean(dtype=np.float64)))
    moments = Moments()
    moments.add(first)
    return code, moments.sd() == 0


def _constant(moments: Moments, code: Code) -> npt.NDArray[np.bool_]:
    return np.asarray(moments.sd() <= code.half_step(moments.mean()))


def _chunks(
    stream: BrainStream | DenoisedStream,
    code: Code,
    left_out: npt.NDArray[np.bool_],
    chunk_shape: tuple[int, ...],
    moments: Moments,
) -> Iterator[npt.NDArray[np.float16]]:
    """Yield a run in chunks of `chunk_shape` (t, z, y, x); put all voxels into `moments`."""
    empty = np.full(chunk_shape, np.nan, dtype=np.float16)
    chunk, filled = empty.copy(), 0
    for values in stream.blocks():
        stored = _encode(values, code, left_out, stream.path, moments.n)
        moments.add(values)
        for volume in stored:
            chunk[filled].reshape(-1)[stream.voxels] = volume
            filled += 1
            if filled == len(chunk):
                yield chunk
                chunk, filled = empty.copy(), 0
    if filled:
        yield chunk


def _encode(
    values: Floats, code: Code, left_out: npt.NDArray[np.bool_], path: Path, first: int
) -> npt.NDArray[np.float16]:
    stored = code.encode(values)
    if not max(stored.max(), -stored.min()) < FLOAT16_MAX:
        raise InputError(
            f"{path}: from volume {first} on (counted from 0) there are values over "
            f"{FLOAT16_MAX:g} times the brain's SD from its mean; look for artefacts"
        )
    stored[:, left_out] = np.nan
    return stored.astype(np.float16)
