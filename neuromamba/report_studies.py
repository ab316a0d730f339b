"""The report's sections on what few runs have: scaling, forecasts, identification, retrieval."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.config import Config
from neuromamba.files import read_json
from neuromamba.identify_figure import LABELS, PAIRS
from neuromamba.layout import Layout
from neuromamba.tables import read_table
from neuromamba.verdicts import interval, number, p_value

SKILL = "skill_"
ENDS = ("_low", "_high", "_chance")
SCORES = {"auroc": "AUROC", "balanced_accuracy": "balanced accuracy"}
"""Of the predictions of a retrieval, what is shown."""


def describe_scaling(config: Config) -> list[dict[str, Any]]:
    """The scaling studies of datasets and mixtures that have one."""
    found = []
    for name in [*config.datasets, *config.mixtures]:
        folder = Layout.of(config, name).scaling
        if (folder / "fit.json").exists():
            fit = read_json(folder / "fit.json")
            found.append(
                {
                    "name": name,
                    "verdict": fit["verdict"],
                    "claimed": fit["power_law_claimed"],
                    "points": len(fit["points"]),
                    "figure": _svg(folder / "scaling.svg"),
                }
            )
    return found


def describe_forecasts(config: Config) -> list[dict[str, Any]]:
    """The forecasts of each dataset, model, seed and fold that has them."""
    found = []
    for name, label, layout, model, seed in _of_models(config):
        folder = layout.forecast(model, seed)
        if (folder / "forecast.json").exists():
            facts = read_json(folder / "forecast.json")
            table = read_table(folder / "forecast.tsv")
            found.append(
                {
                    "label": f"{name}, {label}",
                    "facts": facts,
                    "figure": _svg(folder / "forecast.svg"),
                    **forecast_rows(table),
                }
            )
    return found


def forecast_rows(table: pd.DataFrame) -> dict[str, Any]:
    """Skills by horizon, with intervals, as text: the last is the farthest."""
    over = [
        str(name).removeprefix(SKILL)
        for name in table
        if str(name).startswith(SKILL) and not str(name).endswith(("_low", "_high"))
    ]
    rows = []
    for row in table.to_dict("records"):
        skills = {name: interval(*_bounds(row, f"{SKILL}{name}"), digits=3) for name in over}
        seconds = row.get("seconds")
        time = f"{number(float(seconds), 1)} s" if pd.notna(seconds) else f"{row['volumes']} vol."
        rows.append({"time": time, "n": number(int(row["n"])), "skills": skills})
    return {"over": [name.replace("_", " ") for name in over], "names": over, "rows": rows}


def describe_identification(config: Config) -> list[dict[str, Any]]:
    """How well each dataset, model, seed and fold tells people apart, beside the others."""
    found = []
    for name, label, layout, model, seed in _of_models(config):
        folder = layout.identify(model, seed)
        # What the stage writes last.
        if (folder / "identify.json").exists():
            table = read_table(folder / "identify.tsv", dtype={"predictor": str, "pairs": str})
            found.append(
                {
                    "label": f"{name}, {label}",
                    "facts": read_json(folder / "identify.json"),
                    "figure": _svg(folder / "identify.svg"),
                    "rows": [_identified(row) for row in table.to_dict("records")],
                }
            )
    return found


def _identified(row: dict[Any, Any]) -> dict[str, str]:
    cells = {name: interval(*_bounds(row, name)) for name in ("accuracy", "percentile_rank")}
    return {
        "predictor": LABELS.get(row["predictor"], row["predictor"]),
        "pairs": PAIRS.get(row["pairs"], row["pairs"]),
        "n": number(int(row["n"])),
        "chance": number(float(row["chance"])),
        "p": p_value(float(row["accuracy_p"])),
        **cells,
    }


def describe_retrieval(config: Config) -> list[dict[str, Any]]:
    """How well each dataset, model, seed and fold brings two kinds of data together."""
    found = []
    for name, label, layout, model, seed in _of_models(config):
        folder = layout.retrieve(model, seed)
        # What the stage writes last.
        if not (folder / "retrieve.json").exists():
            continue
        facts, table = read_json(folder / "retrieve.json"), read_table(folder / "retrieve.tsv")
        recalls = [
            str(column)
            for column in table
            if str(column).startswith("recall_") and not str(column).endswith(ENDS)
        ]
        told = folder / "metrics.tsv"
        metrics = read_table(told).to_dict("records") if told.exists() else []
        found.append(
            {
                "label": f"{name}, {label}",
                "facts": facts,
                "figure": _svg(folder / "retrieve.svg"),
                "at": [column.removeprefix("recall_") for column in recalls],
                "rows": [_retrieved(row, recalls) for row in table.to_dict("records")],
                "predictions": [_predicted(row) for row in metrics if row["metric"] in SCORES],
            }
        )
    return found


def _retrieved(row: dict[Any, Any], recalls: list[str]) -> dict[str, Any]:
    return {
        "direction": row["direction"],
        "n": number(int(row["n"])),
        "recalls": [
            (interval(*_bounds(row, name)), number(float(row[f"{name}_chance"])))
            for name in recalls
        ],
        "mean_rank": interval(*_bounds(row, "mean_rank")),
        "mean_rank_chance": number(float(row["mean_rank_chance"]), 1),
    }


def _predicted(row: dict[Any, Any]) -> dict[str, str]:
    return {
        "target": row["target"],
        "predictor": row["predictor"].replace("svm-", "SVM on embeddings: ").replace("-", " "),
        "metric": SCORES[row["metric"]],
        "value": interval(float(row["value"]), float(row["low"]), float(row["high"])),
        "p": p_value(float(row["p"])),
        "n": number(int(row["n"])),
    }


def _bounds(row: dict[Any, Any], name: str) -> tuple[float, float, float]:
    """A value of a row and the ends of its interval."""
    return float(row[name]), float(row[f"{name}_low"]), float(row[f"{name}_high"])


def _of_models(config: Config) -> Iterator[tuple[str, str, Layout, str, int]]:
    """Every dataset, pretrained model, seed and fold: dataset, the rest in words, and where.

    Of models that share a pretraining both studies are the same, so they are of its own model only.
    """
    for name in config.datasets:
        for model in config.pretrained_models:
            for seed in config.seeds:
                for fold in config.splits.names:
                    label = f"{model}, seed {seed}" + (f", {fold}" if fold else "")
                    yield name, label, Layout.of(config.in_fold(fold), name), model, seed


def _svg(path: Path) -> str | None:
    """A figure that a stage drew, as a `data:` address."""
    if not path.exists():
        return None
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
