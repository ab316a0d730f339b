"""Arrangements of the test subjects, and the share of them that is as good as the observed one.

An arrangement is of subjects: where folds of a cross-validation test the same subjects several
times, all rows of a subject are arranged alike. The observed arrangement counts as one of them, so
that no p is 0 (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585): the smallest is
1 / (permutations + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Statistics = dict[str, Floats]
"""Of each metric, (permutation,) values; larger is better."""
Test = Callable[[npt.NDArray[Any]], Statistics]
"""From what is arranged, (permutation, subject), to the statistics of each arrangement."""

BLOCK = 2_000_000
"""Values of a permutation that are held at once (16 MB in float64)."""
ROUNDING = 1e-9
"""Differences below it (of metrics, which are of the order of 1) are ties."""


def shuffles(n: int, permutations: int, seed: int, people: Ints | None = None) -> Iterator[Ints]:
    """Orders of n subjects in blocks, (permutation, subject); the first is the observed one.

    Where several of the n are of one subject, whose numbers `people` are, they are shuffled within
    the subject.
    """
    rng = np.random.default_rng(seed)
    for size, start in _blocks(n, permutations):
        order = rng.permuted(np.tile(np.arange(n), (size, 1)), axis=1)
        if people is not None:
            # Sorted by subject, but within one still at random, they go to the subject's places.
            drawn = np.take_along_axis(order, people[order].argsort(axis=1, kind="stable"), axis=1)
            order = np.empty_like(drawn)
            order[:, people.argsort(kind="stable")] = drawn
        if start == 0:
            order[0] = np.arange(n)
        yield order


def swaps(
    n: int, permutations: int, seed: int, people: Ints | None = None
) -> Iterator[npt.NDArray[np.bool_]]:
    """Whom to swap, in blocks (permutation, subject); the first arrangement swaps nobody.

    Where several of the n are of one subject (see `shuffles`), they are swapped together.
    """
    rng = np.random.default_rng(seed)
    drawn = n if people is None else int(people.max()) + 1
    for size, start in _blocks(n, permutations):
        swap = rng.random((size, drawn)) < 0.5
        if start == 0:
            swap[0] = False
        yield swap if people is None else swap[:, people]


def p_values(blocks: Iterator[Statistics], two_sided: bool = False) -> dict[str, float]:
    """The share of arrangements that are as good as the first, which is the observed one."""
    found = list(blocks)
    p = {}
    for name in found[0]:
        values = np.concatenate([block[name] for block in found])
        values = np.abs(values) if two_sided else values
        as_good = values >= values[0] - ROUNDING
        p[name] = float(as_good.mean()) if np.isfinite(values[0]) else np.nan
    return p


def mean_over_folds(folds: Sequence[Ints], tests: Sequence[Test]) -> Test:
    """The mean over folds of the statistics within them.

    Parameters
    ----------
    folds
        (row,) numbers of the subjects of each fold.
    tests
        Of each fold, from (permutation, row).
    """

    def mean(arranged: npt.NDArray[Any]) -> Statistics:
        found = [test(arranged.take(who, axis=1)) for who, test in zip(folds, tests, strict=True)]
        return {name: mean_of_defined([each[name] for each in found]) for name in found[0]}

    return mean


def mean_of_defined(values: npt.ArrayLike | Sequence[npt.ArrayLike]) -> Floats:
    """Mean over the first axis of what is no NaN; NaN where nothing is."""
    stacked = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(stacked)
    count = known.sum(axis=0)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def split_rows(rows: npt.NDArray[Any], folds: Sequence[Ints]) -> list[npt.NDArray[Any]]:
    """The rows of each fold, which follow each other."""
    return np.split(rows, np.cumsum([len(who) for who in folds])[:-1])


def _blocks(n: int, permutations: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // n)
    for start in range(0, permutations + 1, step):
        yield min(step, permutations + 1 - start), start
