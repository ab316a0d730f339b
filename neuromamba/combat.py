"""ComBat: take the additive and multiplicative effects of sites out of features.

Design choices
--------------
- Location and scale of each feature at each site are shrunk by empirical Bayes towards what the
  site does to the features at large, and are what is then taken out (Johnson et al. 2007, for
  functional connectivity Yu et al. 2018). Fitted on training subjects alone, applied to others.
- No covariate is preserved. To preserve the target, its effect would have to be known of the
  subjects that are to be predicted. So what a site tells of the target by its share of patients is
  taken out as well: that it is no part of the figure is what the baseline is for.
- A site with fewer than `FEWEST` training subjects cannot be harmonised, nor can one that is in no
  training subject, as when whole sites are left out: such subjects stay as they are, beside others
  that were brought to the mean of the sites. Neither their features nor their labels are used.
- The estimates need of each site only the mean, the variance and the number of values of each
  feature. Missing values count for nothing, and stay missing.
- Own code, because no library fits: neuroCombat 0.2.12 (of 2021) fails on held-out subjects with
  NumPy 2.4, neuroHarmonize 2.5 needs NumPy 1, combatlearn 2.3 shrinks over sites in place of
  features, inmoose 0.9 knows no held-out subjects, and pycombat 0.20 (of 2022) none of whom a site
  is missing. The tests hold it against pycombat, with which it agrees.

Memory: six times sites x features x 8 bytes, and a copy of the features.

Sources: Johnson, Li and Rabinovic 2007 (doi:10.1093/biostatistics/kxj037); Fortin et al. 2018
(doi:10.1016/j.neuroimage.2017.11.024); Yu et al. 2018 (doi:10.1002/hbm.24241).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuromamba.files import InputError

FEWEST = 2
"""Training subjects of a site, without which its variance is unknown."""
TOLERANCE, MAX_STEPS = 1e-6, 1000
SMALLEST_VARIANCE = 1e-12
"""Of features, which have variance 1, and of the effects of a site over them."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Combat:
    """The effects of sites on features.

    Attributes
    ----------
    sites
        Names of the sites that can be harmonised.
    mean
        (feature,) mean over their subjects.
    shift, scale
        (site, feature) what a site adds, and what it multiplies the deviations from the mean by.
    """

    sites: tuple[str, ...]
    mean: Floats
    shift: Floats
    scale: Floats

    def knows(self, sites: Sequence[object]) -> npt.NDArray[np.bool_]:
        """Which of the subjects, given by their sites, can be harmonised."""
        return np.array([site in self.sites for site in sites], dtype=bool)

    def harmonise(
        self, features: npt.NDArray[np.floating], sites: Sequence[object]
    ) -> npt.NDArray[np.float32]:
        """(subject, feature) without the effects of the known sites; other subjects unchanged."""
        result = features.astype(np.float32)
        for row, site in enumerate(sites):
            if site in self.sites:
                k = self.sites.index(str(site))
                deviation = (features[row] - self.mean - self.shift[k]) / self.scale[k]
                result[row] = self.mean + deviation
        return result


def fit_combat(features: npt.NDArray[np.floating], sites: Sequence[object]) -> Combat:
    """Estimate the effects of sites.

    Parameters
    ----------
    features
        (subject, feature) of training subjects, NaN where missing.
    sites
        (subject,) their sites; missing ones are not text.

    Raises
    ------
    InputError
        When fewer than two sites have `FEWEST` subjects.
    """
    found = np.array([site if isinstance(site, str) else "" for site in sites])
    names, counts = np.unique(found[found != ""], return_counts=True)
    names = names[counts >= FEWEST]
    if len(names) < 2:
        raise InputError(
            f"ComBat needs two sites with {FEWEST} or more training subjects each, and there is "
            f"{len(names)}; name the site column (participants.site_column) and keep site in "
            "evaluate.confounds, or leave fc-combat out of evaluate.baselines"
        )
    n, mean, square = (np.empty((len(names), features.shape[1])) for _ in range(3))
    for k, name in enumerate(names):
        values = features[found == name].astype(np.float64)
        known = np.isfinite(values)
        n[k] = known.sum(axis=0)
        mean[k] = np.where(known, values, 0.0).sum(axis=0) / np.maximum(n[k], 1)
        square[k] = np.where(known, (values - mean[k]) ** 2, 0.0).sum(axis=0)
    total = np.maximum(n.sum(axis=0), 1)
    grand, spread = (n * mean).sum(axis=0) / total, np.sqrt(square.sum(axis=0) / total)
    # What does not vary within sites has no scale, and stays as it is.
    varies = spread > 0
    unit = np.where(varies, spread, 1.0)
    shift, scale = np.zeros_like(mean), np.ones_like(mean)
    for k in range(len(names)):
        location = ((mean[k] - grand) / unit)[varies]
        found_shift, variance = _shrink(n[k, varies], location, (square[k] / unit**2)[varies])
        shift[k, varies], scale[k, varies] = found_shift * unit[varies], np.sqrt(variance)
    return Combat(tuple(map(str, names)), grand, shift, scale)


def _shrink(n: Floats, location: Floats, square: Floats) -> tuple[Floats, Floats]:
    """Posterior location and variance of each feature at one site, by priors over the features.

    Parameters
    ----------
    n, location, square
        (feature,) number of values, their mean, and the sum of their squared deviations from it.
    """
    # A site whose subjects do not differ, but for rounding, tells nothing of its scale.
    has_mean, has_variance = n > 0, (n > 1) & (square > SMALLEST_VARIANCE * n)
    variance = square[has_variance] / (n[has_variance] - 1)
    centre, width = _moments(location[has_mean], 0.0)
    typical, breadth = _moments(variance, 1.0)
    # The moments of a normal and of an inverse gamma distribution.
    shape, rate = typical**2 / breadth + 2, typical**3 / breadth + typical
    shifted, scaled = location, np.full(len(n), typical)
    scaled[has_variance] = variance
    for _ in range(MAX_STEPS):
        before = shifted, scaled
        shifted = (n * width * location + scaled * centre) / (n * width + scaled)
        scaled = (rate + (square + n * (location - shifted) ** 2) / 2) / (shape + n / 2 - 1)
        moved = np.abs(shifted - before[0]), np.abs(scaled / before[1] - 1)
        if np.max(moved, initial=0.0) < TOLERANCE:
            break
    return shifted, scaled


def _moments(values: Floats, default: float) -> tuple[float, float]:
    """Mean and variance; `default`, and next to none, where there is nothing to tell them by."""
    mean = float(values.mean()) if len(values) else default
    variance = float(values.var(ddof=1)) if len(values) > 1 else 0.0
    return mean, max(variance, SMALLEST_VARIANCE)
