"""The figures of one model in the form that experiment trackers read: JSON, and curves as TSV.

They are the numbers of `evaluate` and the losses of the trainings, and nothing is computed anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from neuromamba.config import Config
from neuromamba.files import InputError, atomic_path, write_json
from neuromamba.layout import Layout
from neuromamba.tables import read_table, write_table


def run_scores(config: Config, dataset: str, model: str, seed: int) -> None:
    """Write `metrics.json`, and `loss/{training}.tsv` for each training (of each fold).

    The JSON is `{"target T": {predictor: {metric: value, metric_low: ..., metric_high: ...}}}`,
    with the bounds of the interval over subjects, and under `data` the numbers of runs. The tables
    have the columns `step`, `train`, `validation`.
    """
    layout = Layout.of(config, dataset)
    source, pretrained = config.pretraining_of(dataset, model)
    targets = config.datasets[dataset].targets
    trainings = {}
    for fold in config.splits.names:
        of_fold, end = config.in_fold(fold), f"-{fold}" if fold else ""
        folder = Layout.of(of_fold, source).pretrain(pretrained, seed)
        trainings[f"pretrain{end}"] = folder
        for target in targets:
            folder = Layout.of(of_fold, dataset).finetune(model, seed, target)
            trainings[f"finetune-{target}{end}"] = folder
    runs, excluded = read_table(layout.index), read_table(layout.excluded)
    counts = {"runs": len(runs), "runs_left_out": excluded["run"].nunique()}
    metrics: dict[str, Any] = {"data": counts}
    for target in targets:
        table = read_table(layout.evaluate(model, seed, target) / "metrics.tsv")
        metrics[f"target {target}"] = nest_metrics(table)
    folder = layout.scores(model, seed)
    with atomic_path(folder / "loss") as temporary:
        temporary.mkdir()
        for name, training in trainings.items():
            write_table(temporary / f"{name}.tsv", loss_curve(training))
    write_json(folder / "metrics.json", metrics)


def nest_metrics(table: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """`metrics.tsv` as `{predictor: {metric: value, metric_low: ..., metric_high: ...}}`."""
    nested: dict[str, dict[str, float | None]] = {}
    for row in table.to_dict("records"):
        into = nested.setdefault(str(row["predictor"]), {})
        for column, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
            value = float(row[column])
            into[f"{row['metric']}{suffix}"] = value if np.isfinite(value) else None
    return nested


def loss_curve(training: Path) -> pd.DataFrame:
    """The validation losses of a training, each with the training loss last logged before it.

    Raises
    ------
    InputError
        When the training has no `metrics.jsonl`.
    """
    path = training / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist; run the training that writes it")
    rows = pd.read_json(path, lines=True)
    rows = rows[rows["loss"].notna()] if "loss" in rows else rows.assign(loss=np.nan, split=None)
    train, validation = (
        rows.loc[rows["split"] == part, ["step", "loss"]].rename(columns={"loss": part})
        for part in ("train", "validation")
    )
    return pd.merge_asof(validation, train, on="step")[["step", "train", "validation"]]
