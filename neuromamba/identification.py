"""Which subject is it? How well two occasions of each subject find each other among all.

Design choices
--------------
- Two occasions are as similar as Pearson's r of their features, over the features that both have:
  a ROI that a scan lacks must not identify it. Where r is not defined the similarity is 0.
- A subject is identified where the second occasion that is most similar to its first is its own,
  and the other way round; the two directions are averaged (Finn et al. 2015). Of ties each is as
  good as the others, so that a predictor which cannot tell anybody apart gets 1 / n.
- Percentile rank: the share of the others that are less similar than a subject's own. It hardly
  depends on how many subjects there are, while accuracy falls with their number.
- Idiff, differential identifiability: the mean similarity to oneself minus that to others, times
  100 (Amico and Goni 2018). What features have in common in everybody makes it small, so it
  compares two data sets better than two predictors.
- Intervals are by bootstrap over the subjects who are looked for; those to choose from stay all of
  them, as a subject drawn twice would be its own double. p is by permutation of whose second
  occasion is whose, one-sided.

Sources: Finn et al. 2015 (doi:10.1038/nn.4135); Amico and Goni 2018
(doi:10.1038/s41598-018-25089-1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from neuromamba.metrics import bootstrap, interval
from neuromamba.permutations import Floats, Ints, p_values, shuffles
from neuromamba.weighted_metrics import Metrics

MEASURES = ("accuracy", "mean_rank", "percentile_rank", "idiff")
BLOCK = 16_000_000
"""Features of a block: 128 MB in float64. Two blocks are held, with what of them is present and
what is made of them: at most eight times as much, 1 GB."""
DECIMALS = 12
"""Of a similarity; what is beyond depends on the order of a sum, and would break ties by it."""


def similarity(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> Floats:
    """Pearson's r of each first with each second occasion: (subject, subject).

    Parameters
    ----------
    first, second
        (subject, feature), NaN where a feature is missing; arrays on disk are read block by block.
    """
    n, width = first.shape
    step = max(1, BLOCK // width)
    found = np.empty((n, len(second)))
    for row in range(0, n, step):
        one = _centred(first[row : row + step])
        for column in range(0, len(second), step):
            other = _centred(second[column : column + step])
            found[row : row + step, column : column + step] = _correlation(one, other)
    return np.asarray(np.round(np.nan_to_num(found), DECIMALS), dtype=np.float64)


def _centred(values: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
    """Rows minus their means with 0 for what is missing, and 1 where nothing is."""
    rows = np.array(values, dtype=np.float64)
    present = np.isfinite(rows)
    rows[~present] = 0
    mean = rows.sum(axis=1, keepdims=True) / np.maximum(present.sum(axis=1, keepdims=True), 1)
    rows = np.where(present, rows - mean, 0)
    # What rounding leaves of a constant row is no signal.
    rows[np.abs(rows).max(axis=1) <= 1e-12 * np.abs(mean[:, 0])] = 0
    return rows, present.astype(np.float64)


def _correlation(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> Floats:
    """r of each row of one with each row of the other, over what both have."""
    (x, has_x), (y, has_y) = one, other
    count = has_x @ has_y.T
    sum_x, sum_y = x @ has_y.T, has_x @ y.T
    with np.errstate(invalid="ignore", divide="ignore"):
        spread_x = x**2 @ has_y.T - sum_x**2 / count
        spread_y = has_x @ (y**2).T - sum_y**2 / count
        return (x @ y.T - sum_x * sum_y / count) / np.sqrt(spread_x * spread_y)


def identify(
    similar: Floats, resamples: int, confidence: float, seed: int, permutations: int
) -> dict[str, Any]:
    """Every measure of one predictor.

    Parameters
    ----------
    similar
        (subject, subject) similarity of first with second occasions; own ones on the diagonal.
    resamples, confidence, seed, permutations
        As `neuromamba.metrics.compute_metrics` takes them.

    Returns
    -------
    dict
        `n` subjects, `chance` = 1 / n, and of each of `MEASURES` its value, `<name>_low`,
        `<name>_high` and `<name>_p`: `accuracy` from 0 to 1, `mean_rank` from 1 to n,
        `percentile_rank` (median over subjects) from 0 to 100 where chance is 50, `idiff`.
    """
    n = len(similar)
    hit, rank = _placements(similar)
    own = np.diag(similar)
    # Of both directions: what is a subject's first in the rows is its second in the columns.
    others = (similar.sum(axis=0) + similar.sum(axis=1) - 2 * own) / (2 * (n - 1))
    measures = _measures(np.diag(hit), np.diag(rank), own - others)
    point = measures(np.ones((1, n)))
    drawn = bootstrap(measures, np.zeros(n, np.int64), resamples, seed)
    p = _against_chance(similar, hit, rank, permutations, seed)
    found: dict[str, Any] = {"n": n, "chance": 1 / n}
    for name in MEASURES:
        value = float(point[name][0])
        low, high = interval(value, drawn[name], confidence)
        bounds = {f"{name}_low": low, f"{name}_high": high}
        found |= {name: value, **bounds, f"{name}_p": p[name]}
    return found


def _placements(similar: Floats) -> tuple[Floats, Floats]:
    """Of every pair of occasions: would it be found, and at what rank, mean of both directions."""
    hits, ranks = [], []
    for rows in (similar, similar.T):
        best = rows == rows.max(axis=1, keepdims=True)
        hits.append(best / best.sum(axis=1, keepdims=True))
        ranks.append(rankdata(-rows, axis=1))
    return (hits[0] + hits[1].T) / 2, (ranks[0] + ranks[1].T) / 2


def _measures(hit: Floats, rank: Floats, difference: Floats) -> Metrics:
    """The measures as a function of weights (resample, subject), from values of the subjects."""
    order = np.argsort(rank, kind="stable")
    n = len(rank)

    def measures(weight: Floats) -> dict[str, Floats]:
        total = weight.sum(axis=1)
        below = np.cumsum(weight[:, order], axis=1)
        # The median, or the mean of the two in the middle.
        middle = [
            rank[order][place.argmax(axis=1)]
            for place in (below >= total[:, None] / 2, below > total[:, None] / 2)
        ]
        return {
            "accuracy": weight @ hit / total,
            "mean_rank": weight @ rank / total,
            "percentile_rank": _percentile(np.mean(middle, axis=0), n),
            "idiff": 100 * (weight @ difference) / total,
        }

    return measures


def _percentile(rank: Floats, n: int) -> Floats:
    return 100 * (n - rank) / (n - 1)


def _against_chance(
    similar: Floats, hit: Floats, rank: Floats, permutations: int, seed: int
) -> dict[str, float]:
    """p of each measure: how often it is as good when the second occasions are shuffled."""
    n, total = len(similar), similar.sum()
    rows = np.arange(n)

    def measures(order: Ints) -> dict[str, Floats]:
        own = similar[rows, order].sum(axis=1)
        ranks = rank[rows, order]
        return {
            "accuracy": hit[rows, order].mean(axis=1),
            "mean_rank": -ranks.mean(axis=1),
            "percentile_rank": _percentile(np.median(ranks, axis=1), n),
            "idiff": own / n - (total - own) / (n * (n - 1)),
        }

    return p_values(map(measures, shuffles(n, permutations, seed)))
