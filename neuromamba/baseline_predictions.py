"""Predict the test subjects by the baselines, once for all models and seeds.

Who is trained on and tested is the same for models and baselines: `choose_subjects`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.baselines import Subjects, predict_baselines
from neuromamba.config import Config
from neuromamba.confound_model import confounds_of
from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.participants import read_participants
from neuromamba.qc_rules import left_out
from neuromamba.splits import read_split
from neuromamba.stage import usable_runs
from neuromamba.tables import read_table, write_table

PREDICTIONS = "predictions.tsv"


def choose_subjects(config: Config, dataset: str, target: str) -> Subjects:
    """Join the split with the labels of one target, and with the subjects that have good runs.

    A split outlives the runs of a subject, which another atlas or rule of quality may leave out.

    Raises
    ------
    InputError
        When too few subjects have a label, or the training subjects have one class.
    """
    settings = config.datasets[dataset]
    kind = settings.targets[target]
    split = read_split(Layout.of(config, dataset).split)
    everybody = [*split["train"], *split["validation"], *split["test"]]
    labels = read_participants(settings)[target].reindex(everybody).dropna()
    has_runs = labels.index.isin(_good_runs(config, dataset)["subject"])
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
    classes = list(kind.classes) if kind.kind == "classification" else []
    unlabelled = len(everybody) - lost - len(train) - len(test)
    return Subjects(classes, train, test, unlabelled, lost)


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
    write_table(folder / PREDICTIONS, together[["subject", "predictor", *subjects.columns]])
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
    kinds = {"subject": str, "predictor": str}
    table = read_table(folder / PREDICTIONS, dtype=kinds)
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
    """`predict_baselines` on a dataset's results.

    Seeded by `splits.seed`: the baselines are the same beside every model and every model's seed.
    """
    runs = _good_runs(config, dataset)
    stores, confounds = _stores(config, dataset, runs), confounds_of(config, dataset, target, runs)
    return predict_baselines(config.evaluate, subjects, stores, confounds, config.splits.seed)


def _good_runs(config: Config, dataset: str) -> pd.DataFrame:
    """Runs that have tokens and ROI series and are good enough: `run`, `subject`."""
    layout = Layout.of(config, dataset)
    index = read_table(layout.index, dtype={"run": str, "subject": str})
    batches = range(config.compute.batches)
    usable = [
        set(usable_runs([layout.manifest(stage, batch) for batch in batches]))
        for stage in ("tokens", "rois")
    ]
    good = (usable[0] & usable[1]) - set(left_out(config, dataset))
    return index.loc[index["run"].isin(list(good)), ["run", "subject"]]


def _stores(config: Config, dataset: str, runs: pd.DataFrame) -> dict[str, list[Path]]:
    """The ROI stores of each subject's runs."""
    layout = Layout.of(config, dataset)
    stores: dict[str, list[Path]] = {}
    for run, subject in runs.itertuples(index=False):
        stores.setdefault(subject, []).append(layout.array("rois", run))
    return stores
