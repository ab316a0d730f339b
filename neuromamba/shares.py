"""Shares of the training subjects for the scaling study, smaller ones within larger ones."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from neuromamba.config import Dataset
from neuromamba.files import InputError
from neuromamba.splits import strata_of

_SHARE = 1
"""The stream of random numbers under the split's seed that orders the training subjects."""


def nested_share(
    subjects: list[str],
    participants: pd.DataFrame,
    dataset: Dataset,
    fraction: float,
    seed: int,
) -> list[str]:
    """The first `ceil(fraction * n)` of `n` subjects, in an order that is always the same.

    A smaller share is part of every larger one. Each stratum is spread evenly over the order, from
    a random start on, so that any share has about as many of each stratum as its due.

    Parameters
    ----------
    subjects
        Those to choose from.
    participants, dataset
        As in `split_subjects`.
    fraction
        Above 0, at most 1.
    seed
        Of the order; with the subjects and their labels, all that it depends on.

    Returns
    -------
    list of str
        Sorted.

    Raises
    ------
    InputError
        When the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction {fraction:g} must be above 0 and at most 1")
    facts = participants.reindex(sorted(subjects))
    rng = np.random.default_rng([seed, _SHARE])
    facts = facts.iloc[rng.permutation(len(facts))]
    strata = strata_of(facts, dataset)
    start = {stratum: rng.random() for stratum in sorted(set(strata))}
    members = strata.groupby(strata)
    place = (members.cumcount() + strata.map(start)) / members.transform("size")
    count = math.ceil(round(fraction * len(facts), 9))  # 0.07 * 100 is a little more than 7
    return sorted(facts.index[np.argsort(place, kind="stable")[:count]])
