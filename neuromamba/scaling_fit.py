"""Power laws of loss against compute, how sure they are, and what may be said of them.

Sources: Kaplan et al., arXiv 2001.08361, equation 1.3 (L = (C_c / C)^alpha on the frontier of the
trainings that use their compute best) and Hoffmann et al., arXiv 2203.15556 (a loss that no compute
removes). NeuroMamba's paper shows a scaling law but does not give its fit, so all of this is our
choice:

- A point is a model on a share of the subjects; its loss is the mean over seeds.
- The frontier is the points whose loss is lower than that of every point of less or equal compute.
- A law is fitted by least squares in log loss: a C^-b, a straight line against log compute. From
  `MIN_FLOOR` points on, a C^-b + c is tried too, and taken where its AICc is lower by `MIN_GAIN`
  and c is not pressed against the lowest loss.
- Intervals are percentiles over resamples of the points and of the seeds within each, with the
  frontier drawn anew each time. They tell how much depends on which trainings there happen to be,
  not on the subjects that the loss was measured on.
- A frontier falls by construction, also where the loss has nothing to do with compute, and it is
  none where a training passes below it on its way. A power law is claimed only where `judge` finds
  nothing against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

MIN_FIT = 3
"""Fewer different amounts of compute than this are not fitted at all."""
MIN_FLOOR = 6
MIN_GAIN = 4.0
MOST_FLOOR = 0.999
"""Of the lowest loss."""

# What a claim takes: points on the frontier, decades of compute, variance of log loss explained,
# and how many times the interval's lower end its upper end may be.
MIN_POINTS = 5
MIN_DECADES = 1.0
MIN_R_SQUARED = 0.9
MAX_RATIO = 2.0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """loss = exp(log_coefficient) * flops ** -exponent + floor."""

    log_coefficient: float
    exponent: float
    floor: float

    def __call__(self, flops: Floats) -> Floats:
        """The loss that the law gives for an amount of compute."""
        return np.exp(self.log_coefficient - self.exponent * np.log(flops)) + self.floor


@dataclass(frozen=True)
class Fit:
    """A law through some points, and the laws through their resamples.

    Attributes
    ----------
    law
        The fit to the points themselves.
    flops, loss
        (point,) what was fitted, by compute.
    r_squared
        Share of the variance of log loss that the law explains; NaN where it does not vary.
    low, high
        Interval of the exponent; NaN where no resample can be fitted.
    undefined
        Share of the resamples that have too few different amounts of compute.
    """

    law: PowerLaw
    flops: Floats
    loss: Floats
    r_squared: float
    low: float
    high: float
    undefined: float
    resamples: tuple[PowerLaw, ...]

    @property
    def decades(self) -> float:
        """How many powers of ten of compute the points span."""
        return float(np.log10(self.flops.max() / self.flops.min()))


def frontier(flops: Floats, loss: Floats) -> npt.NDArray[np.int64]:
    """Which points have a lower loss than all points of less or equal compute, by compute."""
    order = np.lexsort((loss, flops))
    before = np.minimum.accumulate(np.r_[np.inf, loss[order]])[:-1]
    return order[loss[order] < before]


def fit_line(flops: Floats, loss: Floats, floor: float = 0.0) -> PowerLaw:
    """Straight line through log(loss - floor) against log(flops).

    All (point,), at least two different `flops`, `loss` above `floor`.
    """
    x, y = np.log(flops), np.log(loss - floor)
    away = x - x.mean()
    exponent = -float(away @ y) / float(away @ away)
    return PowerLaw(float(y.mean()) + exponent * float(x.mean()), exponent, floor)


def fit_with_floor(flops: Floats, loss: Floats, starts: Sequence[float]) -> PowerLaw:
    """Least squares in log loss over coefficient, exponent and floor, the best from some floors.

    As `fit_line`, and at least three different `flops`; `starts` are shares of the lowest loss.
    """
    middle = float(np.log(flops).mean())
    x, y, most = np.log(flops) - middle, np.log(loss), MOST_FLOOR * float(loss.min())

    def residuals(parameters: Floats) -> Floats:
        return np.log(np.exp(parameters[0] - parameters[1] * x) + parameters[2]) - y

    def slopes(parameters: Floats) -> Floats:
        power = np.exp(parameters[0] - parameters[1] * x)
        return (np.stack([power, -x * power, np.ones_like(x)]) / (power + parameters[2])).T

    bounds = ([-np.inf, -np.inf, 0.0], [np.inf, np.inf, most])
    found = []
    for share in starts:
        line = fit_line(flops, loss, share * most)
        first = [line.log_coefficient - line.exponent * middle, line.exponent, line.floor]
        found.append(least_squares(residuals, first, jac=slopes, bounds=bounds))
    at_middle, exponent, floor = min(found, key=lambda one: float(one.cost)).x
    return PowerLaw(float(at_middle + exponent * middle), float(exponent), float(floor))


def choose_law(flops: Floats, loss: Floats) -> PowerLaw:
    """The law without a floor, or with one where there are points enough and AICc asks for it."""
    plain, n = fit_line(flops, loss), len(flops)
    if len(np.unique(flops)) < MIN_FLOOR:
        return plain
    other = fit_with_floor(flops, loss, (0.05, 0.5, 0.95))

    def aicc(law: PowerLaw, k: int) -> float:
        variance = max(_squares(law, flops, loss) / n, 1e-20)
        return n * float(np.log(variance)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)

    # Parameters: coefficient, exponent, variance of the residuals, and the floor.
    better = aicc(other, 4) < aicc(plain, 3) - MIN_GAIN
    pressed = other.floor > 0.999 * MOST_FLOOR * float(loss.min())
    return other if better and not pressed else plain


def _squares(law: PowerLaw, flops: Floats, loss: Floats) -> float:
    return float(((np.log(law(flops)) - np.log(loss)) ** 2).sum())


def fit_points(
    flops: Floats,
    losses: Floats,
    on_frontier: bool,
    resamples: int,
    confidence: float,
    seed: int = 0,
) -> Fit | None:
    """Fit the points, or those on their frontier, and resamples of them.

    Parameters
    ----------
    flops
        (point,) compute.
    losses
        (point, seed) above 0, NaN where a point has fewer seeds than others.
    resamples, confidence, seed
        Of the bootstrap.

    Returns
    -------
    Fit or None
        `None` where the points have fewer than `MIN_FIT` different amounts of compute.
    """
    loss = np.nanmean(losses, axis=1)
    chosen = frontier(flops, loss) if on_frontier else np.argsort(flops, kind="stable")
    x, y = flops[chosen], loss[chosen]
    if len(np.unique(x)) < MIN_FIT:
        return None
    law = choose_law(x, y)
    rng = np.random.default_rng(seed)
    again = [_resample(flops, losses, on_frontier, law, rng) for _ in range(resamples)]
    drawn = [one for one in again if one is not None]
    tail = (1 - confidence) / 2
    exponents = [one.exponent for one in drawn]
    low, high = np.quantile(exponents, [tail, 1 - tail]) if drawn else (np.nan, np.nan)
    spread = float(((np.log(y) - np.log(y).mean()) ** 2).sum())
    r_squared = 1 - _squares(law, x, y) / spread if spread > 0 else np.nan
    undefined = 1 - len(drawn) / resamples
    return Fit(law, x, y, r_squared, float(low), float(high), undefined, tuple(drawn))


def _resample(
    flops: Floats, losses: Floats, on_frontier: bool, law: PowerLaw, rng: np.random.Generator
) -> PowerLaw | None:
    """The law of the same form through points drawn with replacement, as are the seeds of each."""
    points = rng.integers(len(flops), size=len(flops))
    counts = np.isfinite(losses).sum(axis=1)[points, None]
    seeds = (rng.random(losses.shape) * counts).astype(int)
    drawn = np.where(np.arange(losses.shape[1]) < counts, losses[points[:, None], seeds], np.nan)
    at, loss = flops[points], np.nanmean(drawn, axis=1)
    if on_frontier:
        kept = frontier(at, loss)
        at, loss = at[kept], loss[kept]
    if len(np.unique(at)) < (3 if law.floor else 2):
        return None
    if law.floor:
        return fit_with_floor(at, loss, [min(0.95, law.floor / float(loss.min()))])
    return fit_line(at, loss)


def count_below(fit: Fit, flops: Floats, loss: Floats) -> int:
    """How many other losses, (any,), lie further below the law than any of its own points.

    Only those within its points' span of compute count.
    """
    lowest = float((fit.loss / fit.law(fit.flops)).min())
    within = (flops >= fit.flops.min()) & (flops <= fit.flops.max())
    return int((within & (loss < lowest * fit.law(flops))).sum())


def judge(best: Fit | None, every: Fit | None, n_frontier: int, n_below: int) -> tuple[bool, str]:
    """Whether a power law is claimed, and the reasons in words.

    Parameters
    ----------
    best, every
        The fits on the frontier and to all points.
    n_frontier
        Points on the frontier.
    n_below
        Validations on the way of trainings that lie below the frontier's law (`count_below`).
    """
    reasons = []
    if n_frontier < MIN_POINTS:
        reasons.append(f"{n_frontier} point(s) on the frontier, and {MIN_POINTS} are asked for")
    if best:
        reasons += _doubts(best)
    if n_below:
        reasons.append(
            f"{n_below} validation(s) on the way of trainings lie further below the law than any "
            "of its points, so these are not the frontier"
        )
    if every is None:
        reasons.append(f"all points have fewer than {MIN_FIT} different amounts of compute")
    elif every.high < 0:
        reasons.append("over all points, the loss grows with compute")
    elif not every.low > 0:
        reasons.append("over all points, the interval of the exponent includes 0")
    if best is None or reasons:
        return False, f"No power law can be claimed: {'; '.join(reasons)}."
    return True, (
        f"The frontier's {n_frontier} points follow a power law over {best.decades:.1f} decades of "
        "compute. What it says outside of them is not tested."
    )


def _doubts(fit: Fit) -> list[str]:
    doubts = []
    if fit.decades < MIN_DECADES:
        doubts.append(
            f"the frontier spans {fit.decades:.2f} decades of compute, and {MIN_DECADES:g} is "
            "asked for"
        )
    if not fit.r_squared >= MIN_R_SQUARED:
        doubts.append(
            f"the law explains {fit.r_squared:.3f} of the variance of log loss on the frontier, "
            f"and {MIN_R_SQUARED:g} is asked for"
        )
    if not 0 < fit.high <= MAX_RATIO * fit.low:
        doubts.append(
            f"the interval of the exponent, {fit.low:.2g} to {fit.high:.2g}, is wider than a "
            f"factor of {MAX_RATIO:g}"
        )
    return doubts
