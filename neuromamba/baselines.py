"""What a model has to beat: functional connectivity with a linear model, and no features at all.

Design choices
--------------
- Features are the Fisher z of the FC (the first of `rois.connectivity`), averaged over a subject's
  runs, one value per pair of ROIs. A pair that more than `MAX_MISSING` of the training subjects
  lack is dropped for everyone; other missing values become the training mean. Dropping each ROI
  that any subject lacks would weaken the baseline: on 642 ABIDE subjects with 392 ROIs it leaves 78
  ROIs and takes the AUROC of sex from 0.81 to 0.70.
- Which pairs are kept and what fills the others is told by training subjects alone. A test subject
  that lacks most of them is predicted near the training mean, and is warned of.
- Features are centred, not standardised: it was the better of the two there (0.81 against 0.80).
- The linear model is penalised by L2: logistic regression with balanced classes, or ridge. Its
  solution lies in the span of the training subjects, so it is fitted exactly on n rotated features
  (n subjects) in place of tens of thousands: 500 subjects x 77,000 features take seconds.
- The penalty is chosen by cross-validation within the training subjects, by AUROC or squared error.
  They are the training *and* validation parts of the split: the model uses its validation subjects
  to choose a step, the baseline uses all of them to choose a penalty, and neither sees a test
  subject. The rotation uses no labels and is shared by the inner folds.

Memory is that of the features: subjects x pairs of ROIs x 4 bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from tqdm import tqdm

from neuromamba.connectivity import read_z
from neuromamba.files import InputError
from neuromamba.metrics import mean_auroc

PENALTIES = np.logspace(-3, 4, 8)
"""Inverse penalty (`C`) of features whose squares sum to about 1 in each subject."""

MAX_MISSING = 0.1
"""Share of training subjects that may lack a pair of ROIs."""
MOSTLY_MISSING = 0.5
"""Share of the features from which on a test subject's lack of them is warned of."""


@dataclass(frozen=True)
class Connectivity:
    """FC features of training and test subjects.

    Attributes
    ----------
    train, test
        (subject, pair of ROIs) float32 Fisher z, NaN where a subject lacks one of the two.
    n_rois, n_dropped
        ROIs used, and those left out because too many training subjects lack them.
    missing
        Share of the values that are missing, over all subjects.
    kind
        What connectivity it is: `pearson` or `partial`.
    """

    train: npt.NDArray[np.float32]
    test: npt.NDArray[np.float32]
    n_rois: int
    n_dropped: int
    missing: float
    kind: str = "pearson"


def mean_connectivity(stores: Sequence[Path]) -> npt.NDArray[np.float32]:
    """Mean Fisher z over a subject's runs: (roi, roi), NaN where no run has the ROI.

    Raises
    ------
    InputError
        When a store is unreadable, or the runs have different ROIs.
    """
    total: npt.NDArray[np.float64] | None = None
    count: npt.NDArray[np.int_] | None = None
    for store in stores:
        _, z = read_z(store)
        if total is None or count is None:
            total, count = np.zeros_like(z), np.zeros(z.shape, dtype=int)
        elif total.shape != z.shape:
            raise InputError(
                f"{store}: {len(z)} ROIs, the subject's other runs have {len(total)}; "
                "delete the dataset's rois folder and run rois again"
            )
        total += np.nan_to_num(z)
        count += np.isfinite(z)
    if total is None or count is None:
        raise InputError("a subject has no run with ROI series")
    with np.errstate(invalid="ignore"):
        return (total / count).astype(np.float32)


def load_connectivity(
    stores: Mapping[str, Sequence[Path]], train: Sequence[str], test: Sequence[str]
) -> Connectivity:
    """Read the FC of `train` and `test` subjects and choose the ROIs that all of `train` have.

    Parameters
    ----------
    stores
        The `rois/{run}.zarr` of each subject.
    train, test
        Subjects, in the order of the rows returned.

    Raises
    ------
    InputError
        When no pair of ROIs is common to the training subjects, or a store is unreadable.
    """
    features: list[npt.NDArray[np.float32]] = []
    pairs: tuple[npt.NDArray[np.intp], ...] = ()
    n_rois = 0
    for subject in tqdm([*train, *test], desc="fc", unit="subject", mininterval=1.0):
        fc = mean_connectivity(stores[subject])
        if not pairs:
            n_rois, pairs = len(fc), np.triu_indices(len(fc), k=1)
        if len(fc) != n_rois:
            raise InputError(
                f"{stores[subject][0]}: {len(fc)} ROIs, other subjects have {n_rois}; "
                "delete the dataset's rois folder and run rois again"
            )
        features.append(fc[pairs])
    found = keep_common(np.stack(features), len(train), n_rois)
    _warn_of_missing(found, test)
    kind, _ = read_z(stores[train[0]][0])
    return replace(found, kind=kind)


def _warn_of_missing(found: Connectivity, test: Sequence[str]) -> None:
    share = np.isnan(found.test).mean(axis=1)
    poor = [
        f"{subject} ({value:.0%})"
        for subject, value in zip(test, share, strict=True)
        if value > MOSTLY_MISSING
    ]
    if poor:
        warnings.warn(
            f"test subjects that lack most of the FC baseline's features, in place of which the "
            f"training mean stands: {', '.join(poor)}; look at their fields of view",
            stacklevel=3,
        )


