"""The report: one HTML page over all datasets, models, seeds and targets of a run, and a summary.

The page holds its pictures and its style, asks nothing of the network, and is read on a phone as
well as on paper. It is written for a reader who did not run anything: what a number means stands
beside it. All words about who is better follow from `comparison.tsv`, never from a glance at two
numbers.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import yaml

from neuromamba import figures
from neuromamba.baseline_notes import describe_baselines
from neuromamba.collect import (
    Data,
    Evaluation,
    Training,
    collect_data,
    collect_trainings,
    example_run,
    group_connectivity,
)
from neuromamba.config import Config, Denoise
from neuromamba.correction import collect_corrected
from neuromamba.files import write_text
from neuromamba.verdicts import (
    METRICS,
    P_VERSUS,
    number,
    result_rows,
    verdict,
    where_chance_is,
)

COLUMNS = {
    "tsnr": "tSNR",
    "mean_fd": "mean FD (mm)",
    "n_volumes": "volumes",
    "n_voxels": "brain voxels",
    "n_tokens": "tokens",
    "n_rois": "ROIs",
}
COUNTS = ("n_volumes", "n_voxels", "n_tokens", "n_rois")
LONGEST_LIST = 200
PACKAGES = ("neuromamba", "numpy", "scipy", "scikit-learn", "nibabel", "zarr", "xarray", "torch")


def run_report(config: Config) -> None:
    """Write `report/index.html` under the results folder, over whatever results there are."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("neuromamba", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template("report.html.j2").render(describe(config))
    write_text(report_path(config), page)


def report_path(config: Config) -> Path:
    """Where the page lies."""
    return Path(config.results) / "report" / "index.html"


def summary(config: Config) -> str:
    """The main figures as plain text: the test score of each predictor, and who is better."""
    lines = []
    for dataset in config.datasets:
        trainings = list(collect_trainings(config, dataset, "pretrain"))
        for training in trainings:
            skills = ", ".join(f"{value} over {name}" for name, value in _skills(training).items())
            if skills:
                lines.append(f"{dataset}, {_label(training)}: next-patch skill {skills}")
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


def describe(config: Config) -> dict[str, Any]:
    """Everything that the page's template shows."""
    datasets = [_describe_dataset(config, name) for name in config.datasets]
    trainings = [training for dataset in datasets for training in dataset["trainings"]]
    return {
        "datasets": datasets,
        "models": _describe_models(config, trainings),
        "config": config,
        "config_yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        "config_path": Path(config.results) / next(iter(config.datasets)) / "config.yaml",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "revisions": sorted({str(t.info.get("git_revision") or "unknown") for t in trainings}),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "confidence": f"{config.evaluate.confidence:.0%}",
        "metrics": METRICS,
        "longest": LONGEST_LIST,
    }


def _describe_dataset(config: Config, name: str) -> dict[str, Any]:
    data = collect_data(config, name)
    trainings = list(collect_trainings(config, name, "pretrain"))
    targets = [
        _describe_target(config, data, target, evaluations)
        for target, evaluations in collect_corrected(config, name).items()
    ]
    return {
        "name": name,
        "settings": config.datasets[name],
        "n_runs": len(data.index),
        "n_subjects": data.index["subject"].nunique(),
        "n_usable": len(data.runs),
        "n_usable_subjects": data.runs["subject"].nunique(),
        "n_sites": _n_sites(data),
        "parts": {part: len(subjects) for part, subjects in data.split.items()},
        "excluded": data.excluded.head(LONGEST_LIST).to_dict("records"),
        "n_excluded": len(data.excluded),
        "preprocessed_by": data.preprocessed_by,
        "denoised": _changes_of(config.volumes.denoise),
        "facts": _run_facts(data),
        "runs": _run_table(data),
        **_data_figures(config, data),
        "trainings": trainings,
        "pretraining": [_describe_training(training) for training in trainings],
        "curves": _curves(trainings),
        "targets": targets,
    }


def _changes_of(denoise: Denoise) -> str:
    """What is taken out of the signal, as `key value, ...`; empty where nothing is."""
    changed = {
        key: value
        for key, value in denoise.model_dump(mode="json").items()
        if value and (key in ("strategy", "detrend") or value != Denoise.model_fields[key].default)
    }
    shown = {
        key: ", ".join(value) if isinstance(value, list) else value
        for key, value in changed.items()
    }
    return "; ".join(f"{key} {value}" for key, value in shown.items())


def _describe_target(
    config: Config, data: Data, target: str, evaluations: Sequence[Evaluation]
) -> dict[str, Any]:
    settings = config.datasets[data.name].targets[target]
    trainings = list(collect_trainings(config, data.name, target))
    described: dict[str, Any] = {
        "name": target,
        "settings": settings,
        "labels": _describe_labels(data, target, settings.kind),
        "curves": _curves(trainings),
        "trainings": [_describe_training(training) for training in trainings],
        "rows": [],
    }
    if not evaluations:
        return described
    first = evaluations[0]
    rows, alpha = result_rows(evaluations), 1 - config.evaluate.confidence
    return described | {
        "rows": rows,
        "columns": list(rows[0].cells),
        "tests": {name: label for name, label in P_VERSUS.items() if name in rows[0].p},
        "baselines": describe_baselines(first.notes, settings.kind == "classification"),
        "notes": first.notes,
        "seen": sorted({subject for e in evaluations for subject in e.notes["seen_subjects"]}),
        "verdicts": [verdict(evaluation, alpha) for evaluation in evaluations],
        "chance": where_chance_is(first),
        "figure": figures.results(_by_label(evaluations)),
    }


