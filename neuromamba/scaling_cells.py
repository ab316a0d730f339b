"""The cells of the scaling study: what each training cost and what it reached.

A cell is one pretraining: a model, a share of the training subjects, a seed. All are validated on
the same subjects.

Counted is
- compute: operations of the matrix products of training (`flops` of the model for the forward pass,
  three times that with the backward pass), over the brain tokens that there are and not over the
  whole grid; not what is computed again to save memory, nor validation. A PF-day is 1e15 operations
  a second for a day (Kaplan et al., arXiv 2001.08361, who leave out the embedding; it is in here);
- tokens: patches of a window times its time patches, over the windows of training. Each run's
  number is known, and how often a run is drawn is taken at its expectation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pydantic import TypeAdapter

from neuromamba.checkpoint import load_model_info
from neuromamba.config import Config, Model
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.pretrain import list_training, n_rois_of
from neuromamba.scaling_fit import frontier
from neuromamba.throughput import TRAIN_FLOPS

PF_DAY = 1e15 * 86400
"""Operations."""

Curves = dict[tuple[str, float, int], pd.DataFrame]
"""By model, fraction and seed: `flops` and `loss` of each validation of a training."""


def read_cells(study: Config, dataset: str) -> tuple[pd.DataFrame, Curves, list[str]]:
    """What the trained cells cost and reached.

    Returns
    -------
    cells : pandas.DataFrame
        One row a cell: `model`, `fraction`, `seed`, `parameters`, `subjects` (that it was trained
        on), `steps`, `loss` (on the validation subjects, of the weights that are kept),
        `best_step`, the `skill_*` of these weights, `windows`, `tokens`, `flops`, `pf_days`, and
        `last_loss`, of the last weights.
    curves : Curves
        The way there.
    missing : list of str
        Folders of the cells that have not been trained.

    Raises
    ------
    InputError
        When no cell has been trained.
    """
    layout = Layout.of(study, dataset)
    runs = list_training(study, dataset, next(iter(study.models.values())).needs)[1]
    rows, missing = [], []
    curves: Curves = {}
    for model, fraction, seed in _grid(study):
        folder = layout.cell(model, fraction, seed)
        if not (folder / "model.json").exists():
            missing.append(str(folder))
            continue
        info = load_model_info(folder)
        cost = training_cost(info, runs, folder)
        curve = _curve(folder, cost["flops"] / info["step"])
        curves[model, fraction, seed] = curve
        names = {"model": model, "fraction": fraction, "seed": seed}
        rows.append({**names, **_outcome(info), **cost, "last_loss": curve["loss"].iloc[-1]})
    if not rows:
        raise InputError(
            f"{layout.scaling}: no cell of the scaling study has been trained; make them by "
            "`snakemake scaling`, or one by `neuromamba pretrain --fraction`"
        )
    return pd.DataFrame(rows), curves, missing


def _curve(folder: Path, step_flops: float) -> pd.DataFrame:
    """Compute and loss of each validation."""
    metrics = pd.read_json(folder / "metrics.jsonl", lines=True)
    rows = metrics[(metrics["split"] == "validation") & (metrics["step"] > 0)]
    return pd.DataFrame({"flops": rows["step"] * step_flops, "loss": rows["loss"].astype(float)})


def _outcome(info: Mapping[str, Any]) -> dict[str, Any]:
    best = info["best"]
    return {
        "parameters": info["parameters"],
        "subjects": len(info["subjects"]["train"]),
        "steps": info["step"],
        "loss": best["loss"],
        "best_step": best["step"],
        **{name: best[name] for name in best if name.startswith("skill_")},
    }


def training_cost(info: Mapping[str, Any], runs: pd.DataFrame, folder: Path) -> dict[str, float]:
    """Windows, tokens and operations of a finished training, from its `model.json` alone.

    Parameters
    ----------
    info
        `model.json`.
    runs
        `run`, `subject` and `n_tokens` of the dataset's runs, from the manifests.
    folder
        For messages.

    Raises
    ------
    InputError
        When the model does not count operations over tokens, or a run's tokens are not known.
    """
    settings = info["settings"]
    training, cut = settings["pretrain"], settings["tokens"]
    model = TypeAdapter[Model](Model).validate_python(settings["model"])
    values = cut["patch"] ** 3 * cut["time_patch"]
    n_rois, codes = n_rois_of(settings), settings.get("codes")
    network = build_model(model, values, n_rois=n_rois, codes=codes)
    n_time = model.volumes // cut["time_patch"]
    if not hasattr(network, "flops") or "tokens" not in network.needs:  # type: ignore[operator]
        raise InputError(f"{folder}: models of family {model.family} do not count operations")
    used = runs[runs["subject"].isin(info["subjects"]["train"])]
    used = used[~used["run"].isin(info["left_out"])]
    if "n_tokens" not in used or used["n_tokens"].isna().any():
        raise InputError(f"{folder}: the manifests do not tell n_tokens; make the tokens again")
    patches = used["n_tokens"].astype(int)
    forward = {
        n: network.flops({"tokens": torch.empty(n, n_time, values, device="meta")})  # type: ignore[operator]
        for n in set(patches)
    }
    each = pd.DataFrame(
        {"tokens": patches * n_time, "flops": patches.map(forward), "subject": used["subject"]}
    )
    window = _expectation(each.groupby("subject").mean(), settings.get("mixture"))
    windows = training["steps"] * training["batch_size"] * training["accumulate"]
    flops = TRAIN_FLOPS * window["flops"] * windows
    return {
        "windows": windows,
        "tokens": window["tokens"] * windows,
        "flops": flops,
        "pf_days": flops / PF_DAY,
    }


def _expectation(subjects: pd.DataFrame, mixture: Mapping[str, float] | None) -> pd.Series:
    """Mean over subjects, who all count the same, or as their dataset does in a mixture."""
    if not mixture:
        return subjects.mean()
    means = subjects.groupby(subjects.index.str.partition("/").get_level_values(0)).mean()
    weights = pd.Series(mixture).reindex(means.index)
    return means.mul(weights / weights.sum(), axis=0).sum()


def average_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """One row for each model and fraction.

    Returns
    -------
    pandas.DataFrame
        `model`, `fraction`, `parameters`, `flops`, `pf_days`, `seeds` (how many), `loss` (mean over
        seeds), `low`, `high`, `losses` (all of them), and whether it is on the `frontier`.
    """
    points = cells.groupby(["model", "fraction"], sort=False, as_index=False).agg(
        parameters=("parameters", "first"),
        flops=("flops", "mean"),
        pf_days=("pf_days", "mean"),
        seeds=("seed", "size"),
        loss=("loss", "mean"),
        low=("loss", "min"),
        high=("loss", "max"),
        losses=("loss", list),
    )
    best = frontier(points["flops"].to_numpy(float), points["loss"].to_numpy(float))
    return points.assign(frontier=points.index.isin(best))


def _grid(study: Config) -> Iterator[tuple[str, float, int]]:
    for model in study.models:
        for fraction in study.scaling.fractions:
            for seed in study.seeds:
                yield model, fraction, seed
