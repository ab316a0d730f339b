"""Denoising over time: confounds, filter, trend, scrubbing and another repetition time.

Choices
-------
- `nilearn.signal.clean` does trend, Butterworth filter and confounds jointly, so that the filter
  does not bring back what was regressed out (Lindquist et al. 2019, doi:10.1002/hbm.24528).
- Each voxel keeps its mean over the volumes that are used, whatever the filter takes: tSNR,
  normalisation and the forecast of persistence need it.
- Scrubbed and non-steady-state volumes are removed, as in nilearn. The coordinate `time` has the
  true seconds since the scan began, and `time_is_regular` says whether it has gaps; what reads the
  volumes as a series takes the two sides of a gap for neighbours.
- Where a filter must cross a gap, cubic splines bridge it. We bridge before nilearn does: up to
  0.13 it leaves a scrubbed volume as it is when the one as far from the other end of the run is
  scrubbed too, so that the artefact spreads through the filter. Gaps at the ends are cut off and
  not bridged, because splines go astray beyond the last value that holds them.
- Another repetition time comes last, on the true time axis (see `resample_time`). No volume is made
  up between two that are not both used.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, cast

import nilearn
import numpy as np
import numpy.typing as npt
import scipy
from nilearn.signal import clean

from neuromamba.config import Denoise
from neuromamba.confounds import Confounds, no_confounds, read_confounds, sidecar_of
from neuromamba.files import InputError, digest_file
from neuromamba.nifti import Header
from neuromamba.resample_time import FINEST, SAME_SECONDS, resample_time, times_of

Series = npt.NDArray[np.float64]
"""(volume, voxel) or (volume, column)."""


class Denoiser:
    """What is to be done to a run's time courses, decided before any of its volumes is read.

    Parameters
    ----------
    header
        The scan.
    run
        The run's name, for messages.
    repetition_time
        Of the scan, in seconds.
    confounds
        The run's table of confounds, if it has one.
    settings
        What is asked for.
    min_volumes
        A run with fewer volumes left is refused.

    Attributes
    ----------
    times
        (volume,) seconds from the scan's first volume to each one of the result.
    attributes
        All of it for the record, JSON-able.

    Raises
    ------
    InputError
        When the confounds cannot be used (see `read_confounds`), a frequency is above Nyquist's,
        the new repetition time is less than half the old, or too few volumes or no degrees of
        freedom are left.
    """

    def __init__(
        self,
        header: Header,
        run: str,
        repetition_time: float,
        confounds: Path | None,
        settings: Denoise,
        min_volumes: int,
    ):
        self._settings, self._run = settings, run
        self._old, self._new = repetition_time, settings.repetition_time or repetition_time
        self._refuse_frequencies()
        found = no_confounds(header.n_volumes)
        if settings.strategy:
            found = read_confounds(confounds, run, header.n_volumes, repetition_time, settings)
        self._first, self._stop = int(found.kept[0]), int(found.kept[-1]) + 1
        self._kept = found.kept - self._first
        self._wanted = self._wanted_times()
        self.times = self._first * self._old + self._wanted
        left = min(len(self._kept), len(self.times))
        if left < min_volumes:
            raise InputError(
                f"{header.path}: {left} of {header.n_volumes} volumes are left after "
                f"{len(found.dropped)} before the steady state and {len(found.scrubbed)} scrubbed "
                f"ones, at a repetition time of {self._new:g} s: fewer than volumes.min_volumes = "
                f"{min_volumes}; lower that setting, change volumes.denoise, or leave the run out"
            )
        self._confounds = self._bridge(found.values[self._first : self._stop])
        rank = self._rank(header.path)
        dof = self._degrees_of_freedom(header.path, len(found.columns), rank)
        self.attributes = self._record(header, found, rank, dof)
        if settings.strategy:
            self.attributes |= _digests(cast(Path, confounds), settings)

    def apply(self, series: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Denoise time courses: (volume, voxel) of the scan -> (volume, voxel) at `times`."""
        values = series[self._first : self._stop].astype(np.float64)
        mean = values[self._kept].mean(axis=0)
        values -= mean
        confounds = self._confounds if self._confounds.shape[1] else None
        values = self._clean(self._bridge(values), confounds)
        values -= values.mean(axis=0)
        if self._resamples:
            values = self._resample(values)
        return (values + mean).astype(np.float32)

    @property
    def _filters(self) -> bool:
        return bool(self._settings.low_pass or self._settings.high_pass)

    @property
    def _resamples(self) -> bool:
        return abs(self._new - self._old) > SAME_SECONDS

    def _refuse_frequencies(self) -> None:
        nyquist = 0.5 / max(self._old, self._new)
        limits = {"low_pass": 0.5 / self._old, "high_pass": nyquist}
        for name, limit in limits.items():
            value = getattr(self._settings, name)
            if value is not None and value >= limit:
                raise InputError(
                    f"{self._run}: volumes.denoise.{name} = {value:g} Hz is not below the Nyquist "
                    f"frequency, {limit:g} Hz at a repetition time of {0.5 / limit:g} s; lower it, "
                    "or leave it out"
                )
        if self._new < FINEST * self._old - SAME_SECONDS:
            raise InputError(
                f"{self._run}: volumes.denoise.repetition_time = {self._new:g} s is less than half "
                f"the scan's {self._old:g} s; volumes in between would be made up, so choose at "
                f"least {FINEST * self._old:g}"
            )

    def _wanted_times(self) -> Series:
        """Seconds from the first volume used to each one of the result."""
        if not self._resamples:
            return np.asarray(self._kept * self._old, dtype=np.float64)
        used = np.zeros(self._stop - self._first + 1, dtype=bool)
        used[self._kept] = True
        wanted = times_of(len(used) - 1, self._old, self._new)
        place = wanted / self._old
        below = np.floor(place + SAME_SECONDS).astype(np.intp)
        on_volume = np.abs(place - below) < SAME_SECONDS
        return np.asarray(wanted[used[below] & (on_volume | used[below + 1])])

    def _bridge(self, values: Series) -> Series:
        """Cubic splines over the volumes that are not used."""
        gaps = np.setdiff1d(np.arange(len(values)), self._kept)
        if len(gaps) and values.shape[1]:
            values = values.copy()
            values[gaps] = scipy.interpolate.CubicSpline(self._kept, values[self._kept])(gaps)
        return values

    def _clean(self, values: Series, confounds: Series | None) -> Series:
        with warnings.catch_warnings():
            # It announces by how much a later release will scale confounds: to no effect here.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            cleaned = clean(
                values,
                detrend=self._settings.detrend,
                standardize=None,
                sample_mask=self._kept if len(self._kept) < len(values) else None,
                confounds=confounds,
                filter="butterworth" if self._filters else False,
                low_pass=self._settings.low_pass,
                high_pass=self._settings.high_pass,
                t_r=self._old,
                # Without a copy nilearn filters voxel by voxel, several times as slowly.
                **({"butterworth__copy": True} if self._filters else {}),
            )
        return np.asarray(cleaned, dtype=np.float64)

    def _resample(self, values: Series) -> Series:
        grid = np.arange(self._stop - self._first)
        if len(values) < len(grid):
            values = scipy.interpolate.CubicSpline(self._kept, values)(grid)
        return resample_time(values, self._old, self._new, self._wanted)

    def _record(self, header: Header, found: Confounds, rank: int, dof: int) -> dict[str, Any]:
        slower = self._resamples and self._new > self._old
        return {
            "repetition_time": self._new,
            "time_is_regular": bool(np.allclose(np.diff(self.times), self._new)),
            "n_dropped": len(found.dropped),
            "n_scrubbed": len(found.scrubbed),
            "dof": dof,
            "denoise": {
                **self._settings.model_dump(mode="json", exclude={"smoothing"}),
                "columns": found.columns,
                "rank": rank,
                "dropped": found.dropped,
                "scrubbed": found.scrubbed,
                "filter": "Butterworth, order 5, zero phase" if self._filters else None,
                "anti_alias": "Chebyshev II, order 12, zero phase" if slower else None,
                "interpolation": "quintic" if self._resamples else None,
                "source_repetition_time": self._old,
                "source_n_volumes": header.n_volumes,
                "nilearn_version": nilearn.__version__,
                "scipy_version": scipy.__version__,
            },
        }

    def _rank(self, path: Path) -> int:
        """Independent regressors after trend and filter; fails where a run is too short for it."""
        some = self._confounds.shape[1] > 0
        probe = self._confounds if some else np.zeros((self._stop - self._first, 1))
        try:
            cleaned = self._clean(probe, None)
        except ValueError as error:
            raise InputError(
                f"{path}: is too short for the filter of volumes.denoise ({error}); leave the "
                "filter out, or the run"
            ) from None
        cleaned -= cleaned.mean(axis=0)
        sd = cleaned.std(axis=0)
        varies = sd > np.finfo(np.float64).eps * np.abs(probe).max(axis=0)
        return int(np.linalg.matrix_rank(cleaned[:, varies] / sd[varies])) if varies.any() else 0

    def _degrees_of_freedom(self, path: Path, n_columns: int, rank: int) -> int:
        """Frequencies that the filter leaves to the volumes used, less the regressors' rank."""
        nyquist, low = 0.5 / self._old, self._settings.high_pass or 0.0
        high = min(self._settings.low_pass or nyquist, 0.5 / self._new, nyquist)
        passed = len(self._kept) * (high - low) / nyquist
        # Mean and trend lie below any high-pass filter.
        constant = 0 if low else 1 + self._settings.detrend
        dof = math.floor(passed + SAME_SECONDS) - rank - constant
        if dof <= 0:
            raise InputError(
                f"{path}: denoising leaves no degrees of freedom: of {len(self._kept)} volumes the "
                f"filter keeps {passed:.1f}, and {n_columns} confounds (rank {rank}), mean and "
                f"trend take {rank + constant}; choose fewer confounds or a wider filter in "
                "volumes.denoise, or leave the run out"
            )
        return dof


def _digests(confounds: Path, settings: Denoise) -> dict[str, str]:
    """Where the confounds come from, for the record."""
    found = {"confounds_source": str(confounds), "confounds_sha256": digest_file(confounds)}
    if "compcor" in settings.strategy:
        found["confounds_json_sha256"] = digest_file(sidecar_of(confounds))
    return found
