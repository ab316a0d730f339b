"""Excerpts of ROI series: the volumes of a subject's runs that are of one state.

Each ROI of a run is standardised over all of the run's volumes before some are taken, so that runs
can be put after one another, and a mean tells how the state differs from the rest of the run. A ROI
that a run lacks, or in which it is constant, is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zarr

from neuromamba.files import InputError, read_json

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Excerpt:
    """Some volumes of some runs: `rois/{run}.zarr`, and (volume,) whether each is taken."""

    parts: tuple[tuple[Path, npt.NDArray[np.bool_]], ...]

    def read(self) -> Floats:
        """(time, roi) standardised series, run after run.

        Raises
        ------
        InputError
            When a store is unreadable, or not of the runs' lengths or of one number of ROIs.
        """
        found: list[Floats] = []
        for store, taken in self.parts:
            series = read_series(store)
            if len(series) != len(taken) or series.shape[1:] != (found or [series])[0].shape[1:]:
                raise InputError(
                    f"{store}: has {series.shape} volumes x ROIs, which does not fit what else is "
                    "known of the run or the subject's other runs; run rois again"
                )
            found.append(standardise(series)[taken])
        return np.concatenate(found)

    @property
    def connectivity(self) -> str:
        """The first kind of connectivity that the stores have, which is that of the baselines."""
        kinds = read_json(self.parts[0][0] / "zarr.json")["attributes"]["connectivity"]
        return str(kinds[0])


def read_series(store: Path) -> Floats:
    """The ROI series of a store, (time, roi).

    Raises
    ------
    InputError
        When it cannot be read.
    """
    try:
        # xarray would look at all that is in the store, which takes more than twice as long.
        array = zarr.open_array(store / "timeseries", mode="r")
        return np.asarray(array[:], dtype=np.float64)
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise InputError(f"{store}: not a readable ROI store ({error}); run rois") from None


def varies(series: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which columns are neither missing nor constant, but for the rounding of float32."""
    values = series.astype(np.float64)
    rounding = np.finfo(np.float32).eps * np.abs(values).max(axis=0)
    return np.asarray(values.std(axis=0) > rounding)


def standardise(series: Floats) -> Floats:
    """Each column (time, roi) in z units of itself; NaN where it does not vary."""
    spread = np.where(varies(series), series.std(axis=0), np.nan)
    return (series - series.mean(axis=0)) / spread
