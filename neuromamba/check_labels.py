"""What the table of subjects says of those that have usable runs: labels, classes, sites."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from neuromamba.config import Config, Dataset
from neuromamba.files import InputError
from neuromamba.findings import Finding
from neuromamba.participants import read_participants
from neuromamba.splits import MIN_SUBJECTS, PARTS, split_subjects

LEAST = 2
"""Subjects of a class that each part of the split should have."""
ALL_SITES = "all"


@dataclass(frozen=True)
class Labels:
    """Findings about the labels, and how many subjects each target has.

    `counts` has the columns `target`, `site` (`all` for their sum), `value` (a class, `any` for a
    number, `n/a` where it is missing) and `subjects`.
    """

    findings: list[Finding]
    counts: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["target", "site", "value", "subjects"])
    )


def check_labels(
    config: Config, dataset: Dataset, used: Sequence[str], with_scans: Sequence[str]
) -> Labels:
    """Compare the table of subjects with the scans.

    Parameters
    ----------
    config, dataset
        For the split, and for the targets.
    used
        Subjects with usable runs.
    with_scans
        Subjects with any runs, usable or not.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            participants = read_participants(dataset)
    except InputError as error:
        return Labels([Finding("blocked", "", str(error))])
    findings = [Finding("warning", "", str(warning.message)) for warning in caught]
    facts = participants.reindex(sorted(used))
    if dataset.participants is None:
        none = "so no targets" + " but states" * bool(dataset.state_targets)
        note = f"no table of subjects: the dataset YAML names no participants, {none}"
        findings.append(Finding("note", "", note))
    else:
        findings += _compare(dataset.participants.file, participants, used, with_scans)
        for target in dataset.subject_targets:
            findings += _missing(facts[target], target, dataset.participants.file)
    findings += _parts(config, dataset, used, participants)
    return Labels(findings, _counts(dataset, facts))


def _compare(
    file: str, participants: pd.DataFrame, used: Sequence[str], with_scans: Sequence[str]
) -> list[Finding]:
    absent = sorted(set(used) - set(participants.index))
    if absent and len(absent) == len(used):
        message = (
            f"{file} has a row for none of the {len(used)} subjects that have runs (such as "
            f"{absent[0]}); its subjects are such as {participants.index[0]}; make the labels "
            "agree (leading zeros?)"
            if len(participants)
            else f"{file} has no rows; add the subjects"
        )
        return [Finding("blocked", "", message)]
    idle = sorted(set(participants.index) - set(with_scans))
    return [
        Finding("warning", name, f"no row in the table of subjects: {file} lacks {name}")
        for name in absent
    ] + [
        Finding("note", name, f"no scans: {name} stands in {file} but has no selected run")
        for name in idle
    ]


def _missing(values: pd.Series, target: str, file: str) -> list[Finding]:
    names = list(values.index[values.isna()])
    if names and len(names) == len(values):
        message = f"target {target} has no values: {file} has none for any subject with usable runs"
        return [Finding("warning", target, message)]
    return [
        Finding(
            "note",
            name,
            f"no label of target {target}: {name} has none in {file}; it is used for pretraining "
            "only",
        )
        for name in names
    ]


def _parts(
    config: Config, dataset: Dataset, used: Sequence[str], participants: pd.DataFrame
) -> list[Finding]:
    """Whether a split is possible, and has enough of each class in each part."""
    if not used:
        return []
    if len(used) < MIN_SUBJECTS:
        message = (
            f"too few subjects: {len(used)} with usable runs, where training, validation and "
            f"testing need at least {MIN_SUBJECTS}; add subjects"
        )
        return [Finding("blocked", "", message)]
    split = split_subjects(list(used), participants, dataset, config.splits)
    part = split.set_index("subject")["part"]
    findings = []
    for name, target in dataset.subject_targets.items():
        labels = participants[name].reindex(part.index)
        if labels.isna().all():
            continue
        if target.kind == "classification":
            counts = pd.crosstab(labels, part).reindex(
                index=list(target.classes), columns=list(PARTS), fill_value=0
            )
            cells = {f"class {c} of target {name}": counts.loc[c] for c in counts.index}
        else:
            counts_of_part = part[labels.notna()].value_counts().reindex(PARTS, fill_value=0)
            cells = {f"target {name}": counts_of_part}
        for what, of_part in cells.items():
            if of_part.min() < LEAST:
                there = ", ".join(f"{key} {n}" for key, n in of_part.items())
                findings.append(
                    Finding(
                        "warning",
                        name,
                        f"few subjects in a part of the split: {what} has {there}; scores of so "
                        "few mean little, so add subjects, or pool or drop the class",
                    )
                )
    return findings


def _counts(dataset: Dataset, facts: pd.DataFrame) -> pd.DataFrame:
    rows = []
    site = facts["site"].fillna("n/a")
    for name, target in dataset.subject_targets.items():
        values = facts[name]
        known = values if target.kind == "classification" else values.where(values.isna(), "any")
        known = known.astype("object").fillna("n/a")
        order = [*(target.classes if target.kind == "classification" else ["any"]), "n/a"]
        sites = [ALL_SITES, *(sorted(site.unique()) if site.nunique() > 1 else [])]
        for place in sites:
            of_site = known if place == ALL_SITES else known[site == place]
            counts = of_site.value_counts()
            rows += [(name, place, value, int(counts.get(value, 0))) for value in order]
    return pd.DataFrame(rows, columns=["target", "site", "value", "subjects"])


def as_table(counts: pd.DataFrame) -> list[str]:
    """Subjects of each target by class and, where there are several, by site, as lines of text."""
    lines = []
    for target, of_target in counts.groupby("target", sort=False):
        values = list(dict.fromkeys(of_target["value"]))
        wide = of_target.pivot(index="site", columns="value", values="subjects")
        wide = wide.loc[list(dict.fromkeys(of_target["site"])), values]
        rows = [[f"{target}", *values], *([place, *map(str, row)] for place, row in _rows(wide))]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [""]
        for first, *rest in rows:
            cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
            lines.append("  ".join(["  " + first.ljust(widths[0]), *cells]))
    return lines


def _rows(wide: pd.DataFrame) -> list[tuple[str, list[int]]]:
    return [(str(place), list(row)) for place, row in zip(wide.index, wide.values, strict=True)]
