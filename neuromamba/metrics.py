"""Metrics and their intervals, computed from a table of predictions and nothing else.

Design choices
--------------
- Each metric is written over weighted subjects, so that one vectorised expression gives the point
  estimate (all weights 1) and every bootstrap resample (weights = how often a subject was drawn).
  The tests hold the point estimates against scikit-learn's.
- Intervals are percentiles over resamples of the test subjects. For classification subjects are
  drawn within their true class, so that every resample has the classes of the test set. They tell
  how much the figure depends on who was tested; not on who was trained, nor on the seed.
- All predictors see the same resamples, so that a difference between two is of the same subjects.
- What is undefined is missing, not a number: the correlation of a constant prediction, the AUROC
  of a test set with one class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba.files import InputError
from neuromamba.tables import read_table

PROBABILITY = "prob_"
HIGHER_IS_BETTER = {
    "auroc": True,
    "balanced_accuracy": True,
    "accuracy": True,
    "mae": False,
    "pearson_r": True,
    "r2": True,
}
BLOCK = 2_000_000
"""Weights held at once (16 MB in float64)."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Metrics = Callable[[Floats], dict[str, Floats]]


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
    """AUROC, balanced accuracy and accuracy as a function of weights.

    Parameters
    ----------
    true
        (subject,) number of the true class.
    probability
        (subject, class); the class of highest probability is the prediction.

    Notes
    -----
    With two classes the AUROC is that of the last, "positive" class; with more, the mean of each
    class against the rest. Both it and the balanced accuracy average over classes that occur.
    """
    classes = np.unique(true)
    right = probability.argmax(axis=1) == true
    scored = classes if probability.shape[1] > 2 else np.array([1])

    def metrics(weight: Floats) -> dict[str, Floats]:
        areas = [weighted_auroc(true == k, probability[:, k], weight) for k in scored]
        recalls = [_divide(weight @ (right & (true == k)), weight @ (true == k)) for k in classes]
        return {
            "auroc": np.mean(areas, axis=0),
            "balanced_accuracy": np.mean(recalls, axis=0),
            "accuracy": _divide(weight @ right, weight.sum(axis=1)),
        }

    return metrics


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


def compute_metrics(
    predictions: pd.DataFrame, resamples: int, confidence: float, seed: int
) -> pd.DataFrame:
    """Every metric of every predictor in a table of predictions.

    Parameters
    ----------
    predictions
        Columns `subject`, `predictor`, `y_true`, `y_pred` and, for classification, one column
        `prob_<class>` per class, the positive class last. Every predictor has the same subjects.
    resamples, confidence, seed
        Bootstrap resamples, coverage of the percentile intervals, and what seeds them.

    Returns
    -------
    pandas.DataFrame
        Columns `predictor`, `metric`, `value`, `low`, `high`, `n` (subjects).
    """
    rows = []
    for predictor, metrics, strata in _predictors(predictions):
        point = metrics(np.ones((1, len(strata))))
        drawn = bootstrap(metrics, strata, resamples, seed)
        for name, value in point.items():
            low, high = interval(value[0], drawn[name], confidence)
            rows.append((predictor, name, value[0], low, high, len(strata)))
    return pd.DataFrame(rows, columns=["predictor", "metric", "value", "low", "high", "n"])


