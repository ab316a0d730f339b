"""The ROI stores of a dataset that consists of tables of ROI series.

Design choices
--------------
- The series are used as they are: whoever made the tables has chosen the regions and the denoising.
- A region that is constant in a run, or lacks a value in any of its volumes, is a missing ROI: NaN
  throughout, as one outside of the field of view is in a run with images.
- What only images tell (tSNR, how much of a region the brain mask covers) is not known: `coverage`
  is NaN.
- All tables of a dataset have the same regions in the same order, which the index has seen to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import neuromamba
from neuromamba.bids_scan import entities_of
from neuromamba.config import Config, Rois
from neuromamba.contents import Contents
from neuromamba.excerpts import varies
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.roi_store import tabulate, write_rois
from neuromamba.series_scan import segmentation_of
from neuromamba.series_table import read_table_of_series
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs
from neuromamba.store import finished
from neuromamba.tables import read_table

MANIFEST_FACTS = ("key", "n_rois", "n_missing", "n_volumes")


def run_series(config: Config, dataset: str, batch: int) -> None:
    """Make `rois/{run}.zarr` for each run of a batch that the index has, and the manifest.

    Raises
    ------
    InputError
        When too many runs are unusable (`compute.max_excluded`).
    """
    layout = Layout.of(config, dataset)
    names = dict.fromkeys(("run", "subject", "bold", "reason"), str)
    index = read_table(layout.manifest("index", batch), dtype=names)
    rows = {row["run"]: row for row in index[index["reason"].isna()].to_dict("records")}
    contents = Contents(layout, "rois", batch)

    def make(run: str) -> dict[str, Any]:
        row, least = rows[run], config.volumes.min_volumes
        if row["n_volumes"] < least:
            raise InputError(
                f"too few volumes: {row['bold']} has {row['n_volumes']:g}, volumes.min_volumes is "
                f"{least}; lower it, or leave the run out"
            )
        facts = make_series(
            row["bold"],
            layout.array("rois", run),
            {"run": run, "subject": row["subject"]},
            float(row["repetition_time"]),
            config.rois,
        )
        return contents.add(run, facts)

    manifest, share = layout.manifest("rois", batch), config.compute.max_excluded
    process_runs("rois", sorted(rows), make, manifest, share)


def make_series(
    table: str, target: Path, names: dict[str, str], repetition_time: float, rois: Rois
) -> dict[str, Any]:
    """Write the series of a table and their connectivity, unless they are there already.

    Parameters
    ----------
    table, target
        The file, and the store to be written.
    names
        `run` and `subject`, for the store's attributes.
    repetition_time
        s.
    rois
        Which connectivity.

    Returns
    -------
    dict
        `key`, which tells what the store was made from; `n_rois`, those with a signal in this run;
        `n_missing`, those without; `n_volumes`.

    Raises
    ------
    InputError
        When the table cannot be read, or no region in it has a signal.
    """
    try:
        digest = digest_file(table)
    except OSError as error:
        raise InputError(f"{table} cannot be read ({error}); repair or replace it") from None
    settings = rois.model_dump(mode="json", include={"connectivity", "fisher_z"})
    key = digest_json([code_of("series_rois"), digest, repetition_time, settings, names])
    attributes = finished(target, key)
    if attributes is None:
        regions, series = read_table_of_series(table)
        present = _blank_missing(table, series)
        entities = entities_of(Path(table).name.partition(".")[0])
        attributes = {
            "atlas": segmentation_of(entities),
            "atlas_sha256": digest_json(regions),  # all that is known of it are their names
            "atlas_names": "the table's columns",
            **names,
            "space": entities.get("space"),
            "repetition_time": repetition_time,
            **settings,
            "n_rois": present,
            "n_missing": len(regions) - present,
            "n_volumes": len(series),
            "source_sha256": digest,
            "neuromamba_version": neuromamba.__version__,
            "key": key,
        }
        unknown = np.full(len(regions), np.nan, dtype=np.float32)
        time = np.arange(len(series)) * repetition_time
        write_rois(target, tabulate(series, unknown, time, regions, rois), attributes)
    return {name: attributes[name] for name in MANIFEST_FACTS}


def _blank_missing(table: str, series: npt.NDArray[np.float32]) -> int:
    """Make the missing ROIs of (time, roi) series NaN throughout, and count the others."""
    present = varies(series)
    if not present.any():
        empty = int(np.isnan(series).all(axis=1).sum())
        censored = f" ({empty} volumes have no value at all)" if empty else ""
        raise InputError(
            f"{table}: no region has a signal that varies and a value in each volume{censored}; "
            "take series without gaps, such as those with censored volumes cut out or "
            "interpolated, or leave the run out"
        )
    series[:, ~present] = np.nan
    return int(present.sum())
