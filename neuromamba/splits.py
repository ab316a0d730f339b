"""Which subjects train, select and test: one stratified holdout per dataset, by subject.

Design choices
--------------
- The unit is the subject: all runs of one are in one part.
- The parts are drawn by systematic sampling: subjects are put in order by stratum (label, then
  site), at random within a stratum, and every k-th goes to the part. Each label, and each site
  within a label, then gets its share to within one subject, and no stratum is too rare for it.
- The strata are the classes of the dataset's first classification target, or fifths of its first
  regression target when it has no classification, within each site.
- A subject without any label can still be pretrained on, so it goes to training. Only where fewer
  than `MIN_SUBJECTS` subjects have a label are the others tested on too.
- The parts are a function of the subjects, labels, sites and settings, not of the file system.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from neuromamba.config import Config, Dataset, Splits
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.participants import read_participants
from neuromamba.qc_rules import left_out
from neuromamba.stage import read_manifest
from neuromamba.stages import stratified_by
from neuromamba.tables import read_table, write_table

PARTS = ("train", "validation", "test")
MIN_SUBJECTS = len(PARTS)
BINS = 5
_SHARE = 1
"""The stream of random numbers under the split's seed that orders the training subjects."""


def read_split(path: Path | str) -> dict[str, list[str]]:
    """Read a split: the subjects of each of the parts `train`, `validation` and `test`.

    Raises
    ------
    InputError
        When a subject is listed twice, a part has another name, or a part is empty.
    """
    table = read_table(path, dtype=str)
    missing = {"subject", "part"} - set(table.columns)
    if missing:
        raise InputError(f"{path}: column {', '.join(sorted(missing))} is missing")
    if table[["subject", "part"]].isna().any(axis=None):
        raise InputError(f"{path}: a row has no subject or no part; complete or delete it")
    unknown = sorted(set(table["part"]) - set(PARTS))
    if unknown:
        raise InputError(f"{path}: unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    twice = sorted(set(table.loc[table["subject"].duplicated(), "subject"]))
    if twice:
        raise InputError(
            f"{path}: {', '.join(twice[:5])} listed more than once; a subject in two parts would "
            "be tested on what it was trained on: keep one row for each"
        )
    parts = {part: sorted(table.loc[table["part"] == part, "subject"]) for part in PARTS}
    empty = [part for part in PARTS if not parts[part]]
    if empty:
        raise InputError(f"{path}: no subject in part {', '.join(empty)}; make the split again")
    return parts


def split_subjects(
    subjects: list[str], participants: pd.DataFrame, dataset: Dataset, splits: Splits
) -> pd.DataFrame:
    """Assign each subject to a part.

    Parameters
    ----------
    subjects
        Subjects with data.
    participants
        Indexed by subject: column `site` and one column per target, missing where unknown.
    dataset
        Gives the targets; the first counts for the strata, any for "has a label".
    splits
        Shares and seed.

    Returns
    -------
    pandas.DataFrame
        Columns `subject`, `part`, sorted by subject.

    Raises
    ------
    InputError
        When there are fewer than `MIN_SUBJECTS` subjects.
    """
    if len(subjects) < MIN_SUBJECTS:
        raise InputError(
            f"{len(subjects)} subject(s) with usable runs: training, validation and testing need "
            f"at least {MIN_SUBJECTS}; add subjects or see excluded.tsv for what was left out"
        )
    facts = participants.reindex(sorted(subjects))
    rng = np.random.default_rng(splits.seed)
    facts = facts.iloc[rng.permutation(len(facts))]
    targets = list(dataset.targets)
    labelled = facts[facts[targets].notna().any(axis=1)] if targets else facts
    if len(labelled) < MIN_SUBJECTS:
        labelled = facts
    ordered = labelled.index[np.argsort(_strata(labelled, dataset), kind="stable")]
    total = len(ordered)
    n_test = min(max(1, round(splits.test * total)), total - 2)
    n_validation = min(max(1, round(splits.validation * total)), total - n_test - 1)
    test = _every_kth(ordered, n_test, rng.random())
    rest = ordered.difference(test, sort=False)
    validation = _every_kth(rest, n_validation, rng.random())
    part = pd.Series("train", index=sorted(subjects))
    part[test], part[validation] = "test", "validation"
    return part.rename_axis("subject").rename("part").reset_index()


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
    strata = _strata(facts, dataset)
    start = {stratum: rng.random() for stratum in sorted(set(strata))}
    members = strata.groupby(strata)
    place = (members.cumcount() + strata.map(start)) / members.transform("size")
    count = math.ceil(round(fraction * len(facts), 9))  # 0.07 * 100 is a little more than 7
    return sorted(facts.index[np.argsort(place, kind="stable")[:count]])


def _strata(facts: pd.DataFrame, dataset: Dataset) -> pd.Series:
    """A text for each subject that is equal within a stratum; missing values are their own."""
    name = stratified_by(dataset)
    label = facts[name] if name else pd.Series(pd.NA, index=facts.index)
    if name and dataset.targets[name].kind == "regression":
        # Ranks, not values, so that ties and outliers leave no fifth empty.
        label = (label.rank(pct=True) * BINS).apply(np.ceil)
    return label.astype(str) + "\t" + facts["site"].astype(str)


def _every_kth(ordered: pd.Index, n: int, start: float) -> pd.Index:
    return ordered[np.floor((np.arange(n) + start) * len(ordered) / n).astype(int)]


def usable_subjects(
    index: pd.DataFrame, layout: Layout, batches: int, bad: Iterable[str] = ()
) -> list[str]:
    """Subjects with a run whose tokens and ROI series both exist, and that is not `bad`."""
    usable = set(index.loc[index["reason"].isna(), "run"]) - set(bad)
    for stage in ("tokens", "rois"):
        made = [read_manifest(layout, stage, batch) for batch in range(batches)]
        usable &= {run for table in made for run in table.loc[table["reason"].isna(), "run"]}
    return sorted(set(index.loc[index["run"].isin(usable), "subject"]))


def run_splits(config: Config, dataset: str) -> None:
    """Write `splits/holdout.tsv`.

    Raises
    ------
    InputError
        When too few subjects have data.
    """
    layout = Layout.of(config, dataset)
    settings = config.datasets[dataset]
    index = read_table(layout.index, dtype={"run": str, "subject": str, "reason": str})
    bad = left_out(config, dataset)
    subjects = usable_subjects(index, layout, config.compute.batches, bad)
    participants = read_participants(settings)
    write_table(layout.split, split_subjects(subjects, participants, settings, config.splits))
