"""Which subjects train, select and test: a stratified holdout or folds, always by subject.

Design choices
--------------
- The unit is the subject: all runs of one are in one part.
- The parts are drawn by systematic sampling: subjects are put in order by stratum (label, then
  site), at random within a stratum, and every k-th goes to the part. Each label, and each site
  within a label, then gets its share to within one subject, and no stratum is too rare for it.
- The strata are the classes of the dataset's first classification target, or fifths of its first
  regression target when it has no classification, within each site.
- A subject without any label can still be pretrained on, so it goes to training. Only where fewer
  than `MIN_SUBJECTS` subjects have a label, or where a target is a state, which needs none, are the
  others tested on too.
- With k folds each labelled subject is tested once in every repeat, drawn in the same way. With
  leave-site-out whole sites are tested together, in as many groups of about equal size as there are
  folds. Who is left then selects and trains, as in a holdout.
- The parts are a function of the subjects, labels, sites and settings, not of the file system.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from neuromamba.config import Config, Dataset, Splits
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.participants import read_participants
from neuromamba.qc_rules import left_out
from neuromamba.stage import read_manifest
from neuromamba.stage_settings import stratified_by
from neuromamba.stages import TESTED, tested_arrays
from neuromamba.tables import read_table, write_table

PARTS = ("train", "validation", "test")
MIN_SUBJECTS = len(PARTS)
BINS = 5
_FOLDS = 2
"""The stream of random numbers under the split's seed that orders the subjects of the folds."""


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
    rng = np.random.default_rng(splits.seed)
    ordered = _in_strata(subjects, participants, dataset, rng)
    n_test = min(max(1, round(splits.test * len(ordered))), len(ordered) - 2)
    test = _every_kth(ordered, n_test, rng.random())
    return _parts(subjects, ordered, test, splits, rng)


def fold_subjects(
    subjects: list[str],
    participants: pd.DataFrame,
    dataset: Dataset,
    splits: Splits,
    first: int = 0,
) -> dict[str, pd.DataFrame]:
    """The folds of a cross-validation: of each, by its name, what `split_subjects` returns.

    Parameters
    ----------
    subjects, participants, dataset, splits
        As in `split_subjects`.
    first
        The repeat to begin with; its folds are the same whatever comes before and after it.

    Raises
    ------
    InputError
        When there are too few subjects or sites for the folds, or subjects without a site.
    """
    folds = splits.folds
    found = []
    for repeat in range(first, splits.repeats):
        rng = np.random.default_rng([splits.seed, _FOLDS, repeat])
        ordered = _in_strata(subjects, participants, dataset, rng)
        if len(ordered) < max(folds, MIN_SUBJECTS):
            raise InputError(
                f"{len(ordered)} subject(s) with usable runs and labels cannot be tested in "
                f"{folds} folds; lower splits.folds"
            )
        if splits.protocol == "leave-site-out":
            number = _site_folds(ordered, participants, folds)
        else:
            number = pd.Series(np.arange(len(ordered)) % folds, index=ordered)
        tests = [number.index[number == k] for k in range(folds)]
        if min(len(ordered) - len(test) for test in tests) < MIN_SUBJECTS - 1:
            raise InputError(
                f"{folds} folds of {len(ordered)} subjects leave fewer than 2 to train and select "
                "on in one of them; change splits.folds or splits.protocol"
            )
        found += [_parts(subjects, ordered, test, splits, rng) for test in tests]
    return dict(zip(splits.names[first * folds :], found, strict=True))


def _in_strata(
    subjects: list[str], participants: pd.DataFrame, dataset: Dataset, rng: np.random.Generator
) -> pd.Index:
    """The subjects that can be tested, by stratum, at random within each."""
    if len(subjects) < MIN_SUBJECTS:
        raise InputError(
            f"{len(subjects)} subject(s) with usable runs: training, validation and testing need "
            f"at least {MIN_SUBJECTS}; add subjects or see excluded.tsv for what was left out"
        )
    facts = participants.reindex(sorted(subjects))
    facts = facts.iloc[rng.permutation(len(facts))]
    targets = list(dataset.subject_targets)
    # Whoever has a run may be in a state.
    by_label = targets and not dataset.state_targets
    labelled = facts[facts[targets].notna().any(axis=1)] if by_label else facts
    if len(labelled) < MIN_SUBJECTS:
        labelled = facts
    return labelled.index[np.argsort(strata_of(labelled, dataset), kind="stable")]


