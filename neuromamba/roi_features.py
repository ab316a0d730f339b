"""Functional connectivity (FC) of subjects as features.

Design choices
--------------
- FC is the Fisher z of a kind of `rois.connectivity`, averaged over a subject's runs, one value per
  pair of ROIs. A pair that more than `MAX_MISSING` of the training subjects lack is dropped for
  everyone; other missing values stay NaN, for which the model puts the training mean. Dropping each
  ROI that any subject lacks would weaken the baseline: on 642 ABIDE subjects with 392 ROIs it
  leaves 78 ROIs and takes the AUROC of sex from 0.81 to 0.70.
- Which features are kept is told by training subjects alone. A test subject that lacks most of them
  is predicted near the training mean, and is warned of.

Memory is that of the features: subjects x pairs of ROIs x 4 bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from neuromamba.connectivity import read_z
from neuromamba.excerpts import Excerpt
from neuromamba.files import InputError

MAX_MISSING = 0.1
"""Share of training subjects that may lack a feature."""
MOSTLY_MISSING = 0.5
"""Share of the features from which on a test subject's lack of them is warned of."""

Stores = Mapping[str, Sequence[Path | Excerpt]]
"""By subject the stores of its runs; or by sample, which is a subject in a state, an excerpt."""


@dataclass(frozen=True)
class Connectivity:
    """Features of training and test subjects.

    Attributes
    ----------
    train, test
        (subject, feature) float32, NaN where a subject lacks it; the Fisher z of pairs of ROIs.
    n_rois, n_dropped
        ROIs used, and those left out because too many training subjects lack them.
    missing
        Share of the values that are missing, over all subjects.
    kind
        What they are: `pearson`, `partial`, `tangent`, `mean and SD`.
    """

    train: npt.NDArray[np.float32]
    test: npt.NDArray[np.float32]
    n_rois: int
    n_dropped: int
    missing: float
    kind: str = "pearson"


def mean_connectivity(
    stores: Sequence[Path | Excerpt], kind: str | None = None
) -> npt.NDArray[np.float32]:
    """Mean Fisher z over a subject's runs: (roi, roi), NaN where no run has the ROI.

    `kind` is that of `load_connectivity`.

    Raises
    ------
    InputError
        When a store is unreadable, or the runs have different ROIs.
    """
    total: npt.NDArray[np.float64] | None = None
    count: npt.NDArray[np.int_] | None = None
    for store in stores:
        z = read_z(store, kind)[1]
        if total is None or count is None:
            total, count = np.zeros_like(z), np.zeros(z.shape, dtype=int)
        elif total.shape != z.shape:
            raise InputError(
                f"{store}: {len(z)} ROIs, the subject's other runs have {len(total)}; "
                "delete the dataset's rois folder and run rois again"
            )
        total += np.nan_to_num(z)
        count += np.isfinite(z)
    if total is None or count is None:
        raise InputError("a subject has no run with ROI series")
    with np.errstate(invalid="ignore"):
        return (total / count).astype(np.float32)


def load_connectivity(
    stores: Stores, train: Sequence[str], test: Sequence[str], kind: str | None = None
) -> Connectivity:
    """Read the FC of `train` and `test` subjects, for the ROIs that most of `train` have.

    Parameters
    ----------
    stores
        The `rois/{run}.zarr` of each subject.
    train, test
        Subjects, in the order of the rows returned.
    kind
        `pearson` or `partial`; `None` for the first that the stores have.

    Raises
    ------
    InputError
        When no pair of ROIs is common to the training subjects, or a store is unreadable.
    """
    features: list[npt.NDArray[np.float32]] = []
    pairs: tuple[npt.NDArray[np.intp], ...] = ()
    n_rois = 0
    for subject in tqdm([*train, *test], desc="fc", unit="subject", mininterval=1.0):
        fc = mean_connectivity(stores[subject], kind)
        if not pairs:
            n_rois, pairs = len(fc), np.triu_indices(len(fc), k=1)
        if len(fc) != n_rois:
            raise InputError(
                f"{stores[subject][0]}: {len(fc)} ROIs, other subjects have {n_rois}; "
                "delete the dataset's rois folder and run rois again"
            )
        features.append(fc[pairs])
    found = keep_common(np.stack(features), len(train), n_rois)
    _warn_of_missing(found, test)
    return replace(found, kind=kind or read_z(stores[train[0]][0])[0])


def _warn_of_missing(found: Connectivity, test: Sequence[str]) -> None:
    share = np.isnan(found.test).mean(axis=1)
    poor = [
        f"{subject} ({value:.0%})"
        for subject, value in zip(test, share, strict=True)
        if value > MOSTLY_MISSING
    ]
    if poor:
        warnings.warn(
            f"test subjects that lack most of the FC baseline's features, in place of which the "
            f"training mean stands: {', '.join(poor)}; look at their fields of view",
            stacklevel=3,
        )


def keep_common(features: npt.NDArray[np.float32], n_train: int, n_rois: int) -> Connectivity:
    """Drop the pairs of ROIs that too many of the first `n_train` rows lack.

    Parameters
    ----------
    features
        (subject, pair of ROIs) float32, training subjects first, pairs in `triu_indices` order.
    n_train, n_rois
        Number of training subjects and of ROIs.

    Raises
    ------
    InputError
        When no pair is left.
    """
    missing = np.isnan(features[:n_train]).mean(axis=0)
    kept = missing <= MAX_MISSING
    if not kept.any():
        raise InputError(too_few_common(n_rois))
    used = len(np.unique(np.concatenate([index[kept] for index in np.triu_indices(n_rois, k=1)])))
    features = features[:, kept]
    share = float(np.isnan(features).mean())
    return Connectivity(features[:n_train], features[n_train:], used, n_rois - used, share)


def too_few_common(n_rois: int) -> str:
    """What is wrong when `MAX_MISSING` leaves nothing, and what to do about it."""
    return (
        f"no two of the {n_rois} ROIs are in {1 - MAX_MISSING:.0%} of the training subjects; "
        "choose an atlas that covers the scanned part of the brain, or a larger rois.cube"
    )
