"""The report's sections on trainings: tables and curves, those of folds together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from neuromamba import figures
from neuromamba.collect import Evaluation, Training
from neuromamba.config import Config
from neuromamba.layout import Layout
from neuromamba.tables import read_table
from neuromamba.verdicts import number

CODES = {
    "slices": "the tokenizer",
    "pca": "principal components",
    "dct": "cosine transform",
}
"""Codes of slices in words."""


def label_of(item: Training | Evaluation) -> str:
    """A training or evaluation in words; folds of one have the same."""
    return f"{item.model}, seed {item.seed}"


def group_folds(trainings: Sequence[Training]) -> dict[str, list[Training]]:
    """The trainings of each model and seed: one, or one for each fold."""
    groups: dict[str, list[Training]] = {}
    for training in trainings:
        groups.setdefault(label_of(training), []).append(training)
    return groups


def describe_trainings(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """A row of the table for each model and seed; values of folds are means."""
    return [_describe(label, group) for label, group in group_folds(trainings).items()]


def _describe(label: str, group: Sequence[Training]) -> dict[str, Any]:
    infos = [training.info for training in group]
    rows = [t.metrics[t.metrics["split"] == "train"] for t in group]
    minutes = [float(table["seconds"].max()) / 60 for table in rows if "seconds" in table]
    left_out = {run: why for info in infos for run, why in info.get("left_out", {}).items()}
    return {
        "label": label,
        "folds": len(group),
        "steps": _mean([info["step"] for info in infos]),
        "best_step": _mean([info["best"]["step"] for info in infos]),
        "loss": number(float(np.mean([info["best"]["loss"] for info in infos]))),
        "skills": skills_of(group),
        "minutes": number(sum(minutes), 1) if minutes else "n/a",
        "n_train": _mean([len(info["subjects"]["train"]) for info in infos]),
        "n_validation": _mean([len(info["subjects"]["validation"]) for info in infos]),
        "is_probe": all("probe" in info for info in infos),
        "left_out": left_out,
    }


def _mean(counts: Sequence[int]) -> str:
    """Counts as one number: in full where they agree."""
    mean = float(np.mean(counts))
    return number(int(mean) if mean.is_integer() else mean, 1)


def skills_of(group: Sequence[Training]) -> dict[str, str]:
    """Skills at the best step by what they are over, means over folds."""
    best = [training.info["best"] for training in group]
    names = [name for name in best[0] if name.startswith("skill_")]
    return {
        name.removeprefix("skill_"): f"{np.mean([one[name] for one in best]):+.3f}"
        for name in names
    }


def draw_curves(trainings: Sequence[Training]) -> dict[str, str | None]:
    """Pictures of the losses and, where the model tells them, of the skills."""
    if not trainings:
        return {"loss": None, "skill": None}
    groups = group_folds(trainings)
    tables = {label: [training.metrics for training in group] for label, group in groups.items()}
    return {"loss": figures.loss_curves(tables), "skill": figures.skill_curves(tables)}


def describe_tokenizer(config: Config, dataset: str) -> list[dict[str, str]]:
    """A row for each code of slices that was measured, means over folds; none where none was."""
    if not config.codes.trained:
        return []
    folders = [Layout.of(config.in_fold(name), dataset).tokenizer for name in config.splits.names]
    tables = [read_table(one / "quality.tsv") for one in folders if (one / "model.json").exists()]
    if not tables:
        return []
    means = pd.concat(tables).groupby("code", sort=False).mean()
    return [
        {
            "code": CODES.get(str(code), str(code)),
            "values": number(int(row["values"])),
            "explained": f"{row['explained']:.3f}",
            "explained_changes": f"{row['explained_changes']:.3f}",
        }
        for code, row in means.iterrows()
    ]


def describe_models(config: Config, trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """Models of the config, with the number of parameters of what was pretrained.

    Ablations, which are made on request alone, are among them once they have been trained.
    """
    trained = {training.model for training in trainings}
    parameters = {
        training.model: training.info.get("parameters")
        for training in trainings
        if training.stage == "pretrain"
    }
    hidden = {"base", "ablation_of", "pretrain", "finetune", "family"}
    return [
        {
            "name": name,
            "settings": model,
            "parameters": parameters.get(model.base or name),
            "keys": model.model_dump(mode="json", exclude=hidden),
        }
        for name, model in config.models.items()
        if name in trained or name not in config.ablations
    ]
