"""Predict the test subjects by a fine-tuned model, and score it beside the baselines.

Design choices
--------------
- Predictions are written first. The metrics are computed from the file as it was read back, so
  that anyone can compute them again, or others, without a model.
- Every table has the baselines of `neuromamba.baselines` in it, on the same subjects.
- A subject that the model, or the one it was fine-tuned from, was trained or chosen on is refused,
  unless `evaluate.allow_seen_subjects` says otherwise; the notes then name them for the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from neuromamba.baseline_predictions import choose_subjects, read_baselines
from neuromamba.baselines import BASELINES, Subjects, no_features
from neuromamba.checkpoint import load_model_info
from neuromamba.config import Config
from neuromamba.events import state_of, subject_of
from neuromamba.files import InputError, write_json
from neuromamba.finetune import predict_subjects
from neuromamba.layout import Layout
from neuromamba.record import seen_subjects
from neuromamba.scoring import write_metrics
from neuromamba.tables import write_table


def find_seen(config: Config, dataset: str, info: dict[str, Any], test: Sequence[str]) -> list[str]:
    """Test subjects that the model was trained or chosen on; refused unless the config allows it.

    Raises
    ------
    InputError
        Naming some of the subjects.
    """
    seen = sorted(seen_subjects(info, dataset) & set(test))
    if seen and not config.evaluate.allow_seen_subjects:
        raise InputError(
            f"{Layout.of(config, dataset).split}: {len(seen)} of {len(test)} test "
            f"subjects were used to train the model: {', '.join(seen[:5])}"
            f"{', ...' if len(seen) > 5 else ''}; train it again on this split, or set "
            "evaluate.allow_seen_subjects: true, and the report will say so"
        )
    return seen


def predict_model(
    config: Config, dataset: str, model: str, seed: int, target: str, subjects: Subjects
) -> pd.DataFrame:
    """The model's predictions of the test subjects, checked to be whole and finite.

    Returns
    -------
    pandas.DataFrame
        Indexed by subject (of states, by sample) in the order of `subjects.test`: `prob_<class>`
        columns, or `value`.
    """
    test = list(subjects.test.index)
    predicted = predict_subjects(config, dataset, model, seed, target, test).set_index("subject")
    predicted = predicted.reindex(test)[subjects.columns].astype(float)
    bad = [name for name, row in predicted.iterrows() if not np.isfinite(row).all()]
    if bad:
        raise InputError(
            f"{model} gives no finite prediction for {', '.join(map(str, bad[:5]))}; its training "
            "may have diverged: look at its metrics.jsonl, and train with a lower learning_rate"
        )
    return predicted


def tabulate(name: str, predicted: pd.DataFrame, subjects: Subjects) -> pd.DataFrame:
    """Rows of `predictions.tsv` for one predictor.

    Returns
    -------
    pandas.DataFrame
        Columns `subject`, `state` (of states alone, and then the same as `y_true`), `predictor`,
        `y_true`, `y_pred` (most probable class, or value), `y_score` (probability of the positive
        class of two, else missing), `prob_<class>`.
    """
    samples = predicted.index
    table = pd.DataFrame({"subject": samples.map(subject_of), "predictor": name})
    if state_of(samples[0]):
        table.insert(1, "state", samples.map(state_of))
    table["y_true"] = subjects.test.loc[samples].to_numpy()
    if not subjects.classes:
        table["y_pred"] = predicted["value"].to_numpy()
        return table.assign(y_score=np.nan)
    table["y_pred"] = np.array(subjects.classes)[predicted.to_numpy().argmax(axis=1)]
    two = len(subjects.classes) == 2
    table["y_score"] = predicted.iloc[:, -1].to_numpy() if two else np.nan
    return table.join(predicted.reset_index(drop=True))


def run_evaluate(config: Config, dataset: str, model: str, seed: int, target: str) -> None:
    """Write `predictions.tsv`, `notes.json`, `comparison.tsv` and, last, `metrics.tsv`.

    Raises
    ------
    InputError
        When there is no finished model, when it was trained on a test subject, when the baselines
        have not been predicted, or when the labels do not allow an evaluation.
    """
    layout = Layout.of(config, dataset)
    folder = layout.evaluate(model, seed, target)
    if model in BASELINES:
        raise InputError(f"models: {model!r} is the name of a baseline; rename its YAML file")
    subjects = choose_subjects(config, dataset, target)
    info = load_model_info(layout.finetune(model, seed, target))
    seen = find_seen(config, dataset, info, subjects.tested)
    baselines, baseline_notes = read_baselines(config, dataset, target, subjects)
    constant = "majority" if subjects.classes else "mean"
    share = no_features(subjects.train, subjects.classes)
    simple = pd.DataFrame(list(share.values()), subjects.columns).T
    predicted = {
        model: predict_model(config, dataset, model, seed, target, subjects),
        **baselines,
        constant: simple.loc[[0] * len(subjects.test)].set_axis(subjects.test.index),
    }
    tables = [tabulate(name, table, subjects) for name, table in predicted.items()]
    write_table(folder / "predictions.tsv", pd.concat(tables, ignore_index=True))
    notes: dict[str, Any] = {
        "n_train": len(set(subjects.people)),
        "n_test": len(subjects.tested),
        "n_unlabelled": subjects.unlabelled,
        "n_without_runs": subjects.without_runs,
        "classes": subjects.classes,
        "train_labels": share,
        "baselines": baseline_notes,
        "baselines_left_out": sorted({*config.evaluate.baselines} - {*baselines}),
        "seen_subjects": seen,
    }
    if target in config.datasets[dataset].state_targets:
        notes["samples"] = {"train": len(subjects.train), "test": len(subjects.test)}
    write_json(folder / "notes.json", notes)
    write_metrics(folder, model, config)
