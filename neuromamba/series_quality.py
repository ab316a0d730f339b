"""What can be measured of runs of ROI series: length, head motion, missing regions, correlation.

Motion is that of the run's confounds, or, in a dataset without any, the column `mean_fd` (mm) of
the table of subjects, as for the confound model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from neuromamba.config import Config
from neuromamba.connectivity import read_z
from neuromamba.layout import Layout
from neuromamba.participants import read_rows
from neuromamba.qc_metrics import read_motion
from neuromamba.tables import read_table

NO_MOTION = "neither confounds nor a column mean_fd of the table of subjects tell it"


def measure_series(config: Config, dataset: str) -> pd.DataFrame:
    """Measure the runs of a dataset of ROI series.

    Returns
    -------
    pandas.DataFrame
        A row for each run that has a store, sorted: `run`, `reason` (missing), those of
        `qc_table.SERIES_METRICS`, and `motion_note`, where motion is not known.

    Raises
    ------
    InputError
        When a table or store is missing or damaged.
    """
    layout = Layout.of(config, dataset)
    batches = range(config.compute.batches)
    made = pd.concat([read_table(layout.manifest("rois", k), dtype={"run": str}) for k in batches])
    made = made[made["reason"].isna()].set_index("run")
    text = {"run": str, "subject": str, "confounds": str}
    index = read_table(layout.index, dtype=text).set_index("run")
    told = _of_subjects(config, dataset)
    stored = "pearson" in config.rois.connectivity
    correlate = _mean_correlation if stored else lambda store: np.nan
    listed = index.loc[index.index.isin(made.index)].sort_index().reset_index().to_dict("records")
    rows = []
    for row in tqdm(listed, desc="overview", unit="run", mininterval=1.0):
        run, tr = str(row["run"]), float(row["repetition_time"])
        fd, note = _motion(row, told)
        rows.append(
            {
                "run": run,
                "n_volumes": row["n_volumes"],
                "minutes": row["n_volumes"] * tr / 60,
                "repetition_time": tr,
                "mean_fd": fd,
                "n_missing": made["n_missing"][run],
                "mean_correlation": correlate(layout.array("rois", run)),
                "motion_note": note,
            }
        )
    return pd.DataFrame(rows).assign(reason=None)


def _of_subjects(config: Config, dataset: str) -> pd.Series:
    """Mean FD by subject, from the table of subjects; empty where it does not tell."""
    settings = config.datasets[dataset].participants
    table = pd.DataFrame() if settings is None else read_rows(settings)
    if "mean_fd" not in table:
        return pd.Series(dtype=float)
    return pd.to_numeric(table["mean_fd"], errors="coerce")


def _motion(row: Mapping[Hashable, Any], told: pd.Series) -> tuple[float, str | None]:
    """Mean FD of a run in mm, and why it is unknown where it is."""
    path = row.get("confounds")
    if isinstance(path, str):
        motion = read_motion(path, int(row["n_volumes"]))
        return (np.nan if motion.fd is None else float(np.nanmean(motion.fd))), motion.note
    value = float(told.get(row["subject"], np.nan))
    return value, NO_MOTION if np.isnan(value) else None


def _mean_correlation(store: Path) -> float:
    """Mean over the pairs of regions there are, of Pearson's correlation."""
    z = read_z(store, "pearson")[1]
    pairs = np.tanh(z[np.triu_indices(len(z), k=1)])
    return float(np.nanmean(pairs)) if np.isfinite(pairs).any() else np.nan
