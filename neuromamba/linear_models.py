"""Linear models of many features and few subjects, each chosen within the training subjects.

Design choices
--------------
- All are penalised by L2 with balanced classes: logistic or ridge regression (`linear`), a support
  vector machine (`svm`), or kernel ridge regression with the cosine kernel (`kernel-ridge`: the
  correlation of two subjects' features; of classes, of +-1 for each, as scikit-learn's
  `RidgeClassifier`).
- Their solutions lie in the span of the training subjects, so they are fitted exactly on n rotated
  features (n subjects) in place of tens of thousands: 500 subjects x 77,000 features take seconds.
  A kernel that is linear in the features is the same as the features themselves.
- Features are centred, not standardised: it was the better of the two on ABIDE (0.81 against 0.80).
- The penalty is chosen by cross-validation within the training subjects, by AUROC or squared error.
  Where a subject has several rows, of several states, all of them are in one inner fold.
  The rotation and what fills missing values use no labels, and are shared by the inner folds.
- Confounds are regressed out of the features by least squares, within each fold: what is taken from
  a held-out subject was estimated without it. Regression commutes with the rotation.
- Probabilities are Platt's sigmoid of cross-validated decision values, for balanced classes. With
  fewer subjects than features the classes are separable, and the probabilities of the fitted
  logistic regression itself lean to the commoner class: on the sexes of ABIDE (17 % women) its
  balanced accuracy was 0.60 in place of 0.70, with the same AUROC. A sigmoid that falls, as noise
  may give, is not used.

Sources: He et al. 2020 (doi:10.1016/j.neuroimage.2019.116276) for the kernel; Snoek et al. 2019
(doi:10.1016/j.neuroimage.2018.09.074) for regression within folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC, SVR

from neuromamba.inner_folds import Splits, class_folds
from neuromamba.platt import fit_sigmoids
from neuromamba.weighted_metrics import mean_auroc

PENALTIES = np.logspace(-3, 4, 8)
"""Inverse penalty (`C`) of features whose squares sum to about 1 in each subject."""
SVM_PENALTIES = np.logspace(0, 2, 3)
"""Of a support vector machine: below, every subject is a support vector and the threshold is
arbitrary; above, it takes hours to fit what it cannot separate."""

Method = Literal["linear", "svm", "kernel-ridge"]
Matrix = npt.NDArray[np.float64]
Confounds = tuple[Matrix, Matrix]
"""(subject, column) of training and of test subjects, without gaps."""


class RegressOut(TransformerMixin, BaseEstimator):
    """Take the last `n_confounds` columns, and the mean, out of the others by least squares.

    With no confounds it centres. The result lacks the columns of the confounds. Of categories with
    a column each, one that was not fitted counts as the mean of the others, each counted once.
    """

    def __init__(self, n_confounds: int = 0) -> None:
        self.n_confounds = n_confounds

    def fit(self, x: Matrix, y: npt.NDArray[Any] | None = None) -> RegressOut:
        """Estimate the coefficients on (subject, feature + confound)."""
        # Centred, because a constant beside a column for each category would not be determined.
        self.mean_ = x.mean(axis=0)
        features, confounds = self._split(x)
        self.coefficients_ = np.linalg.lstsq(confounds, features, rcond=None)[0]
        return self

    def transform(self, x: Matrix) -> Matrix:
        """(subject, feature + confound) -> (subject, feature)."""
        features, confounds = self._split(x)
        return np.asarray(features - confounds @ self.coefficients_)

    def _split(self, x: Matrix) -> tuple[Matrix, Matrix]:
        cut = x.shape[1] - self.n_confounds
        centred = x - self.mean_
        return centred[:, :cut], centred[:, cut:]


@dataclass(frozen=True)
class Calibrated:
    """A classifier and the sigmoids of its decision values, see `platt.fit_sigmoids`."""

    model: Pipeline
    slope: Matrix
    offset: Matrix

    def predict_proba(self, x: Matrix) -> Matrix:
        """(subject, class) probabilities; of more than two classes the sigmoids over their sum."""
        decision = np.asarray(self.model.decision_function(x)).reshape(len(x), -1)
        share = expit(decision * self.slope + self.offset)
        if share.shape[1] == 1:
            return np.hstack([1 - share, share])
        return np.asarray(share / share.sum(axis=1, keepdims=True))


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


def correlate_rows(
    train: npt.NDArray[np.floating], test: npt.NDArray[np.floating]
) -> tuple[Matrix, Matrix]:
    """Features whose inner product is the correlation of two subjects' features.

    Parameters
    ----------
    train, test
        (subject, feature); missing values become the training mean.
    """
    mean = np.nanmean(train, axis=0)
    scaled = []
    for values in (train, test):
        rows = np.where(np.isnan(values), mean, values).astype(np.float64)
        rows -= rows.mean(axis=1, keepdims=True)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        scaled.append(rows / np.where(length > 0, length, 1.0))
    return scaled[0], scaled[1]


def predict_class(
    train: npt.NDArray[np.floating],
    labels: npt.NDArray[np.int64],
    test: npt.NDArray[np.floating],
    folds: int,
    seed: int,
    method: Method = "linear",
    confounds: Confounds | None = None,
    people: Sequence[str] | None = None,
) -> tuple[Matrix, float]:
    """Classify by the model whose penalty has the highest AUROC in the inner folds.

    Parameters
    ----------
    train, test
        (subject, feature).
    labels
        (subject,) class of each training row, counted from 0, each class with at least one row.
    folds, seed
        Inner folds, fewer where the rarest class is smaller, and what seeds their shuffling. A
        class with one subject leaves no folds: then C = 1.
    method, confounds
        The model, and what is regressed out of the features.
    people
        The subject's name of each training row; `None` where each is of another one.

    Returns
    -------
    probability : (subject, class) float64
    chosen : float
        The inverse penalty C.
    """
    x, x_test, n_confounds = _prepare(train, test, method, confounds)
    inner = class_folds(labels, people, folds, seed)
    model, chosen = _choose(_classifier(method), x, labels, n_confounds, inner, _auroc)
    if inner is not None:
        model = _calibrate(model, x, labels, inner)
    return _probability(model, x_test), chosen


def predict_number(
    train: npt.NDArray[np.floating],
    values: npt.NDArray[np.floating],
    test: npt.NDArray[np.floating],
    folds: int,
    seed: int,
    method: Method = "linear",
    confounds: Confounds | None = None,
) -> tuple[Matrix, float]:
    """Predict by the model whose penalty has the lowest squared error in the inner folds.

    Parameters and results are those of `predict_class`, with `values` (subject,) in place of
    classes and (subject,) predictions.
    """
    x, x_test, n_confounds = _prepare(train, test, method, confounds)
    folds = min(folds, len(values))
    inner = KFold(folds, shuffle=True, random_state=seed) if folds > 1 else None
    estimator = SVR(kernel="linear") if method == "svm" else Ridge()
    score = "neg_mean_squared_error"
    model, chosen = _choose(estimator, x, values, n_confounds, inner, score)
    return np.asarray(model.predict(x_test), dtype=np.float64), chosen


def _prepare(
    train: npt.NDArray[np.floating],
    test: npt.NDArray[np.floating],
    method: Method,
    confounds: Confounds | None,
) -> tuple[Matrix, Matrix, int]:
    """Rotated features with the confounds behind them, and how many of these there are."""
    if method == "kernel-ridge":
        train, test = correlate_rows(train, test)
    x, x_test = rotate(train, test)
    if confounds is None:
        return x, x_test, 0
    columns = confounds[0].shape[1]
    return np.hstack([x, confounds[0]]), np.hstack([x_test, confounds[1]]), columns


def _classifier(method: Method) -> BaseEstimator:
    match method:
        case "linear":
            return LogisticRegression(class_weight="balanced", max_iter=5000)
        case "svm":
            return SVC(kernel="linear", class_weight="balanced")
        case "kernel-ridge":
            return RidgeClassifier(class_weight="balanced")


def _choose(
    model: BaseEstimator,
    x: Matrix,
    y: npt.NDArray[Any],
    n_confounds: int,
    inner: Any,
    score: Any,
) -> tuple[Pipeline, float]:
    """The model fitted with the best penalty, and its inverse."""
    pipeline = Pipeline([("adjust", RegressOut(n_confounds)), ("model", model)])
    by_alpha = "alpha" in model.get_params()
    if inner is None:
        return pipeline.fit(x, y), 1.0
    # The first of equals is the strongest penalty, which is the safer choice.
    key, grid = ("alpha", 1 / PENALTIES) if by_alpha else ("C", PENALTIES)
    if isinstance(model, SVC | SVR):
        grid = SVM_PENALTIES
    search = GridSearchCV(pipeline, {f"model__{key}": grid}, scoring=score, cv=inner)
    search.fit(x, y)
    found = float(search.best_params_[f"model__{key}"])
    return search.best_estimator_, 1 / found if by_alpha else found


def _calibrate(model: Pipeline, x: Matrix, labels: npt.NDArray[np.int64], inner: Splits) -> Any:
    """The model with Platt's sigmoid; itself where that would turn the order of its scores."""
    found = fit_sigmoids(model, x, labels, inner)
    return model if found is None else Calibrated(model, *found)


def _auroc(model: Any, x: Matrix, y: npt.NDArray[np.int64]) -> float:
    return mean_auroc(y, _probability(model, x))


def _probability(model: Any, x: Matrix) -> Matrix:
    """(subject, class), by a squashed decision value where the model has no probabilities."""
    if hasattr(model, "predict_proba"):
        return np.asarray(model.predict_proba(x), dtype=np.float64)
    decision = np.asarray(model.decision_function(x), dtype=np.float64)
    if decision.ndim == 1:
        return np.column_stack([expit(-decision), expit(decision)])
    return np.asarray(softmax(decision, axis=1))
