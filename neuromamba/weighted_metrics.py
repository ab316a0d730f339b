"""The metrics over weighted subjects: AUROC, accuracies, calibration, MAE, r and R2.

Design choices
--------------
- One vectorised expression gives the point estimate (all weights 1) and every bootstrap resample
  (weights = how often a subject was drawn). The tests hold the point estimates against
  scikit-learn's.
- The calibration of probabilities is the Brier score, and the expected calibration error (ECE) over
  `ECE_BINS` bins of equal width: the mean distance of what is predicted from what is true in a bin,
  weighted by the bin's subjects. With two classes the bins are of the positive class's
  probability, with more of that of the most probable class (Guo et al. 2017, arXiv 1706.04599).
- What is undefined is missing, not a number.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from neuromamba.statistics import scored_classes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Metrics = Callable[[Floats], dict[str, Floats]]

ECE_BINS = 10


def weighted_auroc(positive: npt.NDArray[np.bool_], score: Floats, weight: Floats) -> Floats:
    """Area under the ROC curve by ranks; ties count half.

    Parameters
    ----------
    positive, score
        (subject,) truth and score.
    weight
        (resample, subject) how often each subject counts.

    Returns
    -------
    (resample,) float64
        NaN where a class has no weight.
    """
    # Equal scores share one rank, whose weights are added up before classes are compared.
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    weight = weight[:, order]
    up = np.add.reduceat(weight * positive[order], starts, axis=1)
    down = np.add.reduceat(weight * ~positive[order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down
    pairs = up.sum(axis=1) * down.sum(axis=1)
    return _divide((up * (below + 0.5 * down)).sum(axis=1), pairs)


def classification_metrics(true: Ints, probability: Floats) -> Metrics:
    """AUROC, balanced accuracy, accuracy, Brier score and ECE as a function of weights.

    Parameters
    ----------
    true
        (subject,) number of the true class.
    probability
        (subject, class); the class of highest probability is the prediction.

    Notes
    -----
    With two classes the AUROC is that of the last, "positive" class; with more, the mean of each
    class against the rest. Both it and the balanced accuracy average over classes that occur. The
    Brier score is that of scikit-learn: of the positive class, or summed over more than two.
    """
    classes = np.unique(true)
    right = probability.argmax(axis=1) == true
    scored = scored_classes(probability)
    if len(scored) > 1:
        scored = [k for k in scored if k in classes]
    loss = (probability - np.eye(probability.shape[1])[true]) ** 2
    brier = loss[:, 1] if len(probability[0]) == 2 else loss.sum(axis=1)
    error = calibration_error(true, probability)

    def metrics(weight: Floats) -> dict[str, Floats]:
        areas = [weighted_auroc(true == k, probability[:, k], weight) for k in scored]
        recalls = [_divide(weight @ (right & (true == k)), weight @ (true == k)) for k in classes]
        return {
            "auroc": np.mean(areas, axis=0),
            "balanced_accuracy": np.mean(recalls, axis=0),
            "accuracy": _divide(weight @ right, weight.sum(axis=1)),
            "brier": _divide(weight @ brier, weight.sum(axis=1)),
            "ece": error(weight),
        }

    return metrics


def calibration_error(true: Ints, probability: Floats) -> Callable[[Floats], Floats]:
    """Expected calibration error as a function of weights: (resample, subject) -> (resample,)."""
    if probability.shape[1] == 2:
        confidence, occurs = probability[:, 1], true == 1
    else:
        confidence, occurs = probability.max(axis=1), probability.argmax(axis=1) == true
    # The bins of scikit-learn's `calibration_curve`, which draws the reliability curve.
    bins = np.searchsorted(np.linspace(0, 1, ECE_BINS + 1)[1:-1], confidence)
    member = np.eye(ECE_BINS)[bins]

    def error(weight: Floats) -> Floats:
        apart = weight @ (member * (confidence - occurs)[:, None])
        return _divide(np.abs(apart).sum(axis=1), weight.sum(axis=1))

    return error


def mean_auroc(true: Ints, probability: Floats) -> float:
    """AUROC of (subject, class) probabilities, as in `classification_metrics`."""
    metrics = classification_metrics(true, probability)
    return float(metrics(np.ones((1, len(true))))["auroc"][0])


def regression_metrics(true: Floats, predicted: Floats) -> Metrics:
    """MAE, Pearson r and R2 as a function of weights; all (subject,) float64."""

    def metrics(weight: Floats) -> dict[str, Floats]:
        total = weight.sum(axis=1)
        x, y = (_centred(values, weight) for values in (predicted, true))
        spread = (weight * y**2).sum(axis=1)
        product = (weight * x * y).sum(axis=1)
        error = weight @ (true - predicted) ** 2
        return {
            "mae": _divide(weight @ np.abs(true - predicted), total),
            "pearson_r": _divide(product, np.sqrt((weight * x**2).sum(axis=1) * spread)),
            "r2": 1 - _divide(error, spread),
        }

    return metrics


def _centred(values: Floats, weight: Floats) -> Floats:
    """Values minus their weighted mean, exactly 0 where they are constant; (resample, subject)."""
    values = values - values[0]
    centred = values - _divide(weight @ values, weight.sum(axis=1))[:, None]
    used = np.where(weight > 0, np.abs(centred), 0).max(axis=1, keepdims=True)
    rounding = 1e-12 * np.abs(values).max(initial=0)
    return np.where(used > rounding, centred, 0.0)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=denominator != 0)
