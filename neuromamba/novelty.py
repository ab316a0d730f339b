"""How unlike its training subjects a scan is to a model: its embedding, and where its brain lies.

Choices
-------
- Embeddings are compared by their Mahalanobis distance (Lee et al. 2018, arXiv 1807.03888) from all
  training subjects, whatever their class, under the covariance of Ledoit and Wolf (2004), which can
  be inverted however few subjects there are. Of very wide embeddings it is kept along the
  directions in which people differ most; along all others their mean variance stands for it
  (Tipping and Bishop 1999, section 3.2).
- A distance means something only beside those of other people. Training subjects are nearer to
  their own mean than new ones, so theirs are measured from a mean and covariance of the others
  (cross-fitting). Where there are enough validation subjects, theirs serve instead, because what a
  model says of people it was trained on is not what it says of new ones.
- The place of the brain is compared by patches: a scan in another space, or of half a head, has
  patches where training runs have none, and lacks others that nearly all of them have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuromamba.calibration import p_value

Floats = npt.NDArray[np.float64]
Held = npt.NDArray[np.bool_]

MIN_TRAINING = 10
"""Fewer training subjects say nothing of a covariance (our choice)."""
FOLDS = 10
"""Parts that training subjects are put in by turns, to be measured by the others."""
OUTSIDE = 0.05
"""Share of people like those of the training who are called outside of it (our choice)."""
LEAST_REFERENCE = 19
"""People that distances are compared with, at least: of fewer none can be in the last 5 %."""
MOST_DIRECTIONS = 128
"""Of a covariance that are kept (our choice): half a kilobyte for each feature."""
EXACT = 1e-10
"""Of the largest variance, below which a direction is rounding alone."""
TINY = 1e-9
"""Of the mean variance, which every direction has at least."""
CORE, ABSENT = 0.9, 0.01
"""Share of training runs that hold a patch nearly all have, and one that they have not."""


@dataclass(frozen=True)
class Cloud:
    """Embeddings of people, summed up: where they lie, and how far along each direction.

    Attributes
    ----------
    mean
        (feature,)
    basis
        (direction, feature) orthonormal rows, at most `MOST_DIRECTIONS`.
    variances
        (direction,) of the shrunk covariance along them.
    rest
        (1,) the same along everything else, where it is the mean.
    """

    mean: Floats
    basis: Floats
    variances: Floats
    rest: Floats

    @classmethod
    def fit(cls, embeddings: Floats) -> Cloud:
        """From (subject, feature), without a matrix (feature, feature)."""
        n, width = embeddings.shape
        mean = embeddings.mean(axis=0)
        centred = embeddings - mean
        # Eigenvectors of the smaller of the two products: half of them tell the other half.
        wide = width > n
        values, vectors = np.linalg.eigh((centred @ centred.T if wide else centred.T @ centred) / n)
        used = np.flatnonzero(values > EXACT * max(values[-1], 0.0))[::-1]
        share, level = shrinkage(centred, values[used])
        # What is the same for everybody has to be invertible too.
        floor = TINY * level or 1.0
        kept = used[:MOST_DIRECTIONS]
        basis = vectors[:, kept].T
        if wide:
            basis = basis @ centred / np.sqrt(n * values[kept, None])
        variances = (1 - share) * values[kept] + share * level + floor
        beyond, others = width - len(kept), values[used[MOST_DIRECTIONS:]].sum()
        rest = (1 - share) * others / beyond + share * level + floor if beyond else 1.0
        return cls(mean, basis, variances, np.array([rest]))

    def distances(self, embeddings: Floats) -> Floats:
        """Mahalanobis distances (subject,) of (subject, feature), in SD."""
        centred = embeddings - self.mean
        along = centred @ self.basis.T
        squared = (along**2 / self.variances).sum(axis=1)
        if len(self.basis) < len(self.mean):
            squared += ((centred - along @ self.basis) ** 2).sum(axis=1) / self.rest
        return np.asarray(np.sqrt(squared), dtype=np.float64)


def shrinkage(centred: Floats, variances: Floats) -> tuple[float, float]:
    """How far the covariance of Ledoit and Wolf is drawn to a sphere, and the sphere's variance.

    Their b^2 and d^2 (2004, section 3.2) by sums that a rotation leaves as they are, so that the
    cost grows with the features, not with their square: the same as scikit-learn's `ledoit_wolf`.

    Parameters
    ----------
    centred
        (subject, feature), of mean 0.
    variances
        All eigenvalues of their covariance but zeros.
    """
    n, width = centred.shape
    level, size = float(variances.sum()) / width, float((variances**2).sum())
    distance = size - width * level**2
    spread = (float(((centred**2).sum(axis=1) ** 2).mean()) - size) / n
    return (min(spread / distance, 1.0) if distance > 0 and spread > 0 else 0.0), level


def cross_fitted(embeddings: Floats) -> Floats:
    """Distance (subject,) of each subject from the others of (subject, feature)."""
    fold = np.arange(len(embeddings)) % FOLDS
    found = np.empty(len(embeddings))
    for part in np.unique(fold):
        found[fold == part] = Cloud.fit(embeddings[fold != part]).distances(
            embeddings[fold == part]
        )
    return found


def choose_reference(
    training: Sequence[float], validation: Sequence[float]
) -> tuple[str, Sequence[float]]:
    """Whose distances a new one is compared with: the name of a part, and the distances."""
    if len(validation) >= LEAST_REFERENCE:
        return "validation", validation
    return "training", training


def is_outside(reference: Sequence[float], distance: float) -> bool:
    """Whether a distance is among the largest; never, where the reference is too small to tell."""
    return p_value(reference, distance) <= OUTSIDE + 1e-12


def percentile(reference: Sequence[float], distance: float) -> float:
    """Share of the reference that is nearer, in percent."""
    return 100 * float(np.mean(np.asarray(reference) < distance))


# --- Where the brain lies -------------------------------------------------------------------------


def held_patches(centers: npt.NDArray[np.float32], grid: tuple[int, ...]) -> Held:
    """Which patches (x * y * z,) a run has, from their (patch, 3) centres in [0, 1]."""
    number = np.minimum((centers * np.array(grid)).astype(int), np.array(grid) - 1)
    held = np.zeros(int(np.prod(grid)), dtype=bool)
    held[np.ravel_multi_index(number.T, grid)] = True
    return held


def place(held: Held, shares: Floats) -> dict[str, float]:
    """How the brain of a run lies beside those of training runs.

    Parameters
    ----------
    held
        Its patches.
    shares
        Share of the training runs that has each patch.

    Returns
    -------
    dict
        `coverage`, the share that it has of the patches which nearly all have, and `stray`, the
        share of its own which they have not.
    """
    core = shares >= CORE
    coverage = float(held[core].mean()) if core.any() else 1.0
    return {"coverage": coverage, "stray": float((shares[held] < ABSENT).mean())}


def places(runs: npt.NDArray[np.bool_]) -> dict[str, list[float]]:
    """`place` of each of (run, patch) beside the others."""
    total, others = runs.sum(axis=0), len(runs) - 1
    found = [place(held, (total - held) / others) for held in runs]
    return {name: [one[name] for one in found] for name in ("coverage", "stray")}
