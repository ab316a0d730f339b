"""Metrics, their intervals and their p values, computed from predictions and nothing else.

Design choices
--------------
- Intervals are percentiles over resamples of the test subjects. For classification subjects are
  drawn within their true class, so that every resample has the classes of the test set. They tell
  how much the figure depends on who was tested; not on who was trained, nor on the seed.
- The calibration error of a resample is too large: it cannot be below 0, so all noise adds to it,
  and a resample has that of its sample and its own. Its draws are moved by their mean's distance
  from the value (ours; Efron and Tibshirani 1993, chapter 10, estimate a bias in this way). What
  that noise adds to the value itself stays.
- All predictors see the same resamples, so that a difference between two is of the same subjects.
- p values are by permutation (`neuromamba.statistics`). The calibration error, which is no measure
  of skill, has none.
- Under cross-validation a metric is the mean over folds of its value within a fold, never of pooled
  scores, and a difference that of the differences within the folds in which both predictors have a
  value (`neuromamba.predictors` says why). What is drawn is a subject, with its rows in all
  repeats. A difference is then claimed only where the corrected resampled t-test over the folds
  agrees (`neuromamba.resampled`): it is the one that is also about other training subjects.
- Of states a subject has a row for each. It is drawn with all of them, from all subjects, and its
  labels are shuffled among them.
- What is undefined is missing, not a number: the correlation of a constant prediction, the AUROC
  of a test set with one class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from neuromamba.predictors import PROBABILITY as PROBABILITY
from neuromamba.predictors import Predictor, read_predictors, refuse_unlike
from neuromamba.predictors import class_names as class_names
from neuromamba.resampled import held_out_ratio, resampled_t_test
from neuromamba.tables import read_table
from neuromamba.weighted_metrics import Floats, Ints
from neuromamba.weighted_metrics import Metrics as Metrics

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
BIASED = "ece"
"""The metric that resampling makes larger."""
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
        Under cross-validation `fold`, too, and a row for each fold that tests a subject. Of states
        `state`, too, which is `y_true`, and a row for each state of a subject.
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
    for name, found in read_predictors(predictions).items():
        point = found.metrics(np.ones((1, found.n_subjects)))
        drawn = bootstrap(found.metrics, found.strata, resamples, seed)
        p = found.against_chance(permutations, seed)
        for metric, value in point.items():
            low, high = interval(value[0], drawn[metric], confidence)
            # A metric may be defined by convention where its test is not.
            known = p.get(metric, np.nan) if np.isfinite(value[0]) else np.nan
            rows.append((name, metric, value[0], low, high, known, found.n_subjects))
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
        `p` (two-sided, not corrected), `p_resampled` (of the corrected resampled t-test over the
        folds; missing for a holdout), `better`: `first` or `second` where the interval leaves out 0
        and every p is at most 1 - confidence (smaller is better for an error), missing elsewhere.

    Raises
    ------
    InputError
        When the two were not tested on the same subjects in the same folds.
    """
    found = read_predictors(predictions)
    one, other = found[first], found[second]
    refuse_unlike(first, one, second, other)
    p = one.against(other, permutations, seed)
    over_folds = {} if one.is_holdout else p_over_folds([(one, other)])
    rows = []
    for name, (value, low, high) in difference(one, other, resamples, confidence, seed).items():
        known, resampled = (
            tested.get(name, np.nan) if name in p and np.isfinite(value) else np.nan
            for tested in (p, over_folds)
        )
        claimed = [known] if one.is_holdout else [known, resampled]
        winner = first if (low > 0) == HIGHER_IS_BETTER[name] else second
        better = winner if is_shown(low, high, claimed, confidence) else None
        rows.append((first, second, name, value, low, high, known, resampled, better))
    columns = ["predictor", "versus", "metric", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "p", "p_resampled", "better"])


def difference(
    one: Predictor, other: Predictor, resamples: int, confidence: float, seed: int
) -> dict[str, tuple[float, float, float]]:
    """Difference of each metric of two predictors, and its interval by paired resamples."""
    apart = one.minus(other)
    drawn = bootstrap(apart, one.strata, resamples, seed)
    found = {}
    for name, (value,) in apart(np.ones((1, one.n_subjects))).items():
        found[name] = value, *interval(value, drawn[name], confidence)
    return found


def p_over_folds(pairs: Sequence[tuple[Predictor, Predictor]]) -> dict[str, float]:
    """p of each metric by the corrected resampled t-test, two predictors in the same folds.

    Of several pairs, which are of several seeds, the differences are averaged first: other seeds
    are no other training subjects.
    """
    folds, n = pairs[0][0].folds, len(pairs[0][0].subjects)
    ratio = held_out_ratio([len(who) for who in folds.values()], n)
    values = [(one.by_fold(), other.by_fold()) for one, other in pairs]
    return {
        name: resampled_t_test(
            np.mean([first[name] - second[name] for first, second in values], axis=0), ratio
        )
        for name in values[0][0]
    }


def is_shown(low: float, high: float, p: Sequence[float], confidence: float) -> bool:
    """Whether an interval leaves out 0 and every p is small enough; NaN never is."""
    return (low > 0 or high < 0) and all(each <= 1 - confidence for each in p)


def read_predictions(path: Path | str) -> pd.DataFrame:
    """Read a `predictions.tsv` as `compute_metrics` takes it."""
    # Labels are text also where they look like numbers; `compute_metrics` makes numbers of them.
    columns = ("subject", "state", "predictor", "fold", "y_true", "y_pred")
    return read_table(path, dtype=dict.fromkeys(columns, str))


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
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    if BIASED in found:
        found[BIASED] = _unbiased(metrics(np.ones((1, len(strata))))[BIASED], found[BIASED])
    return found


def _unbiased(value: Floats, drawn: Floats) -> Floats:
    """Draws about the value in place of about their mean; not below 0 where no draw was."""
    defined = np.isfinite(drawn)
    if not defined.any():
        return drawn
    moved = drawn + (value - drawn[defined].mean())
    return np.maximum(moved, 0.0) if (drawn[defined] >= 0).all() else moved


def interval(point: float, drawn: Floats, confidence: float) -> tuple[float, float]:
    """Percentiles over the resamples in which the metric is defined."""
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(point) or not len(drawn):
        return np.nan, np.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