def keep_common(features: npt.NDArray[np.float32], n_train: int, n_rois: int) -> Connectivity:
    """Drop the pairs of ROIs that too many of the first `n_train` rows lack.

    Parameters
    ----------
    features
        (subject, pair of ROIs) float32, training subjects first, pairs in `triu_indices` order.
    n_train, n_rois
        Number of training subjects and of ROIs.

    Raises
    ------
    InputError
        When no pair is left.
    """
    missing = np.isnan(features[:n_train]).mean(axis=0)
    kept = missing <= MAX_MISSING
    if not kept.any():
        raise InputError(
            f"no two of the {n_rois} ROIs are in {1 - MAX_MISSING:.0%} of the training subjects; "
            "choose an atlas that covers the scanned part of the brain, or a larger rois.cube"
        )
    used = len(np.unique(np.concatenate([index[kept] for index in np.triu_indices(n_rois, k=1)])))
    features = features[:, kept]
    share = float(np.isnan(features).mean())
    return Connectivity(features[:n_train], features[n_train:], used, n_rois - used, share)


def rotate(
    train: npt.NDArray[np.floating], test: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Centre by the training rows and rotate onto their span.

    A linear model with an L2 penalty predicts the same from the rotated features as from the
    centred ones, because its weights are a combination of training rows.

    Parameters
    ----------
    train, test
        (subject, feature); missing values become the training mean.

    Returns
    -------
    (subject, n) float64
        Both rotated, with at most as many features as training rows, scaled so that the squares
        of a training row sum to 1 on average.
    """
    mean = np.nanmean(train, axis=0)
    x, x_test = np.nan_to_num(train - mean), np.nan_to_num(test - mean)
    gram, cross = (x @ x.T).astype(np.float64), (x_test @ x.T).astype(np.float64)
    size = float(np.trace(gram)) / len(gram)
    if size <= 0:
        return np.zeros((len(x), 1)), np.zeros((len(x_test), 1))
    values, vectors = np.linalg.eigh(gram / size)
    used = values > values.max() * 1e-7
    length = np.sqrt(values[used])
    return vectors[:, used] * length, cross / size @ (vectors[:, used] / length)


def predict_class(
    train: npt.NDArray[np.floating],
    labels: npt.NDArray[np.int64],
    test: npt.NDArray[np.floating],
    folds: int,
    seed: int,
) -> tuple[npt.NDArray[np.float64], float]:
    """Logistic regression on rotated features; the penalty has the highest AUROC.

    Parameters
    ----------
    train, test
        (subject, feature).
    labels
        (subject,) class of each training row, counted from 0, each class with at least one row.
    folds, seed
        Inner folds, fewer where the rarest class is smaller, and what seeds their shuffling. A
        class with one subject leaves no folds: then C = 1.

    Returns
    -------
    probability : (subject, class) float64
    chosen : float
        The inverse penalty C.
    """
    rotated, rotated_test = rotate(train, test)
    counts = np.bincount(labels)
    folds = min(folds, counts.min())

    def model(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, class_weight="balanced", max_iter=5000)

    def auroc(c: float) -> float:
        inner = StratifiedKFold(folds, shuffle=True, random_state=seed)
        scores = []
        for fit, held in inner.split(rotated, labels):
            probability = model(c).fit(rotated[fit], labels[fit]).predict_proba(rotated[held])
            scores.append(mean_auroc(labels[held], probability))
        return float(np.mean(scores))

    # The first of equals is the strongest penalty, which is the safer choice.
    chosen = 1.0 if folds < 2 else float(max(PENALTIES, key=auroc))
    return model(chosen).fit(rotated, labels).predict_proba(rotated_test), chosen


def predict_number(
    train: npt.NDArray[np.floating],
    values: npt.NDArray[np.floating],
    test: npt.NDArray[np.floating],
    folds: int,
    seed: int,
) -> tuple[npt.NDArray[np.float64], float]:
    """Ridge regression on rotated features; the penalty has the lowest squared error.

    Parameters and results are those of `predict_class`, with `values` (subject,) in place of
    classes and (subject,) predictions.
    """
    rotated, rotated_test = rotate(train, test)
    folds = min(folds, len(values))

    def model(c: float) -> Ridge:
        return Ridge(alpha=1 / c)

    def loss(c: float) -> float:
        inner = KFold(folds, shuffle=True, random_state=seed)
        predicted = cross_val_predict(model(c), rotated, values, cv=inner)
        return float(np.mean((predicted - values) ** 2))

    chosen = 1.0 if folds < 2 else float(min(PENALTIES, key=loss))
    return model(chosen).fit(rotated, values).predict(rotated_test), chosen


def no_features(labels: pd.Series, classes: Sequence[str]) -> dict[str, Any]:
    """What to predict without looking: class shares, or the mean, of the training labels.

    Returns
    -------
    dict
        Share of each class by name; or `value`, when there are no `classes`.
    """
    if not classes:
        return {"value": float(labels.astype(float).mean())}
    return {name: float((labels == name).mean()) for name in classes}