def compare(
    predictions: pd.DataFrame,
    first: str,
    second: str,
    resamples: int,
    confidence: float,
    seed: int,
) -> pd.DataFrame:
    """Difference `first - second` in each metric, with a paired bootstrap interval.

    Returns
    -------
    pandas.DataFrame
        Columns `predictor` (`first`), `versus` (`second`), `metric`, `difference`, `low`, `high`,
        `better`: `first` or `second` where the interval leaves out 0 (smaller is better for an
        error), missing where it does not.
    """
    found = {name: (metrics, strata) for name, metrics, strata in _predictors(predictions)}
    (metrics_1, strata), (metrics_2, _) = found[first], found[second]
    ones = np.ones((1, len(strata)))
    point = metrics_1(ones), metrics_2(ones)
    drawn = [bootstrap(metrics, strata, resamples, seed) for metrics in (metrics_1, metrics_2)]
    rows = []
    for name in point[0]:
        value = point[0][name][0] - point[1][name][0]
        low, high = interval(value, drawn[0][name] - drawn[1][name], confidence)
        better = None
        if low > 0 or high < 0:
            better = first if (low > 0) == HIGHER_IS_BETTER[name] else second
        rows.append((first, second, name, value, low, high, better))
    columns = ["predictor", "versus", "metric", "difference", "low", "high", "better"]
    return pd.DataFrame(rows, columns=columns)


def read_predictions(path: Path | str) -> pd.DataFrame:
    """Read a `predictions.tsv` as `compute_metrics` takes it."""
    # Labels are text also where they look like numbers; `compute_metrics` makes numbers of them.
    columns = ("subject", "predictor", "y_true", "y_pred")
    return read_table(path, dtype=dict.fromkeys(columns, str))


def class_names(predictions: pd.DataFrame) -> list[str]:
    """The classes of a table of predictions, in order; none for regression."""
    columns = [str(column) for column in predictions.columns]
    return [c.removeprefix(PROBABILITY) for c in columns if c.startswith(PROBABILITY)]


def _predictors(
    predictions: pd.DataFrame,
) -> Iterator[tuple[str, Metrics, Ints]]:
    """Name, metrics and strata (true classes, or one stratum) of each predictor."""
    classes = class_names(predictions)
    for name, rows in predictions.groupby("predictor", sort=False):
        rows = rows.sort_values("subject")
        if classes:
            number = {label: k for k, label in enumerate(classes)}
            unknown = set(rows["y_true"].astype(str)) - set(number)
            if unknown:
                raise InputError(f"predictions of {name}: no column for class {min(unknown)!r}")
            true = np.asarray(rows["y_true"].astype(str).map(number), dtype=np.int64)
            columns = [PROBABILITY + label for label in classes]
            yield str(name), classification_metrics(true, rows[columns].to_numpy(float)), true
        else:
            truth, predicted = (
                np.asarray(rows[column].astype(float), dtype=np.float64)
                for column in ("y_true", "y_pred")
            )
            yield str(name), regression_metrics(truth, predicted), np.zeros(len(rows), np.int64)


def bootstrap(metrics: Metrics, strata: Ints, resamples: int, seed: int) -> dict[str, Floats]:
    """Metrics of resamples of the subjects, drawn within their `strata`: (resample, ...) each."""
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK // len(strata))
    blocks = []
    for start in range(0, resamples, step):
        weight = np.empty((min(step, resamples - start), len(strata)))
        for stratum in np.unique(strata):
            members = np.flatnonzero(strata == stratum)
            drawn = rng.integers(len(members), size=(len(weight), len(members)))
            drawn += len(members) * np.arange(len(weight))[:, None]
            counts = np.bincount(drawn.ravel(), minlength=weight.shape[0] * len(members))
            weight[:, members] = counts.reshape(len(weight), len(members))
        blocks.append(metrics(weight))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def interval(point: float, drawn: Floats, confidence: float) -> tuple[float, float]:
    """Percentiles over the resamples in which the metric is defined."""
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(point) or not len(drawn):
        return np.nan, np.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _centred(values: Floats, weight: Floats) -> Floats:
    """Values minus their weighted mean, exactly 0 where they are constant; (resample, subject)."""
    values = values - values[0]
    centred = values - (weight @ values / weight.sum(axis=1))[:, None]
    used = np.where(weight > 0, np.abs(centred), 0).max(axis=1, keepdims=True)
    rounding = 1e-12 * np.abs(values).max(initial=0)
    return np.where(used > rounding, centred, 0.0)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    result = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=result, where=denominator != 0)
