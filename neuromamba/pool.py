"""Put the predictions of all folds of a cross-validation together, and score them.

Every subject is then tested once in each repeat, by models that have not seen it. What the figures
mean over folds is told in `neuromamba.metrics`.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from neuromamba.config import Config
from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.metrics import read_predictions
from neuromamba.scoring import write_metrics
from neuromamba.tables import write_table


def run_pool(config: Config, dataset: str, model: str, seed: int, target: str) -> None:
    """Write what `run_evaluate` does, of all folds: `predictions.tsv` has the column `fold` more.

    `notes.json` has the notes of each fold under `folds`; its own are those that they share, sums
    and means.

    Raises
    ------
    InputError
        When a fold has not been evaluated.
    """
    tables, notes = [], {}
    for name in config.splits.names:
        folder = Layout.of(config.in_fold(name), dataset).evaluate(model, seed, target)
        if not (folder / "metrics.tsv").exists():
            raise InputError(f"{folder}: {name} has not been evaluated; evaluate each fold first")
        tables.append(read_predictions(folder / "predictions.tsv").assign(fold=name))
        notes[name] = read_json(folder / "notes.json")
    together = pd.concat(tables, ignore_index=True)
    first = ["subject", "fold"]
    together = together[[*first, *(name for name in together if name not in first)]]
    folder = Layout.of(config, dataset).evaluate(model, seed, target)
    write_table(folder / "predictions.tsv", together)
    pooled = pool_notes(notes, together["subject"].nunique())
    if "state" in together:
        tested = together[["subject", "state"]].drop_duplicates()
        trained = min(one["samples"]["train"] for one in notes.values())
        pooled["samples"] = {"train": trained, "test": len(tested)}
    write_json(folder / "notes.json", pooled)
    write_metrics(folder, model, config)


def pool_notes(notes: dict[str, dict[str, Any]], tested: int) -> dict[str, Any]:
    """The notes of all folds as one: `n_train` is the least, the shares of labels are means."""
    every = list(notes.values())
    labels = pd.DataFrame([one["train_labels"] for one in every]).mean()
    return {
        **every[0],
        "n_train": min(one["n_train"] for one in every),
        "n_test": tested,
        "train_labels": {str(name): float(value) for name, value in labels.items()},
        "seen_subjects": sorted({name for one in every for name in one["seen_subjects"]}),
        "folds": notes,
    }
