"""The report: one HTML page over all datasets, models, seeds and targets of a run, and a summary.

The page holds its pictures, its style and its script, asks nothing of the network, and is read on a
phone as well as on paper. It is written for a reader who did not run anything: what a number means
stands beside it. All words about who is better follow from paired comparisons whose p are corrected
for their number, never from a glance at two numbers. Beside it go the metrics as a table, and the
methods to copy into a paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.collect import Data, Evaluation, Training, collect_data, collect_trainings
from neuromamba.config import Config
from neuromamba.correction import collect_corrected
from neuromamba.files import write_text
from neuromamba.methods import Facts, describe_methods, write_methods
from neuromamba.report_brain import describe_brain
from neuromamba.report_compute import describe_jobs, read_benchmarks
from neuromamba.report_compute import describe_trainings as describe_efforts
from neuromamba.report_data import LONGEST_LIST, describe_data
from neuromamba.report_metrics import write_report_metrics
from neuromamba.report_reproduce import describe_provenance
from neuromamba.report_results import describe_target
from neuromamba.report_seeds import seed_means
from neuromamba.report_studies import (
    describe_forecasts,
    describe_identification,
    describe_retrieval,
    describe_scaling,
)
from neuromamba.report_training import (
    describe_models,
    describe_tokenizer,
    describe_trainings,
    draw_curves,
    group_folds,
    skills_of,
)
from neuromamba.templates import environment
from neuromamba.verdicts import METRICS, result_rows, verdict


@dataclass(frozen=True)
class Found:
    """What one dataset's results hold.

    `pretrained` and `finetuned` are trainings; `evaluations` are by target, p values corrected.
    """

    data: Data
    pretrained: list[Training]
    finetuned: list[Training]
    evaluations: dict[str, list[Evaluation]]

    @property
    def trainings(self) -> list[Training]:
        return [*self.pretrained, *self.finetuned]


def run_report(config: Config) -> None:
    """Write `report/index.html` under the results folder, over whatever results there are.

    Before it `metrics.tsv` and `metrics.json`, `methods.md` and `references.bib` beside it.
    """
    found = [_collect(config, name) for name in config.datasets]
    described = describe(config, found)
    page, folder = report_path(config), report_path(config).parent
    evaluations = [one for of in found for group in of.evaluations.values() for one in group]
    write_report_metrics(folder, config, evaluations)
    write_methods(folder, described["methods"])
    write_text(page, environment().get_template("report.html.j2").render(described))


def report_path(config: Config) -> Path:
    """Where the page lies."""
    return Path(config.results) / "report" / "index.html"


def _collect(config: Config, name: str) -> Found:
    return Found(
        collect_data(config, name),
        list(collect_trainings(config, name, "pretrain")),
        [
            training
            for target in config.datasets[name].targets
            for training in collect_trainings(config, name, target)
        ],
        collect_corrected(config, name),
    )


# --- The page -----------------------------------------------------------------------------------


def describe(config: Config, found: Sequence[Found]) -> dict[str, Any]:
    """Everything that the page's template shows."""
    datasets = [_describe_dataset(config, of) for of in found]
    trainings = [training for of in found for training in of.trainings]
    benchmarks = read_benchmarks(config)
    studies = {
        "scaling": describe_scaling(config),
        "forecasts": describe_forecasts(config),
        "identification": describe_identification(config),
        "retrieval": describe_retrieval(config),
    }
    facts = _facts(found, datasets, studies, benchmarks)
    return {
        "datasets": datasets,
        "config": config,
        "models": describe_models(config, trainings),
        "studies": studies,
        "jobs": describe_jobs(benchmarks),
        "efforts": describe_efforts(trainings),
        "provenance": describe_provenance(config, trainings),
        "methods": describe_methods(config, facts),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "confidence": f"{config.evaluate.confidence:.0%}",
        "metrics": METRICS,
        "longest": LONGEST_LIST,
    }


def _describe_dataset(config: Config, found: Found) -> dict[str, Any]:
    name, means = found.data.name, seed_means(config, found.evaluations)
    return {
        "name": name,
        "settings": config.datasets[name],
        "data": describe_data(config, found.data),
        "brain": describe_brain(config, found.data),
        "pretraining": describe_trainings(found.pretrained),
        "curves": draw_curves(found.pretrained),
        "tokenizer": describe_tokenizer(config, name),
        "targets": [
            describe_target(config, found.data, target, evaluations, means[target])
            for target, evaluations in found.evaluations.items()
        ],
    }


def _facts(
    found: Sequence[Found],
    datasets: Sequence[dict[str, Any]],
    studies: dict[str, list[dict[str, Any]]],
    benchmarks: pd.DataFrame,
) -> Facts:
    """What the methods may tell of."""
    brains = {one["name"]: one["brain"] for one in datasets}
    volumes = {name: brain["volume"] for name, brain in brains.items() if brain["volume"]}
    return Facts(
        data=[of.data for of in found],
        attributes={name: volume["attributes"] for name, volume in volumes.items()},
        trainings=[training for of in found for training in of.trainings],
        evaluations=[one for of in found for group in of.evaluations.values() for one in group],
        maps=[one["about"] for brain in brains.values() for one in brain["maps"]],
        forecasts=bool(studies["forecasts"]),
        identified=bool(studies["identification"]),
        retrieved=bool(studies["retrieval"]),
        scaled=bool(studies["scaling"]),
        by_snakemake=not benchmarks.empty,
    )


# --- The summary --------------------------------------------------------------------------------


def summary(config: Config) -> str:
    """The main figures as plain text: the test score of each predictor, and who is better."""
    lines = []
    for dataset in config.datasets:
        trainings = list(collect_trainings(config, dataset, "pretrain"))
        for label, group in group_folds(trainings).items():
            skills = ", ".join(f"{value} over {name}" for name, value in skills_of(group).items())
            if skills:
                lines.append(f"{dataset}, {label}: next-patch skill {skills}")
        for target, evaluations in collect_corrected(config, dataset).items():
            if evaluations:
                alpha = 1 - config.evaluate.confidence
                lines += ["", *_summarise(dataset, target, evaluations, alpha)]
    path = report_path(config)
    lines += ["", f"report: {path}" if path.exists() else "no report yet: neuromamba report"]
    return "\n".join(lines).strip()


def _summarise(
    dataset: str, target: str, evaluations: Sequence[Evaluation], alpha: float
) -> list[str]:
    rows = result_rows(evaluations)
    names = list(rows[0].cells)
    width = max(len(row.label) for row in rows)
    test = f"{evaluations[0].notes['n_test']} test subjects"
    lines = [f"{dataset}: {target} ({test}; intervals in brackets)"]
    for row in rows:
        cells = "   ".join(f"{METRICS[name].label} {row.cells[name].text}" for name in names)
        lines.append(f"  {row.label:<{width}}  {cells}")
    return lines + [f"  {verdict(evaluation, alpha)}" for evaluation in evaluations]
