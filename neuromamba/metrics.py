"""Metrics, their intervals and their p values, computed from predictions and nothing else.

Design choices
--------------
- Intervals are percentiles over resamples of the test subjects. For classification subjects are
  drawn within their true class, so that every resample has the classes of the test set. They tell
  how much the figure depends on who was tested; not on who was trained, nor on the seed.
- All predictors see the same resamples, so that a difference between two is of the same subjects.
- p values are by permutation (`neuromamba.statistics`). The calibration error, which is no measure
  of skill, has none.
- What is undefined is missing, not a number: the correlation of a constant prediction, the AUROC
  of a test set with one class.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba import statistics
from neuromamba.files import InputError
from neuromamba.tables import read_table
from neuromamba.weighted_metrics import (
    Floats,
    Ints,
    classification_metrics,
    regression_metrics,
)
from neuromamba.weighted_metrics import Metrics as Metrics

PROBABILITY = "prob_"
HIGHER_IS_BETTER = {
    "auroc": True,
    "balanced_accuracy": True,
    "accuracy": True,
    "brier": False,
    "ece": False,
    "mae": False,
    "pearson_r": True,
    "r2": True,
}
BLOCK = 2_000_000
"""Weights held at once (16 MB in float64)."""


def compute_metrics(
    predictions: pd.DataFrame,
    resamples: int,
    confidence: float,
    seed: int,
    permutations: int,
) -> pd.DataFrame:
    """Every metric of every predictor in a table of predictions.

    Parameters
    ----------
    predictions
        Columns `subject`, `predictor`, `y_true`, `y_pred` and, for classification, one column
        `prob_<class>` per class, the positive class last. Every predictor has the same subjects.
    resamples, confidence, seed
        Bootstrap resamples, coverage of the percentile intervals, and what seeds them.
    permutations
        Shuffles of the labels for p.

    Returns
    -------
    pandas.DataFrame
        Columns `predictor`, `metric`, `value`, `low`, `high`, `p` (against chance, one-sided), `n`
        (subjects).
    """
    rows = []
    for name, found in _predictors(predictions).items():
        point = found.metrics(np.ones((1, len(found.true))))
        drawn = bootstrap(found.metrics, found.strata, resamples, seed)
        p = found.against_chance(permutations, seed)
        for metric, value in point.items():
            low, high = interval(value[0], drawn[metric], confidence)
            # A metric may be defined by convention where its test is not.
            known = p.get(metric, np.nan) if np.isfinite(value[0]) else np.nan
            rows.append((name, metric, value[0], low, high, known, len(found.true)))
    columns = ["predictor", "metric", "value", "low", "high", "p", "n"]
    return pd.DataFrame(rows, columns=columns)


def compare(
    predictions: pd.DataFrame,
    first: str,
    second: str,
    resamples: int,
    confidence: float,
    seed: int,
    permutations: int,
) -> pd.DataFrame:
    """Difference `first - second` in each metric, with a paired bootstrap interval and a paired p.

    Returns
    -------
    pandas.DataFrame
        Columns `predictor` (`first`), `versus` (`second`), `metric`, `difference`, `low`, `high`,
        `p` (two-sided, not corrected), `better`: `first` or `second` where the interval leaves out
        0 and p is at most 1 - confidence (smaller is better for an error), missing elsewhere.
    """
    found = _predictors(predictions)
    one, other = found[first], found[second]
    ones = np.ones((1, len(one.true)))
    point = one.metrics(ones), other.metrics(ones)
    drawn = [bootstrap(each.metrics, one.strata, resamples, seed) for each in (one, other)]
    p = one.against(other, permutations, seed)
    rows = []
    for name in point[0]:
        value = point[0][name][0] - point[1][name][0]
        low, high = interval(value, drawn[0][name] - drawn[1][name], confidence)
        known = p.get(name, np.nan) if np.isfinite(value) else np.nan
        better = None
        if (low > 0 or high < 0) and known <= 1 - confidence:
            better = first if (low > 0) == HIGHER_IS_BETTER[name] else second
        rows.append((first, second, name, value, low, high, known, better))
    columns = ["predictor", "versus", "metric", "difference", "low", "high", "p", "better"]
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


@dataclass(frozen=True)
class _Predictor:
    """What one predictor says of the subjects, in their order.

    Attributes
    ----------
    true
        (subject,) number of the true class, or true value.
    predicted
        (subject, class) probabilities, or (subject,) values.
    """

    true: npt.NDArray[Any]
    predicted: Floats

    @property
    def metrics(self) -> Metrics:
        make = classification_metrics if self.predicted.ndim == 2 else regression_metrics
        return make(self.true, self.predicted)

    @property
    def strata(self) -> Ints:
        return self.true if self.predicted.ndim == 2 else np.zeros(len(self.true), np.int64)

    def against_chance(self, permutations: int, seed: int) -> dict[str, float]:
        classes = self.predicted.ndim == 2
        test = statistics.chance_of_classes if classes else statistics.chance_of_numbers
        return test(self.true, self.predicted, permutations, seed)

    def against(self, other: _Predictor, permutations: int, seed: int) -> dict[str, float]:
        classes = self.predicted.ndim == 2
        test = statistics.compare_classes if classes else statistics.compare_numbers
        return test(self.true, self.predicted, other.predicted, permutations, seed)


def _predictors(predictions: pd.DataFrame) -> dict[str, _Predictor]:
    """Each predictor by name, subjects sorted."""
    classes = class_names(predictions)
    number = {label: k for k, label in enumerate(classes)}
    found = {}
    for name, rows in predictions.groupby("predictor", sort=False):
        rows = rows.sort_values("subject")
        if classes:
            unknown = set(rows["y_true"].astype(str)) - set(number)
            if unknown:
                raise InputError(f"predictions of {name}: no column for class {min(unknown)!r}")
            true = np.asarray(rows["y_true"].astype(str).map(number), dtype=np.int64)
            probability = rows[[PROBABILITY + label for label in classes]].to_numpy(float)
            found[str(name)] = _Predictor(true, probability)
        else:
            truth, predicted = (
                np.asarray(rows[column].astype(float), dtype=np.float64)
                for column in ("y_true", "y_pred")
            )
            found[str(name)] = _Predictor(truth, predicted)
    return found


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
