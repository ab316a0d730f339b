"""Windows of ROI series, for models that read `rois`.

Design choices
--------------
- Each ROI is brought to z units of itself over the whole run: levels differ between scanners, and
  what is left is what correlations see.
- With the model's `repetition_time` the series of all runs have the same volumes a second, whatever
  they were scanned at, so that a window is equally long for everybody and a model cannot tell a
  scanner by its pace.
- A ROI that a run lacks, or in which it does not vary, is 0 and marked as not `present`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neuromamba.config import RoiModel
from neuromamba.excerpts import read_series, standardise
from neuromamba.files import InputError, read_json
from neuromamba.resample_time import FINEST, SAME_SECONDS, resample_time, times_of

Sample = dict[str, npt.NDArray[Any]]

OPEN_SERIES = 512
"""Runs whose series are kept in memory: half a megabyte each, for 400 ROIs and 300 volumes."""


class RoiWindows:
    """Reader of `rois`: the series of a window.

    Gives `rois` (B, T, R) float32, their series in z units, `present` (B, R) bool, and
    `repetition_time` (B,) float32 in s, T being the model's `volumes`.

    Parameters
    ----------
    path_of
        From a run to its store of ROI series.
    model
        Says how long a window is, and of which repetition time.
    time_patch
        Volumes between two starts of a window: starts are counted in time patches for all readers.
    n_rois
        How many ROIs each run must have.
    """

    def __init__(
        self, path_of: Callable[[str], Path], model: RoiModel, time_patch: int, n_rois: int
    ) -> None:
        self._path_of, self._model = path_of, model
        self._time_patch, self._n_rois = time_patch, n_rois
        self._prepared = lru_cache(OPEN_SERIES)(self._prepare)

    def positions(self, run: str) -> int:
        values, seconds = self._prepared(run)
        volumes = self._model.volumes
        if len(values) < volumes:
            raise InputError(
                f"{self._path_of(run)}: {run} has {len(values)} volumes at a repetition time of "
                f"{seconds:g} s, and a window takes {volumes}; raise volumes.min_volumes to leave "
                "such runs out, or lower the model's `volumes`"
            )
        return (len(values) - volumes) // self._time_patch + 1

    def read(self, run: str, start: int) -> Sample:
        values, seconds = self._prepared(run)
        first = start * self._time_patch
        present = ~np.isnan(values[0])
        series = np.where(present, values[first : first + self._model.volumes], np.float32(0))
        return {
            "rois": series,
            "present": present,
            "repetition_time": np.array(seconds, dtype=np.float32),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return stack_samples(samples)

    def _prepare(self, run: str) -> tuple[npt.NDArray[np.float32], float]:
        """The z series (time, roi) of a run, NaN where a ROI is missing, and its TR in s."""
        path, wanted = self._path_of(run), self._model.repetition_time
        series = read_series(path)
        if series.shape[1] != self._n_rois:
            raise InputError(
                f"{path}: {series.shape[1]} ROIs, where the model reads {self._n_rois}; make the "
                "ROI series by the atlas that the model was trained with"
            )
        seconds = float(read_regions(path)["repetition_time"])
        if wanted is not None and abs(wanted - seconds) > SAME_SECONDS:
            if wanted < FINEST * seconds - SAME_SECONDS:
                raise InputError(
                    f"{path}: a repetition time of {seconds:g} s cannot be brought to the model's "
                    f"`repetition_time` ({wanted:g} s); choose at least {FINEST * seconds:g} s"
                )
            times = times_of(len(series), seconds, wanted)
            known = ~np.isnan(series[0])
            resampled = np.full((len(times), series.shape[1]), np.nan)
            resampled[:, known] = resample_time(series[:, known], seconds, wanted, times)
            series, seconds = resampled, wanted
        return standardise(series).astype(np.float32), seconds


def stack_samples(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """The arrays of several samples, one row each: they have the same shapes."""
    return {
        name: torch.from_numpy(np.stack([sample[name] for sample in samples]))
        for name in samples[0]
    }


def read_regions(store: Path) -> dict[str, Any]:
    """What a store of ROI series tells of itself: `atlas`, `atlas_sha256`, `repetition_time`, ...

    Raises
    ------
    InputError
        When it cannot be read.
    """
    try:
        return dict(read_json(store / "zarr.json")["attributes"])
    except (OSError, KeyError) as error:
        raise InputError(f"{store}: not a readable ROI store ({error}); run rois") from None
