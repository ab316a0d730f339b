"""How likely a result is by chance: p values, as pure functions of predictions.

Design choices
--------------
- Against chance, the true labels are shuffled over the test subjects: what the predictor would get
  had its predictions nothing to do with them. One-sided, "as good as or better".
- Two predictors are compared on the same subjects, by swapping their predictions within a subject:
  under the null hypothesis it does not matter whose is whose. Two-sided. What a metric is blind to
  is taken out first, or else swapping would mix it in: scores become ranks for the AUROC (Bandos et
  al. 2005), predictions are standardised for Pearson's r.
- The observed arrangement counts as one of the permutations, so that no p is 0 (Phipson and Smyth
  2010): the smallest is 1 / (permutations + 1).
- Both are about the test subjects at hand, for predictors that are already trained. They say
  nothing of other training subjects or seeds.
- What is undefined (an AUROC with one class, the r of a constant) has no p: NaN.

Sources: Bandos, Rockette and Gur 2005 (doi:10.1002/sim.2149); Phipson and Smyth 2010
(doi:10.2202/1544-6115.1585).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Statistics = dict[str, Floats]
"""Of each metric, (permutation,) values; larger is better."""

BLOCK = 2_000_000
"""Values of a permutation that are held at once (16 MB in float64)."""
ROUNDING = 1e-9
"""Differences below it (of metrics, which are of the order of 1) are ties."""


def scored_classes(probability: Floats) -> list[int]:
    """Columns whose AUROCs are averaged: the positive one of two classes, else all."""
    return [1] if probability.shape[1] == 2 else list(range(probability.shape[1]))


def chance_of_classes(
    true: Ints, probability: Floats, permutations: int, seed: int
) -> dict[str, float]:
    """p of each metric of a classification against shuffled labels.

    Parameters
    ----------
    true
        (subject,) number of the true class.
    probability
        (subject, class).
    permutations, seed
        How many shuffles, and what seeds them.

    Returns
    -------
    dict
        `auroc`, `balanced_accuracy`, `accuracy`, `brier` -> p.
    """
    classes, predicted = np.unique(true), probability.argmax(axis=1)
    scored = [k for k in scored_classes(probability) if k in classes]
    ranks = {k: rankdata(probability[:, k]) for k in scored}

    def statistics(order: Ints) -> Statistics:
        labels = true[order]
        found = {k: (labels == k).astype(np.float64) for k in classes}
        hits = {k: found[k] @ (predicted == k) for k in classes}
        areas = [_area(labels == k, ranks[k][None]) for k in scored]
        return {
            "auroc": np.mean(areas, axis=0) if areas else np.full(len(order), np.nan),
            "balanced_accuracy": np.mean([hits[k] / (true == k).sum() for k in classes], axis=0),
            "accuracy": np.sum(list(hits.values()), axis=0) / len(true),
            # Of the Brier score, only the probability of the true class depends on the labels.
            "brier": np.sum([found[k] @ probability[:, k] for k in classes], axis=0) / len(true),
        }

    return _p_values(map(statistics, shuffles(len(true), permutations, seed)))


def chance_of_numbers(
    true: Floats, predicted: Floats, permutations: int, seed: int
) -> dict[str, float]:
    """p of `mae`, `pearson_r` and `r2` against shuffled labels; see `chance_of_classes`."""
    centred = _centre(true)

    def statistics(order: Ints) -> Statistics:
        error = true[order] - predicted
        return {
            "mae": -np.abs(error).mean(axis=1),
            "pearson_r": _correlation(centred[order], predicted[None]),
            "r2": 1 - (error**2).sum(axis=1) / _or_nan((centred**2).sum()),
        }

    return _p_values(map(statistics, shuffles(len(true), permutations, seed)))


def compare_classes(
    true: Ints, first: Floats, second: Floats, permutations: int, seed: int
) -> dict[str, float]:
    """p of the difference of two classifications of the same subjects, by swapping within them.

    Parameters
    ----------
    true
        (subject,) number of the true class.
    first, second
        (subject, class) probabilities.
    permutations, seed
        How many arrangements, and what seeds them.

    Returns
    -------
    dict
        `auroc`, `balanced_accuracy`, `accuracy`, `brier` -> p.
    """
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

    return _p_values(map(statistics, swaps(len(true), permutations, seed)), two_sided=True)


def compare_numbers(
    true: Floats, first: Floats, second: Floats, permutations: int, seed: int
) -> dict[str, float]:
    """p of the difference in `mae`, `pearson_r` and `r2` of two regressions; (subject,) each."""
    spread = _or_nan((_centre(true) ** 2).sum())
    absolute = np.abs(true - first) - np.abs(true - second)
    squared = (true - first) ** 2 - (true - second) ** 2
    centred = _centre(true)[None]
    x, y = _standardise(first), _standardise(second)

    def statistics(swap: npt.NDArray[np.bool_]) -> Statistics:
        sign = 1.0 - 2.0 * swap
        one, other = np.where(swap, y, x), np.where(swap, x, y)
        return {
            "mae": -sign @ absolute / len(true),
            "pearson_r": _correlation(centred, one) - _correlation(centred, other),
            "r2": -sign @ squared / spread,
        }

    return _p_values(map(statistics, swaps(len(true), permutations, seed)), two_sided=True)


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


def shuffles(n: int, permutations: int, seed: int) -> Iterator[Ints]:
    """Orders of n subjects in blocks, (permutation, subject); the first is the observed one."""
    rng = np.random.default_rng(seed)
    for size, start in _blocks(n, permutations):
        order = rng.permuted(np.tile(np.arange(n), (size, 1)), axis=1)
        if start == 0:
            order[0] = np.arange(n)
        yield order


def swaps(n: int, permutations: int, seed: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Whom to swap, in blocks (permutation, subject); the first arrangement swaps nobody."""
    rng = np.random.default_rng(seed)
    for size, start in _blocks(n, permutations):
        swap = rng.random((size, n)) < 0.5
        if start == 0:
            swap[0] = False
        yield swap


def _blocks(n: int, permutations: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // n)
    for start in range(0, permutations + 1, step):
        yield min(step, permutations + 1 - start), start


def _p_values(blocks: Iterator[Statistics], two_sided: bool = False) -> dict[str, float]:
    """The share of arrangements that are as good as the first, which is the observed one."""
    found = list(blocks)
    p = {}
    for name in found[0]:
        values = np.concatenate([block[name] for block in found])
        values = np.abs(values) if two_sided else values
        as_good = values >= values[0] - ROUNDING
        p[name] = float(as_good.mean()) if np.isfinite(values[0]) else np.nan
    return p


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
    y = y - y[:, :1]
    y = y - y.mean(axis=1, keepdims=True)
    size = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    return (x * y).sum(axis=1) / _or_nan(size)


def _centre(values: Floats) -> Floats:
    """Values minus their mean, exactly 0 where they are constant."""
    shifted = values - values[0]
    return shifted - shifted.mean()


def _standardise(values: Floats) -> Floats:
    centred = _centre(values)
    spread = centred.std()
    return centred / spread if spread > 0 else centred


def _or_nan(value: npt.ArrayLike) -> Floats:
    """NaN in the place of 0, by which nothing can be divided."""
    array = np.asarray(value, dtype=np.float64)
    return np.where(array == 0, np.nan, array)
