"""How likely a result is by chance: p values, as pure functions of predictions.

Design choices
--------------
- Against chance, the true labels are shuffled over the test subjects: what the predictor would get
  had its predictions nothing to do with them. One-sided, "as good as or better".
- Two predictors are compared on the same subjects, by swapping their predictions within a subject:
  under the null hypothesis it does not matter whose is whose. Two-sided. What a metric is blind to
  is taken out first, or else swapping would mix it in: scores become ranks for the AUROC (Bandos et
  al. 2005), predictions are standardised for Pearson's r.
- Under cross-validation the statistic is the mean over folds of the metric within a fold, ranks
  and standardised values being the fold's own. A subject has one label in all repeats, and is
  swapped in all of them or in none. Swapping ranks is approximate, and needs folds of some size: of
  two scores as good as each other 13 % had p <= 0.1 with 10 subjects a fold, 10 % with 20.
- Of states a subject has several labels, and a row for each: they are shuffled within the subject,
  and swapped all together.
- Both are about the test subjects at hand, for predictors that are already trained. They say
  nothing of other training subjects or seeds: `neuromamba.resampled` does, of other folds. Under
  cross-validation, whose test subjects have trained the models of other folds, p against chance is
  too small: of classifiers of noise (60 subjects, 5 folds, 1 or 4 repeats) 13 % had p <= 0.05. It
  would take training anew on shuffled labels to mend that; the comparison with the majority or the
  mean, which asks for the resampled test too, is the one to go by.
- What is undefined (an AUROC with one class, the r of a constant) has no p: NaN.

Source: Bandos, Rockette and Gur 2005 (doi:10.1002/sim.2149).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from neuromamba.permutations import (
    Floats,
    Ints,
    Statistics,
    Test,
    mean_of_defined,
    mean_over_folds,
    p_values,
    shuffles,
    split_rows,
    swaps,
)

Folds = Sequence[Ints]
"""(row,) numbers of the subjects of each fold; predictions have a row for each, fold by fold."""


def scored_classes(probability: Floats) -> list[int]:
    """Columns whose AUROCs are averaged: the positive one of two classes, else all."""
    return [1] if probability.shape[1] == 2 else list(range(probability.shape[1]))


def p_of_chance(
    true: npt.NDArray[Any],
    predicted: Floats,
    permutations: int,
    seed: int,
    folds: Folds | None = None,
    people: Ints | None = None,
) -> dict[str, float]:
    """p of each metric against shuffled labels.

    Parameters
    ----------
    true
        (subject,) number of the true class, or true value.
    predicted
        (row, class) probabilities, or (row,) values.
    permutations, seed
        How many arrangements, and what seeds them.
    folds
        Whose the rows are; `None`: the subjects, tested once.
    people
        (subject,) where the `subjects` are parts of the data of fewer people, such as their states:
        the number of each one's person, from 0. Labels are then shuffled within people.

    Returns
    -------
    dict
        `auroc`, `balanced_accuracy`, `accuracy`, `brier` of classes, `mae`, `pearson_r`, `r2` of
        values -> p.
    """
    folds = [np.arange(len(true))] if folds is None else folds
    classes = np.unique(true) if predicted.ndim == 2 else None
    tests = [
        _numbers_of_a_fold(part) if classes is None else _classes_of_a_fold(part, classes)
        for part in split_rows(predicted, folds)
    ]
    test, orders = mean_over_folds(folds, tests), shuffles(len(true), permutations, seed, people)
    return p_values(test(true[order]) for order in orders)


def p_of_difference(
    true: npt.NDArray[Any],
    first: Floats,
    second: Floats,
    permutations: int,
    seed: int,
    folds: Folds | None = None,
    people: Ints | None = None,
) -> dict[str, float]:
    """p of the difference of two predictors of the same subjects, by swapping within them.

    Parameters and results are those of `p_of_chance`, with the predictions `first` and `second`.
    All of a person is swapped, or nothing.
    """
    folds = [np.arange(len(true))] if folds is None else folds
    two = _two_of_classes if first.ndim == 2 else _two_of_numbers
    parts = zip(folds, split_rows(first, folds), split_rows(second, folds), strict=True)
    test = mean_over_folds(folds, [two(true[who], *both) for who, *both in parts])
    return p_values(map(test, swaps(len(true), permutations, seed, people)), two_sided=True)


def _classes_of_a_fold(probability: Floats, classes: Ints) -> Test:
    predicted = probability.argmax(axis=1)
    scored = [k for k in scored_classes(probability) if k in classes]
    ranks = {k: rankdata(probability[:, k]) for k in scored}
    n = len(probability)

    def statistics(labels: Ints) -> Statistics:
        found = {k: (labels == k).astype(np.float64) for k in classes}
        hits = {k: found[k] @ (predicted == k) for k in classes}
        areas = [_area(labels == k, ranks[k][None]) for k in scored]
        recalls = [hits[k] / _or_nan(found[k].sum(axis=1)) for k in classes]
        return {
            # Like the metrics, over the classes that occur.
            "auroc": mean_of_defined(areas) if areas else np.full(len(labels), np.nan),
            "balanced_accuracy": mean_of_defined(recalls),
            "accuracy": np.sum(list(hits.values()), axis=0) / n,
            # Of the Brier score, only the probability of the true class depends on the labels.
            "brier": np.sum([found[k] @ probability[:, k] for k in classes], axis=0) / n,
        }

    return statistics


def _numbers_of_a_fold(predicted: Floats) -> Test:
    def statistics(labels: Floats) -> Statistics:
        error, centred = labels - predicted, _centre(labels)
        return {
            "mae": -np.abs(error).mean(axis=1),
            "pearson_r": _correlation(centred, predicted[None]),
            "r2": 1 - (error**2).sum(axis=1) / _or_nan((centred**2).sum(axis=1)),
        }

    return statistics


def _two_of_classes(true: Ints, first: Floats, second: Floats) -> Test:
    classes, rows = np.unique(true), np.arange(len(true))
    right = [(p.argmax(axis=1) == true).astype(float) for p in (first, second)]
    hits = right[0] - right[1]
    truth = np.eye(first.shape[1])[true]
    loss = ((first - truth) ** 2).sum(axis=1) - ((second - truth) ** 2).sum(axis=1)
    scored = [k for k in scored_classes(first) if k in classes]
    ranks = {k: (rankdata(first[:, k]), rankdata(second[:, k])) for k in scored}

    def statistics(swap: npt.NDArray[np.bool_]) -> Statistics:
        sign = 1.0 - 2.0 * swap
        recalls = [sign[:, rows[true == k]] @ hits[true == k] / (true == k).sum() for k in classes]
        areas = [_difference_of_areas(true == k, *ranks[k], swap) for k in scored]
        return {
            "auroc": np.mean(areas, axis=0) if areas else np.full(len(swap), np.nan),
            "balanced_accuracy": np.mean(recalls, axis=0),
            "accuracy": sign @ hits / len(true),
            "brier": -sign @ loss / len(true),
        }

    return statistics


def _two_of_numbers(true: Floats, first: Floats, second: Floats) -> Test:
    centred = _centre(true[None])
    spread = _or_nan((centred**2).sum())
    absolute = np.abs(true - first) - np.abs(true - second)
    squared = (true - first) ** 2 - (true - second) ** 2
    x, y = _standardise(first), _standardise(second)

    def statistics(swap: npt.NDArray[np.bool_]) -> Statistics:
        sign = 1.0 - 2.0 * swap
        one, other = np.where(swap, y, x), np.where(swap, x, y)
        return {
            "mae": -sign @ absolute / len(true),
            "pearson_r": _correlation(centred, one) - _correlation(centred, other),
            "r2": -sign @ squared / spread,
        }

    return statistics


def correct(p: Sequence[float] | Floats) -> Floats:
    """p values (test,) corrected for their number by Holm, NaN left out of it and kept."""
    values = np.asarray(p, dtype=np.float64)
    known = np.isfinite(values)
    corrected = np.full(values.shape, np.nan)
    if known.any():
        corrected[known] = _holm(values[known])
    return corrected


def _holm(p: Floats) -> Floats:
    """Holm 1979, which scipy does not have: the k-th smallest of n times n - k, never falling."""
    order = np.argsort(p)
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1)
    return corrected


def _area(positive: npt.NDArray[np.bool_], ranks: Floats) -> Floats:
    """AUROC by the ranks of the scores; both (permutation, subject), or one row for all."""
    up = positive.sum(axis=-1)
    total = np.einsum("ij,ij->i", *np.broadcast_arrays(positive.astype(float), ranks))
    pairs = up * (positive.shape[-1] - up)
    return (total - up * (up + 1) / 2) / _or_nan(pairs)


def _difference_of_areas(
    positive: npt.NDArray[np.bool_], first: Floats, second: Floats, swap: npt.NDArray[np.bool_]
) -> Floats:
    areas = [
        _area(positive[None], rankdata(np.where(swap, a, b), axis=1))
        for a, b in ((second, first), (first, second))
    ]
    return areas[0] - areas[1]


def _correlation(x: Floats, y: Floats) -> Floats:
    """Pearson r of rows, of which `x` is centred; NaN where one is constant."""
    y = _centre(y)
    size = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return (x * y).sum(axis=1) / _or_nan(size)


def _centre(values: Floats) -> Floats:
    """Rows minus their mean, exactly 0 where they are constant."""
    shifted = values - values[:, :1]
    return shifted - shifted.mean(axis=1, keepdims=True)


def _standardise(values: Floats) -> Floats:
    centred = _centre(values[None])[0]
    spread = centred.std()
    return centred / spread if spread > 0 else centred


def _or_nan(value: npt.ArrayLike) -> Floats:
    """NaN in the place of 0, by which nothing can be divided."""
    array = np.asarray(value, dtype=np.float64)
    return np.where(array == 0, np.nan, array)