def _site_folds(ordered: pd.Index, participants: pd.DataFrame, folds: int) -> pd.Series:
    """The number of each subject's fold, whole sites together."""
    sites = participants["site"].reindex(ordered)
    if unknown := list(ordered[sites.isna()]):
        raise InputError(
            f"leave-site-out: no site is known of {', '.join(sorted(unknown)[:5])} ({len(unknown)} "
            "subjects); complete the column that participants.site_column names, or exclude them"
        )
    names = sites.astype(str)
    if names.nunique() < folds:
        raise InputError(
            f"leave-site-out: {names.nunique()} site(s) ({', '.join(sorted(set(names))[:10])}) "
            f"cannot make {folds} folds; set splits.folds to the number of sites or lower"
        )
    # Slow to load, and the workflow reads splits at every start.
    from sklearn.model_selection import GroupKFold

    by_name = names.sort_index()
    number = pd.Series(0, index=by_name.index)
    for k, (_, test) in enumerate(GroupKFold(folds).split(by_name, groups=by_name)):
        number.iloc[test] = k
    return number.reindex(ordered)


def _parts(
    subjects: list[str],
    ordered: pd.Index,
    test: pd.Index,
    splits: Splits,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Who is left trains, a share of those in strata selects."""
    rest = ordered.difference(test, sort=False)
    n_validation = min(max(1, round(splits.validation * len(ordered))), len(rest) - 1)
    validation = _every_kth(rest, n_validation, rng.random())
    part = pd.Series("train", index=sorted(subjects))
    part[test], part[validation] = "test", "validation"
    return part.rename_axis("subject").rename("part").reset_index()


def strata_of(facts: pd.DataFrame, dataset: Dataset) -> pd.Series:
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
    index: pd.DataFrame,
    layout: Layout,
    batches: int,
    bad: Iterable[str] = (),
    arrays: Sequence[str] = TESTED,
) -> list[str]:
    """Subjects with a run that has all of `arrays`, and that is not `bad`."""
    usable = set(index.loc[index["reason"].isna(), "run"]) - set(bad)
    for stage in arrays:
        made = [read_manifest(layout, stage, batch) for batch in range(batches)]
        usable &= {run for table in made for run in table.loc[table["reason"].isna(), "run"]}
    return sorted(set(index.loc[index["run"].isin(usable), "subject"]))


def run_splits(config: Config, dataset: str, kept: int = 0) -> None:
    """Write `splits/holdout.tsv`; or that of each fold, and last `splits/folds.tsv`.

    `folds.tsv` tells for each subject in which fold of each repeat it is tested.

    Parameters
    ----------
    config, dataset
        The settings, and the dataset's name in them.
    kept
        How many repeats on disk stay as they are (`Keys.kept_repeats`); those that are added to
        them are of the same subjects.

    Raises
    ------
    InputError
        When too few subjects have data.
    """
    layout = Layout.of(config, dataset)
    settings = config.datasets[dataset]
    index = read_table(layout.index, dtype={"run": str, "subject": str, "reason": str})
    arrays = tested_arrays(settings)
    bad = left_out(config, dataset)
    subjects = usable_subjects(index, layout, config.compute.batches, bad, arrays)
    people, splits = read_participants(settings), config.splits
    if splits.protocol == "holdout":
        write_table(layout.split, split_subjects(subjects, people, settings, splits))
        return
    files = {name: Layout.of(config.in_fold(name), dataset).split for name in splits.names}
    old = {name: read_table(files[name], dtype=str) for name in splits.names[: kept * splits.folds]}
    if old:
        subjects = list(old[splits.names[0]]["subject"])
    new = fold_subjects(subjects, people, settings, splits, first=kept)
    for name, table in new.items():
        write_table(files[name], table)
    write_table(layout.folds, folds_of(old | new, splits))


def folds_of(folds: Mapping[str, pd.DataFrame], splits: Splits) -> pd.DataFrame:
    """The name of the fold in which each subject is tested: `subject`, `repeat-0`, ..."""
    names = list(folds)
    table = folds[names[0]][["subject"]]
    for repeat in range(splits.repeats):
        of_repeat = names[repeat * splits.folds : (repeat + 1) * splits.folds]
        tested = {
            subject: name
            for name in of_repeat
            for subject in folds[name].loc[folds[name]["part"] == "test", "subject"]
        }
        table = table.assign(**{f"repeat-{repeat}": table["subject"].map(tested)})
    return table
