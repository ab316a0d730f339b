"""The labels of a target by which models learn: whose there are, and how they are weighted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from neuromamba.config import Classification, Config, State
from neuromamba.events import subject_of
from neuromamba.files import InputError
from neuromamba.heads import ClassHead, NumberHead
from neuromamba.layout import Layout
from neuromamba.participants import read_participants
from neuromamba.pretrain import PARTS
from neuromamba.splits import read_split
from neuromamba.states import States, read_states

SHOWN = 5
"""Runs whose reasons are told."""


def read_samples(
    config: Config, dataset: str, model: str, target: str
) -> tuple[Mapping[str, int | float], States | None]:
    """The label of each subject; or, of a state, that of each sample, and what tells it."""
    if target not in config.datasets[dataset].state_targets:
        return read_labels(config, dataset, target), None
    states = read_states(config, dataset, target)
    return states.samples([config.models[model].volumes]), states


def tell_left_out(what: str, unlabelled: Mapping[str, int], states: States | None) -> None:
    """Tell the user how many subjects, and which runs of a state's target, have no label."""
    if any(unlabelled.values()):
        counts = ", ".join(f"{count} of part {part}" for part, count in unlabelled.items())
        tqdm.write(f"{what}: left out for want of a label: {counts}", sys.stderr)
    reasons = list(states.left_out.values()) if states else []
    if reasons:
        more = f" (and {len(reasons) - SHOWN} more)" if len(reasons) > SHOWN else ""
        tqdm.write(f"{what}: runs left out: {'; '.join(reasons[:SHOWN])}{more}", sys.stderr)


def labelled_subjects(
    layout: Layout, labels: Mapping[str, int | float]
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The subjects (or samples) of each part that have a label, and how many subjects have none."""
    split = read_split(layout.split)
    of_subject: dict[str, list[str]] = {}
    for name in sorted(labels):
        of_subject.setdefault(subject_of(name), []).append(name)
    subjects = {part: [n for one in split[part] for n in of_subject.get(one, [])] for part in PARTS}
    return subjects, {part: len({*split[part]} - {*of_subject}) for part in PARTS}


def read_labels(config: Config, dataset: str, target: str) -> dict[str, int | float]:
    """The label of each subject that has one: the number of its class, or its value."""
    settings = config.datasets[dataset]
    spec = settings.subject_targets[target]
    labels = read_participants(settings)[target].dropna()
    if isinstance(spec, Classification):
        number = {name: k for k, name in enumerate(spec.classes)}
        return {str(subject): number[name] for subject, name in labels.items()}
    return {str(subject): float(value) for subject, value in labels.items()}


def make_task(
    config: Config,
    dataset: str,
    target: str,
    subjects: Mapping[str, Sequence[str]],
    labels: Mapping[str, int | float],
) -> ClassHead | NumberHead:
    """The loss for a target, weighted or scaled by the labels of the training subjects.

    Raises
    ------
    InputError
        When a part has no labelled subject, or all labels of the training subjects are the same.
    """
    settings = config.datasets[dataset]
    spec = settings.targets[target]
    file = settings.participants.file if settings.participants else dataset
    if isinstance(spec, State):
        file = f"the events in {settings.events_folder}"
    where = f"{file}: column {spec.column!r} (target {target!r})"
    for part in PARTS:
        if not subjects[part]:
            raise InputError(
                f"{where} has a label for no subject of part {part!r}; add labels, or raise "
                f"splits.{part}" + ("" if part == "validation" else " by lowering the others")
            )
    values = [labels[name] for name in subjects["train"]]
    counts = Counter(values)
    if len(counts) == 1:
        what = (
            f"only class {spec.class_names[int(values[0])]!r}"
            if spec.class_names
            else f"only the value {values[0]:g}"
        )
        raise InputError(
            f"{where} has {what} for all {len(values)} training subjects, so there is nothing to "
            "learn; check the column and the target's `classes`, or remove the target"
        )
    if spec.class_names:
        share = {k: len(values) / (len(counts) * count) for k, count in counts.items()}
        return ClassHead([share.get(k, 0.0) for k in range(len(spec.class_names))])
    return NumberHead(float(np.mean(values)), float(np.std(values)))
