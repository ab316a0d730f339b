"""Features of subjects' ROI series that are not FC: tangent space, and mean and SD.

Design choices
--------------
- Tangent space is of Ledoit-Wolf covariances of standardised series, about the geometric mean of
  the training subjects (nilearn's `ConnectivityMeasure`). It needs whole matrices, so a ROI that a
  subject lacks in any run is completed as a Gaussian with the training mean's covariance has it,
  given the ROIs that there are: the matrix stays positive definite, and says nothing new of the
  missing ROI.
- A ROI that more than `MAX_MISSING` of the training subjects lack is dropped, told by them alone.

Memory of tangent space: subjects x ROIs x ROIs x 8 bytes, held about three times.

Sources: Varoquaux et al. 2010 (doi:10.1007/978-3-642-15705-9_25); Dadi et al. 2019
(doi:10.1016/j.neuroimage.2019.02.062).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator
from sklearn.covariance import ledoit_wolf
from tqdm import tqdm

from neuromamba.excerpts import Excerpt, read_series
from neuromamba.files import InputError
from neuromamba.roi_features import MAX_MISSING, Connectivity, Stores, too_few_common

SMALLEST_EIGENVALUE = 1e-3
"""Of the mean covariance that missing ROIs are completed by; series have variance 1."""


def load_tangent(stores: Stores, train: Sequence[str], test: Sequence[str]) -> Connectivity:
    """Tangent space of the subjects' covariances about the training subjects' geometric mean.

    Parameters, result and errors are those of `load_connectivity`.
    """
    # Loading it takes seconds, which only those who ask for it are to wait for.
    from nilearn.connectome import ConnectivityMeasure

    subjects = [*train, *test]
    found = _each(stores, subjects, "fc-tangent", _covariance)
    covariances = np.stack(found)
    missing = np.isnan(np.diagonal(covariances[: len(train)], axis1=1, axis2=2))
    kept = missing.mean(axis=0) <= MAX_MISSING
    if kept.sum() < 2:
        raise InputError(too_few_common(len(kept)))
    covariances = covariances[:, kept][:, :, kept]
    share = float(np.isnan(covariances).mean())
    complete = complete_covariances(covariances, len(train))
    del found, covariances
    measure = ConnectivityMeasure(
        cov_estimator=_Given(), kind="tangent", vectorize=True, standardize=False
    )
    measure.fit(list(complete[: len(train)]))
    # One at a time, or else nilearn would hold all of them three times more.
    vectors = np.stack([measure.transform([each])[0].astype(np.float32) for each in complete])
    n_train, used = len(train), int(kept.sum())
    return Connectivity(
        vectors[:n_train], vectors[n_train:], used, len(kept) - used, share, "tangent"
    )


def complete_covariances(
    covariances: npt.NDArray[np.floating], n_train: int
) -> npt.NDArray[np.float64]:
    """Fill in the ROIs that a subject lacks by the mean of the first `n_train` subjects.

    Parameters
    ----------
    covariances
        (subject, roi, roi), rows and columns of missing ROIs NaN.
    n_train
        Training subjects, which come first. Each pair of ROIs is there in one of them or more.

    Returns
    -------
    (subject, roi, roi) float64
        Positive definite, what was there unchanged.
    """
    mean = np.nan_to_num(np.nanmean(covariances[:n_train], axis=0))
    values, vectors = np.linalg.eigh(mean)
    mean = vectors * np.maximum(values, SMALLEST_EIGENVALUE) @ vectors.T
    complete = covariances.astype(np.float64)
    for matrix in complete:
        lack = np.isnan(np.diagonal(matrix))
        if not lack.any():
            continue
        have = ~lack
        known, across = matrix[np.ix_(have, have)], mean[np.ix_(lack, have)]
        weight = np.linalg.solve(mean[np.ix_(have, have)], across.T).T
        matrix[np.ix_(lack, have)] = weight @ known
        matrix[np.ix_(have, lack)] = (weight @ known).T
        rest = mean[np.ix_(lack, lack)] - weight @ across.T
        block = rest + weight @ known @ weight.T
        # Equal to the last bit, which nilearn asks of what it takes for symmetric.
        matrix[np.ix_(lack, lack)] = (block + block.T) / 2
    return complete


def load_moments(stores: Stores, train: Sequence[str], test: Sequence[str]) -> Connectivity:
    """Mean and SD over time of each ROI's series, averaged over runs, in units of their spread.

    Parameters, result and errors are those of `load_connectivity`; the features are standardised
    by the training subjects.
    """
    values = np.stack(_each(stores, [*train, *test], "roi-mean", _moments))
    missing = np.isnan(values[: len(train)]).mean(axis=0)
    n_rois = values.shape[1] // 2
    kept = missing <= MAX_MISSING
    if not kept.any():
        raise InputError(too_few_common(n_rois))
    values = values[:, kept]
    mean, sd = (f(values[: len(train)], axis=0) for f in (np.nanmean, np.nanstd))
    scaled = ((values - mean) / np.where(sd > 0, sd, 1.0)).astype(np.float32)
    used = int(kept[:n_rois].sum())
    share = float(np.isnan(scaled).mean())
    return Connectivity(
        scaled[: len(train)], scaled[len(train) :], used, n_rois - used, share, "mean and SD"
    )


class _Given(BaseEstimator):
    """The covariance estimator of a series that is its covariance already."""

    def fit(self, x: npt.NDArray[np.float64], y: None = None) -> _Given:
        self.covariance_ = x
        return self


def _each(
    stores: Stores,
    subjects: Sequence[str],
    what: str,
    measure: Callable[[list[npt.NDArray[np.float64]]], npt.NDArray[np.float64]],
) -> list[npt.NDArray[np.float32]]:
    """What `measure` makes of the (time, roi) series of each subject's runs, float32."""
    found: list[npt.NDArray[np.float32]] = []
    first: int | None = None
    for subject in tqdm(subjects, desc=what, unit="subject", mininterval=1.0):
        series = [_read_series(store) for store in stores[subject]]
        numbers = {run.shape[1] for run in series}
        numbers_before = numbers if first is None else {first}
        if len(numbers) > 1 or numbers != numbers_before:
            raise InputError(
                f"{stores[subject][0]}: runs or subjects have different numbers of ROIs; "
                "delete the dataset's rois folder and run rois again"
            )
        first = series[0].shape[1]
        found.append(measure(series).astype(np.float32))
    return found


def _read_series(store: Path | Excerpt) -> npt.NDArray[np.float64]:
    return store.read() if isinstance(store, Excerpt) else read_series(store)


def _covariance(runs: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Ledoit-Wolf covariance of the standardised runs together; NaN where a run lacks the ROI."""
    spread = np.stack([run.std(axis=0) for run in runs])
    present = (np.isfinite(spread) & (spread > 0)).all(axis=0)
    matrix = np.full((len(present), len(present)), np.nan)
    if present.any():
        scaled = [(run - run.mean(axis=0))[:, present] / run.std(axis=0)[present] for run in runs]
        matrix[np.ix_(present, present)] = ledoit_wolf(np.concatenate(scaled))[0]
    return matrix


def _moments(runs: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """(2 x roi,): means, then SDs; NaN where no run has the ROI."""
    values = np.stack([np.r_[run.mean(axis=0), run.std(axis=0)] for run in runs])
    count = np.isfinite(values).sum(axis=0)
    return np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)