def _by_label(evaluations: Sequence[Evaluation]) -> dict[str, pd.DataFrame]:
    """Predictions of each model and, once, of the FC baseline."""
    tables = {}
    for evaluation in evaluations[: len(figures.COLOURS) - 1]:
        own = evaluation.predictions["predictor"] == evaluation.model
        tables[_label(evaluation)] = evaluation.predictions[own]
    first = evaluations[0].predictions
    return tables | {"FC baseline": first[first["predictor"] == "fc"]}


def _describe_models(config: Config, trainings: Sequence[Training]) -> list[dict[str, Any]]:
    found = {training.model: training.info.get("parameters") for training in trainings}
    return [
        {
            "name": name,
            "settings": model,
            "parameters": found.get(name),
            "keys": model.model_dump(
                mode="json", exclude={"base", "pretrain", "finetune", "family"}
            ),
        }
        for name, model in config.models.items()
    ]


def _describe_training(training: Training) -> dict[str, Any]:
    info, metrics = training.info, training.metrics
    rows = metrics[metrics["split"] == "train"]
    return {
        "label": _label(training),
        "steps": info["step"],
        "best_step": info["best"]["step"],
        "loss": number(info["best"]["loss"]),
        "skills": _skills(training),
        "minutes": number(float(rows["seconds"].max()) / 60, 1) if "seconds" in rows else "n/a",
        "n_train": len(info["subjects"]["train"]),
        "n_validation": len(info["subjects"]["validation"]),
        "inputs": info.get("inputs", {}),
        "left_out": info.get("left_out", {}),
    }


def _skills(training: Training) -> dict[str, str]:
    best = training.info["best"]
    return {k.removeprefix("skill_"): f"{v:+.3f}" for k, v in best.items() if k[:6] == "skill_"}


def _curves(trainings: Sequence[Training]) -> dict[str, str | None]:
    if not trainings:
        return {"loss": None, "skill": None}
    tables = {_label(training): training.metrics for training in trainings}
    return {"loss": figures.loss_curves(tables), "skill": figures.skill_curves(tables)}


def _label(item: Training | Evaluation) -> str:
    return f"{item.model}, seed {item.seed}"


def _n_sites(data: Data) -> int:
    return int(data.labels["site"].nunique()) if "site" in data.labels else 0


def _describe_labels(data: Data, target: str, kind: str) -> str:
    """Who has which label, among the subjects with usable runs."""
    if target not in data.labels:
        return "no table of subjects"
    found = data.labels[target].reindex(data.runs["subject"].unique())
    missing = f"; {found.isna().sum()} without a label" if found.isna().any() else ""
    if kind == "classification":
        return ", ".join(f"{n} {name}" for name, n in found.value_counts().items()) + missing
    low, middle, high = (number(v) for v in np.nanpercentile(found.astype(float), [0, 50, 100]))
    return f"{found.notna().sum()} subjects, median {middle}, from {low} to {high}{missing}"


def _run_facts(data: Data) -> list[dict[str, str]]:
    facts = []
    for name, label in COLUMNS.items():
        if name in data.runs and data.runs[name].notna().any():
            values = data.runs[name].dropna().astype(float)
            low, middle, high = (_shown(name, value) for value in values.quantile([0, 0.5, 1]))
            facts.append(
                {"label": label, "low": low, "median": middle, "high": high, "n": str(len(values))}
            )
    return facts


def _run_table(data: Data) -> dict[str, list[Any]]:
    known = [name for name in COLUMNS if name in data.runs and data.runs[name].notna().any()]
    rows = data.runs.head(LONGEST_LIST)
    cells = [
        [row["run"], *(_shown(name, row[name]) for name in known)] for _, row in rows.iterrows()
    ]
    return {"columns": ["run", *(COLUMNS[name] for name in known)], "rows": cells}


def _shown(name: str, value: float) -> str:
    return number(round(value) if name in COUNTS and np.isfinite(value) else float(value))


def _data_figures(config: Config, data: Data) -> dict[str, Any]:
    known = [name for name in COLUMNS if name in data.runs and data.runs[name].notna().any()]
    shown = {COLUMNS[name]: data.runs[name] for name in known if data.runs[name].nunique() > 1}
    example, group = example_run(config, data), group_connectivity(config, data)
    return {
        "distributions": figures.distributions(shown) if shown else None,
        "example": example,
        "brain": example
        and figures.brain(example.mean, example.mask, example.tokens, example.height),
        "fc": group and figures.connectivity(group[0]),
        "fc_runs": group and group[1],
        "fc_rois": group and len(group[0]),
    }
