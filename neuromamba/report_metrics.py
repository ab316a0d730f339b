"""All metrics of a run as one table, with a sidecar that says what its columns are, as in BIDS."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.baseline_notes import BASELINES
from neuromamba.collect import Evaluation
from neuromamba.config import Config
from neuromamba.files import write_json
from neuromamba.tables import write_table
from neuromamba.verdicts import METRICS

COLUMNS = [
    "dataset",
    "target",
    "model",
    "seed",
    "predictor",
    "metric",
    "value",
    "low",
    "high",
    "p",
    "p_holm",
    "n",
]


def tabulate_metrics(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    """Every metric of every predictor of all evaluations, with the columns of `COLUMNS`.

    Baselines stand beside each model and seed that they were compared with.
    """
    tables = []
    for one in evaluations:
        where: dict[str, Any] = {
            "dataset": one.dataset,
            "target": one.target,
            "model": one.model,
            "seed": one.seed,
        }
        tables.append(one.metrics.assign(**where))
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    return pd.concat(tables, ignore_index=True).reindex(columns=COLUMNS)


def write_report_metrics(folder: Path, config: Config, evaluations: Sequence[Evaluation]) -> None:
    """Write `metrics.json`, the sidecar, and `metrics.tsv`."""
    write_json(folder / "metrics.json", describe_columns(config, evaluations))
    write_table(folder / "metrics.tsv", tabulate_metrics(evaluations))


def describe_columns(config: Config, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The sidecar: a description of each column, in the terms of BIDS."""
    settings = config.evaluate
    bound = f"bound of the {settings.confidence:.0%} bootstrap interval over test subjects"
    models = {one.model for one in evaluations}
    named = {name: f"the model {name}" for name in sorted(models)} | dict(BASELINES)
    shuffles = f"{settings.permutations} permutations"
    return {
        "dataset": {"Description": "Dataset that the subjects are of"},
        "target": {"Description": "What is predicted of a subject"},
        "model": {"Description": "Model that was evaluated"},
        "seed": {"Description": "Seed of the model's trainings"},
        "predictor": {
            "LongName": "Predictor",
            "Description": "What the metric is of: the model, or a baseline on the same subjects",
            "Levels": named,
        },
        "metric": {
            "Description": "Which measure of the predictions of the test subjects",
            "Levels": {name: f"{m.label}: {m.meaning}" for name, m in METRICS.items()},
        },
        "value": {
            "Description": "The metric; of a cross-validation, its mean over folds",
            "Units": "1, of mae the unit of the target",
        },
        "low": {"Description": f"Lower {bound}", "Units": "as value"},
        "high": {"Description": f"Upper {bound}", "Units": "as value"},
        "p": {
            "Description": f"p against chance, one-sided, by {shuffles} of the labels, uncorrected",
            "Units": "1",
        },
        "p_holm": {
            "Description": "p of the model, corrected by Holm over the models, seeds and targets "
            "of the dataset; n/a for baselines",
            "Units": "1",
        },
        "n": {"Description": "Test subjects", "Units": "subjects"},
    }
