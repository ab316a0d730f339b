"""What is measured of each run, in words, and which runs are unlike the others of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

FEWEST_RUNS = 5
"""Fewer runs have no usual value that one of them could differ from."""
SD_OF_MAD = 1.4826
"""SD of a normal distribution whose median absolute deviation is 1."""
SD_OF_MEAN_DEVIATION = 1.2533
"""SD of a normal distribution whose mean absolute deviation is 1."""
ROUNDING = 1e-6
"""Deviations from the median below this share of it are rounding."""


@dataclass(frozen=True)
class Metric:
    """A column of the table of quality.

    Attributes
    ----------
    label, unit
        For people.
    bad
        Which side of the others is a reason to look at a run.
    digits
        Decimals that are shown.
    meaning
        What the number is, as half a sentence.
    """

    label: str
    unit: str
    bad: Literal["high", "low", "both"]
    digits: int
    meaning: str

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def shown(self, value: float | None) -> str:
        """A value for people; `n/a` where there is none."""
        if value is None or not np.isfinite(value):
            return "n/a"
        return f"{value:,.{self.digits}f}"


METRICS = {
    "n_volumes": Metric("volumes", "", "low", 0, "number of volumes"),
    "minutes": Metric("length", "min", "low", 1, "volumes times repetition time"),
    "repetition_time": Metric("TR", "s", "both", 3, "time from one volume to the next"),
    "mean_fd": Metric(
        "mean FD",
        "mm",
        "high",
        3,
        "framewise displacement, the head's movement from one volume to the next, mean over time",
    ),
    "median_fd": Metric("median FD", "mm", "high", 3, "framewise displacement, median over time"),
    "max_fd": Metric("largest FD", "mm", "high", 2, "the largest framewise displacement"),
    "high_motion": Metric(
        "high motion", "share", "high", 3, "share of volumes with an FD over qc.fd_threshold"
    ),
    "minutes_low_motion": Metric(
        "low motion", "min", "low", 1, "time in volumes that are not over qc.fd_threshold"
    ),
    "std_dvars": Metric(
        "std DVARS",
        "",
        "high",
        3,
        "standardised DVARS of the confounds, mean over time: change of the whole image from one "
        "volume to the next, about 1 in an undisturbed run",
    ),
    "dvars": Metric(
        "DVARS",
        "%",
        "high",
        2,
        "change of the image from one volume to the next (root mean square over the brain), in "
        "percent of the mean signal, mean over time; computed from the volumes",
    ),
    "n_spikes": Metric(
        "spikes",
        "",
        "high",
        0,
        "volumes whose DVARS is over the third quartile by more than 1.5 interquartile ranges",
    ),
    "tsnr": Metric(
        "tSNR", "", "low", 1, "mean over time divided by SD over time, median over the brain"
    ),
    "temporal_sd": Metric(
        "temporal SD", "%", "high", 2, "SD over time in percent of the mean signal, median"
    ),
    "global_sd": Metric(
        "global SD", "%", "high", 3, "SD over time of the brain's mean signal, in percent of it"
    ),
    "coverage": Metric(
        "coverage", "share", "low", 3, "share of the template's brain that the run's mask covers"
    ),
    "dice": Metric("Dice", "", "low", 3, "overlap of the run's mask with the template's, 0 to 1"),
    "correlation": Metric(
        "template correlation",
        "",
        "low",
        3,
        "correlation of the mean volume's detail with what the template's tissues predict of it; "
        "falls where they are not aligned",
    ),
    "n_tokens": Metric("tokens", "", "both", 0, "patches that hold brain"),
}
"""Column -> what it is, in the order in which the pages show them."""
SERIES_METRICS = {
    **{name: METRICS[name] for name in ("n_volumes", "minutes", "repetition_time", "mean_fd")},
    "n_missing": Metric(
        "missing regions", "", "high", 0, "regions that are constant or lack a value in the run"
    ),
    "mean_correlation": Metric(
        "mean correlation",
        "",
        "both",
        3,
        "correlation of two regions, mean over all pairs; what moves or changes the whole image "
        "raises it, regression of the global signal brings it to about 0",
    ),
}
"""The same, of datasets of ROI series, which have no images to measure."""
COUNTS = ("n_volumes", "n_spikes", "n_tokens", "n_missing")
"""Those that are whole numbers."""


def robust_z(values: pd.Series) -> pd.Series:
    """Deviations from the median, in SDs that are estimated by the median absolute deviation.

    Where more than half of the values are the same, that is 0; the mean absolute deviation then
    takes its place (Iglewicz and Hoaglin 1993). Without enough values, all are missing.
    """
    deviation = values - values.median()
    deviation[deviation.abs() <= ROUNDING * abs(values.median())] = 0.0
    if values.notna().sum() < FEWEST_RUNS:
        return deviation * np.nan
    scale = SD_OF_MAD * deviation.abs().median()
    if not scale:
        scale = SD_OF_MEAN_DEVIATION * deviation.abs().mean()
    return deviation / scale if scale else deviation


def deviations(table: pd.DataFrame) -> pd.DataFrame:
    """`robust_z` of each metric that the table has: the same rows, a column for each metric."""
    known = [name for name in METRICS | SERIES_METRICS if name in table]
    columns = {name: robust_z(table[name].astype(float)) for name in known}
    return pd.DataFrame(columns, index=table.index)


def find_outliers(z: pd.DataFrame, limit: float) -> dict[int, dict[str, str]]:
    """Which runs differ by more than `limit` robust SDs, on the side that is bad.

    Parameters
    ----------
    z
        Of `deviations`, with rows 0, 1, ...
    limit
        In robust SDs.

    Returns
    -------
    dict
        Row -> metric -> `high` or `low`; only rows and metrics that differ.
    """
    found: dict[int, dict[str, str]] = {}
    metrics = METRICS | SERIES_METRICS
    for name in z:
        bad = metrics[str(name)].bad
        for side, beyond in (("high", z[name] > limit), ("low", z[name] < -limit)):
            if bad in (side, "both"):
                for row in np.flatnonzero(beyond):
                    found.setdefault(int(row), {})[str(name)] = side
    return found
