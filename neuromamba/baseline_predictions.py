"""Predict the test subjects by the baselines, once for all models and seeds.

Who is trained on and tested is the same for models and baselines: `choose_subjects`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.baselines import Subjects, predict_baselines
from neuromamba.config import Config, Evaluate
from neuromamba.confound_model import confounds_of, says_target, state_confounds
from neuromamba.events import sample_name, state_of, subject_of
from neuromamba.excerpts import Excerpt
from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.participants import read_participants
from neuromamba.splits import read_split
from neuromamba.states import States, good_runs, read_states, usable_of
from neuromamba.tables import read_table, write_table

PREDICTIONS = "predictions.tsv"
BY_SITE = ("fc-combat",)
"""Baselines that take out the effects of sites."""


def choose_subjects(config: Config, dataset: str, target: str) -> Subjects:
    """Join the split with the labels of one target, and with the subjects that have good runs.

    A split outlives the runs of a subject, which another atlas or rule of quality may leave out.

    Raises
    ------
    InputError
        When too few subjects have a label, or the training subjects have one class.
    """
    settings = config.datasets[dataset]
    if target in settings.state_targets:
        return choose_samples(config, dataset, target)
    kind = settings.subject_targets[target]
    split = read_split(Layout.of(config, dataset).split)
    everybody = [*split["train"], *split["validation"], *split["test"]]
    labels = read_participants(settings)[target].reindex(everybody).dropna()
    has_runs = labels.index.isin(good_runs(config, dataset)["subject"])
    lost, labels = int((~has_runs).sum()), labels[has_runs]
    train = labels.reindex(sorted([*split["train"], *split["validation"]])).dropna()
    test = labels.reindex(split["test"]).dropna()
    where = f"{settings.participants and settings.participants.file}: column {kind.column!r}"
    if len(train) < 2 or len(test) < 2:
        raise InputError(
            f"{where} has a label for {len(train)} training and {len(test)} test subject(s) with "
            "usable runs; "
            "evaluation needs 2 of each: add labels, subjects, or share (splits.test)"
        )
    if train.nunique() < 2:
        raise InputError(
            f"{where} has the one value {train.iloc[0]!r} for all {len(train)} training subjects; "
            "there is nothing to tell apart: correct the target's `classes` or remove the target"
        )
    unlabelled = len(everybody) - lost - len(train) - len(test)
    return Subjects(kind.class_names, train, test, unlabelled, lost)


def choose_samples(config: Config, dataset: str, target: str) -> Subjects:
    """The samples of a target that is a state: each subject in each state that it was in.

    They are those that windows of every model of the config find, so that all predict the same.

    Raises
    ------
    InputError
        When there are no events, too few subjects have a sample, or training has one state.
    """
    settings = config.datasets[dataset]
    spec = settings.state_targets[target]
    split = read_split(Layout.of(config, dataset).split)
    states = read_states(config, dataset, target)
    found = states.samples(model.volumes for model in config.models.values())
    names = pd.Series(found, dtype=int).map(dict(enumerate(spec.class_names)))
    people = names.index.map(subject_of)
    train = names[people.isin([*split["train"], *split["validation"]])].sort_index()
    test = names[people.isin(split["test"])].sort_index()
    counts = [one.index.map(subject_of).nunique() for one in (train, test)]
    where = f"{settings.events_folder}: column {spec.column!r} of the events (target {target!r})"
    if min(counts) < 2:
        raise InputError(
            f"{where} gives a state to {counts[0]} training and {counts[1]} test subject(s); "
            "evaluation needs 2 of each: look at the target's classes, lag and share, or add "
            "subjects"
        )
    if train.nunique() < 2:
        raise InputError(
            f"{where} gives the one state {train.iloc[0]!r} to all training subjects; there is "
            "nothing to tell apart: correct the target's `classes` or remove the target"
        )
    usable = set(usable_of(config, dataset)["subject"])
    everybody = [name for part in split.values() for name in part]
    unlabelled = len(usable & set(everybody)) - sum(counts)
    return Subjects(spec.class_names, train, test, unlabelled, states=states)


def run_baselines(config: Config, dataset: str, target: str) -> None:
    """Write `predictions.tsv` (a row for each baseline and test subject) and, last, `notes.json`.

    Raises
    ------
    InputError
        When the labels or the FC do not allow an evaluation.
    """
    folder = Layout.of(config, dataset).baselines(target)
    subjects = choose_subjects(config, dataset, target)
    predicted, notes = predict_references(config, dataset, target, subjects)
    tables = [
        table.rename_axis("subject").reset_index().assign(predictor=name)
        for name, table in predicted.items()
    ]
    together = pd.concat(tables, ignore_index=True)
    columns = ["subject", "predictor", *subjects.columns]
    if target in config.datasets[dataset].state_targets:
        samples = together["subject"]
        together = together.assign(subject=samples.map(subject_of), state=samples.map(state_of))
        columns.insert(1, "state")
    write_table(folder / PREDICTIONS, together[columns])
    write_json(folder / "notes.json", notes)


def read_baselines(
    config: Config, dataset: str, target: str, subjects: Subjects
) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, Any]]]:
    """What `run_baselines` wrote, in the form of `predict_baselines`.

    Raises
    ------
    InputError
        When it has not run, or for other test subjects.
    """
    folder = Layout.of(config, dataset).baselines(target)
    if not (folder / "notes.json").exists():
        raise InputError(f"{folder}: the baselines have not been predicted; run that stage first")
    kinds = dict.fromkeys(("subject", "state", "predictor"), str)
    table = read_table(folder / PREDICTIONS, dtype=kinds)
    if "state" in table:
        pairs = zip(table["subject"], table["state"], strict=True)
        table["subject"] = [sample_name(*pair) for pair in pairs]
    notes = read_json(folder / "notes.json")
    predicted = {}
    for name in notes:
        of_baseline = table[table["predictor"] == name].set_index("subject")
        if set(of_baseline.index) != set(subjects.test.index):
            raise InputError(
                f"{folder / PREDICTIONS} is of other test subjects than the split, labels and runs "
                "of now; predict the baselines again"
            )
        predicted[name] = of_baseline.loc[subjects.test.index, subjects.columns]
    return predicted, notes


def predict_references(
    config: Config, dataset: str, target: str, subjects: Subjects
) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, Any]]]:
    """`predict_baselines` on a dataset's results, without those that know nothing of the target.

    Seeded by `splits.seed`: the baselines are the same beside every model and every model's seed.
    """
    if subjects.states is not None:
        return _predict_states(config, dataset, subjects, subjects.states)
    runs = good_runs(config, dataset)
    stores, confounds = _stores(config, dataset, runs), confounds_of(config, dataset, target, runs)
    settings = config.datasets[dataset]
    site = settings.participants.site_column if settings.participants else None
    # What tells one site from another is all that there is to predict a site by.
    without = BY_SITE if says_target(settings, target, "site", site) else ()
    chosen = _leave_out(config.evaluate, without)
    return predict_baselines(chosen, subjects, stores, confounds, config.splits.seed)


def _leave_out(settings: Evaluate, names: Sequence[str]) -> Evaluate:
    kept = [name for name in settings.baselines if name not in names]
    return settings.model_copy(update={"baselines": kept})


def _predict_states(
    config: Config, dataset: str, subjects: Subjects, states: States
) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, Any]]]:
    """`predict_references` of samples, without the baselines that know nothing of a state.

    Age or site are the same in all states of a subject. Head motion is not, where it is known.
    """
    layout = Layout.of(config, dataset)
    stores = {}
    for sample in [*subjects.train.index, *subjects.test.index]:
        number = subjects.classes.index(state_of(sample))
        runs = states.runs[subject_of(sample)]
        taken = [(layout.array("rois", run), states.labels[run] == number) for run in runs]
        stores[sample] = [Excerpt(tuple(part for part in taken if part[1].any()))]
    confounds = state_confounds(config, dataset, states, list(stores))
    known = confounds.loc[subjects.train.index].nunique().gt(1).any()
    # A site is the same in all states of a subject: there is nothing to take out.
    without = BY_SITE if known else (*BY_SITE, "confounds", "fc-regress")
    settings = _leave_out(config.evaluate, without)
    return predict_baselines(settings, subjects, stores, confounds, config.splits.seed)


def _stores(config: Config, dataset: str, runs: pd.DataFrame) -> dict[str, list[Path]]:
    """The ROI stores of each subject's runs."""
    layout = Layout.of(config, dataset)
    stores: dict[str, list[Path]] = {}
    for run, subject in runs.itertuples(index=False):
        stores.setdefault(subject, []).append(layout.array("rois", run))
    return stores
