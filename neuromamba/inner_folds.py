"""Inner folds of the training samples, by which a penalty is chosen, whole subjects together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

Ints = npt.NDArray[np.int64]
Splits = list[tuple[Ints, Ints]]
"""Of each fold, the numbers of the samples to fit and to score."""


def class_folds(
    labels: npt.ArrayLike, people: Sequence[str] | None, folds: int, seed: int
) -> Splits | None:
    """Folds with each class about as often, in which all samples of a subject are together.

    Parameters
    ----------
    labels
        (sample,) numbers of the classes.
    people
        (sample,) names of the subjects; `None` where each has one sample.
    folds, seed
        At most so many folds, fewer where the rarest class has fewer subjects, and what seeds them.

    Returns
    -------
    list or None
        `None` when there cannot be two.
    """
    y = np.asarray(labels)
    if people is not None and len(set(people)) < len(people):
        return grouped_folds(y, people, folds, seed)
    folds = min(folds, int(np.unique(y, return_counts=True)[1].min()))
    if folds < 2:
        return None
    return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(y, y))


def grouped_folds(
    labels: npt.ArrayLike, people: Sequence[str], folds: int, seed: int
) -> Splits | None:
    """`class_folds` of subjects with several samples, each fold fitting and scoring all classes."""
    y = np.asarray(labels)
    classes, names = np.unique(y), np.asarray(people)
    fewest = min(len(np.unique(names[y == k])) for k in classes)
    for n in range(min(folds, fewest), 1, -1):
        inner = StratifiedGroupKFold(n, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            # That a fold has too little of a class is looked at below.
            warnings.simplefilter("ignore", UserWarning)
            found = list(inner.split(y, y, names))
        if all(len(np.unique(y[part])) == len(classes) for pair in found for part in pair):
            return found
    return None
