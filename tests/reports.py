"""Results for a report: a whole run of small subjects, and what only few runs have beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import xarray
import zarr
from fabricate import (
    make_data,
    make_model,
    make_split,
    predict_by_age_and_sex,
    run_both,
)
from PIL import Image

from neuromamba import evaluate
from neuromamba.collect import Evaluation
from neuromamba.config import Config
from neuromamba.files import write_json, write_text
from neuromamba.layout import Layout
from neuromamba.metrics import compare, compute_metrics
from neuromamba.store import finish
from neuromamba.tables import write_table

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'
INTERVAL = ("", "_low", "_high")
NOTES: dict[str, Any] = {
    "n_train": 80,
    "n_test": 60,
    "n_unlabelled": 0,
    "n_without_runs": 0,
    "seen_subjects": [],
    "baselines": {
        "fc": {
            "kind": "pearson",
            "inverse_penalty": 10.0,
            "folds": 5,
            "n_rois": 90,
            "n_rois_dropped": 2,
            "n_features": 4005,
            "confounds_regressed": [],
        }
    },
}
"""What the evaluation notes of itself."""


def make_results(folder: Path, n: int, test: int) -> Config:
    """A run of `n` subjects, one model, one seed and two targets, from volumes to metrics."""
    config = make_data(folder, n)
    parts = make_split(config, n, test=test)
    make_model(config, parts, "pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "predict_subjects", predict_by_age_and_sex())
        for target in ("sex", "age"):
            make_model(config, parts, target)
            run_both(config, "toy", "small", 0, target)
    return config


def add_tokens(config: Config) -> None:
    """Say of every run that the patches of one half of the grid of 2 x 2 x 2 are tokens."""
    layout = Layout.of(config, "toy")
    cells = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0,)], dtype=np.int16)
    for path in sorted(layout.array("volumes", "x").parent.glob("*.zarr")):
        store = xarray.Dataset({"grid_index": (("token", "axis"), cells)})
        tokens = layout.array("tokens", path.stem)
        store.to_zarr(tokens, zarr_format=3, consolidated=False)
        finish(zarr.open_group(tokens), {})


def add_maps(config: Config, target: str = "sex", size: int = 12) -> Path:
    """Maps of attributions that are 1 in every voxel of one patch, in the form of `explain`."""
    folder = Layout.of(config, "toy").explain("small", 0, target)
    folder.mkdir(parents=True)
    values = np.zeros((size, size, size, 3), dtype=np.float32)
    values[6:, :6, :6] = 1.0
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = -44.0
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / "group_attribution.nii.gz")
    about = {
        "volumes": ["strength", "signed", "between"],
        "method": "integrated gradients",
        "explains": "logit of male minus that of female",
        "subjects": 16,
    }
    write_json(folder / "group_attribution.json", about)
    Image.new("RGB", (40, 30), "white").save(folder / "attribution.png")
    row: dict[str, Any] = {"region": "R1", "n_voxels": 216, "share": 0.25, "between": 0.5}
    row |= {f"signed{end}": value for end, value in zip(INTERVAL, (0.1, 0.05, 0.2), strict=True)}
    write_table(folder / "regions.tsv", pd.DataFrame([row]))
    shuffled = {"head": {"strength": {"spearman": 0.9, "verdict": "the strength map <stays>"}}}
    checks = {"completeness": {"verdict": "attributions miss 0.10%"}, "shuffled_weights": shuffled}
    write_json(folder / "explain.json", about | checks)
    return folder


def add_studies(
    config: Config, model: str = "small", seen_subjects: list[str] | None = None
) -> None:
    """A forecast, an identification and a scaling study, in the form of their stages.

    `seen_subjects` are those that the identification says were seen.
    """
    layout = Layout.of(config, "toy")
    forecast, identify = layout.forecast(model, 0), layout.identify(model, 0)
    rows: list[dict[str, Any]] = []
    for horizon in (1, 2):
        row: dict[str, Any] = {"horizon": horizon, "volumes": 2 * horizon, "seconds": 4.0 * horizon}
        row |= {"n": 16, "mse_model": 0.5}
        skills = (0.4 / horizon, 0.3 / horizon, 0.5 / horizon)
        row |= {f"skill_run_mean{end}": v for end, v in zip(INTERVAL, skills, strict=True)}
        rows.append(row)
    write_table(forecast / "forecast.tsv", pd.DataFrame(rows))
    write_text(forecast / "forecast.svg", SVG)
    facts = {"known_volumes": 10, "forecast_volumes": 4, "seen_subjects": []}
    write_json(forecast / "forecast.json", facts)
    told: dict[str, Any] = {"predictor": "model", "pairs": "halves", "n": 16, "chance": 1 / 16}
    told |= {f"accuracy{end}": v for end, v in zip(INTERVAL, (0.75, 0.5, 0.9), strict=True)}
    told |= {f"percentile_rank{end}": v for end, v in zip(INTERVAL, (97.0, 90, 100), strict=True)}
    write_table(identify / "identify.tsv", pd.DataFrame([told | {"accuracy_p": 0.004}]))
    write_json(identify / "identify.json", {"seen_subjects": seen_subjects or []})
    write_text(layout.scaling / "scaling.svg", SVG)
    fit = {"verdict": ["No power law is claimed."], "power_law_claimed": False, "points": [1, 2]}
    write_json(layout.scaling / "fit.json", fit)


def add_retrieval(config: Config, model: str = "small") -> None:
    """A retrieval of images and networks, with predictions by prompts, in the form of its stage."""
    folder, rows = Layout.of(config, "toy").retrieve(model, 0), []
    for direction in ("image to network", "network to image"):
        row: dict[str, Any] = {"direction": direction, "n": 16, "choices": 16}
        for name, values in {
            "recall_1": (0.25, 0.125, 0.5, 0.0625),
            "recall_5": (0.75, 0.5, 0.875, 0.3125),
            "mean_rank": (3.5, 2.5, 4.5, 8.5),
        }.items():
            ends = (*INTERVAL, "_chance")
            row |= {f"{name}{end}": value for end, value in zip(ends, values, strict=True)}
        rows.append(row)
    write_table(folder / "retrieve.tsv", pd.DataFrame(rows))
    metrics = {"value": 0.8, "low": 0.6, "high": 0.9, "p": 0.002, "n": 16, "target": "sex"}
    told = [
        {"predictor": name, "metric": metric, **metrics}
        for name in ("network-prompting", "svm-image")
        for metric in ("auroc", "brier")
    ]
    write_table(folder / "metrics.tsv", pd.DataFrame(told))
    write_text(folder / "retrieve.svg", SVG)
    write_json(folder / "retrieve.json", {"seen_subjects": ["sub-000"]})


def add_overview(config: Config) -> None:
    """A table of quality in which one run is flagged, and the page of that run."""
    layout = Layout.of(config, "toy")
    runs = sorted(path.stem for path in layout.array("volumes", "x").parent.glob("*.zarr"))
    table = pd.DataFrame({"run": runs, "subject": runs, "excluded": None, "stage": None})
    table["outlier"] = ["tsnr, mean_fd", *[None] * (len(runs) - 1)]
    write_table(layout.overview.with_suffix(".tsv"), table)
    write_text(layout.overview, "<p>all runs</p>")
    write_text(layout.qc(runs[0]), "<p>one run</p>")


def add_benchmarks(logs: Path, config: Config) -> None:
    """Benchmark files of Snakemake, of two batches and a training."""
    root = Path(f"{logs}/{config.results}") / "toy"
    rows = {
        "tokens/batch-0": (10.0, 8.0, 100.0),
        "tokens/batch-1": (20.0, "-", 300.0),
        "small/seed-0/pretrain/fold-0": (7200.0, 9000.0, 2048.0),
    }
    for name, (seconds, cpu, rss) in rows.items():
        table = pd.DataFrame({"s": [1.0, seconds], "max_rss": [1.0, rss], "cpu_time": [1.0, cpu]})
        write_table(root / f"{name}.benchmark.tsv", table)


def of_subjects(
    seed: int = 0, classes: bool = False, folds: int = 1, error: float = 5.0
) -> Evaluation:
    """An evaluation of 60 subjects by a model `m` beside FC and a constant."""
    rng, n = np.random.default_rng(seed), 60
    columns: dict[str, Any] = {"subject": [f"sub-{i:03}" for i in range(n)]}
    if folds > 1:
        columns["fold"] = [f"fold-{i % folds}" for i in range(n)]
    tables = []
    for name, noise in {"m": error, "fc": 5.0, "majority" if classes else "mean": 0.0}.items():
        table = pd.DataFrame({**columns, "predictor": name})
        if classes:
            true = np.where(np.arange(n) // 2 % 2, "b", "a")
            share = 1 / (1 + np.exp(-((true == "b") - 0.5 + noise / 5 * rng.normal(size=n))))
            share = share if noise else np.full(n, 0.5)
            table = table.assign(y_true=true, y_pred=np.where(share > 0.5, "b", "a"))
            table = table.assign(prob_a=1 - share, prob_b=share)
        else:
            true = np.random.default_rng(1).normal(50, 10, size=n)
            guess = true + noise * rng.normal(size=n) if noise else np.full(n, 50.0)
            table = table.assign(y_true=true, y_pred=guess)
        tables.append(table)
    together = pd.concat(tables, ignore_index=True)
    others = [name for name in together["predictor"].unique() if name != "m"]
    compared = pd.concat([compare(together, "m", other, 100, 0.95, 0, 99) for other in others])
    notes = NOTES | {"n_test": n}
    metrics = compute_metrics(together, 100, 0.95, 0, 99)
    return Evaluation("toy", "m", seed, "t", metrics, compared, together, notes)
