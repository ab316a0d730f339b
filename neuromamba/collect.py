"""What the stages have left under `results/`, read back for the report.

Whatever is missing (no targets, a training that has not run) is left out, never an error: the
report tells what there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray

from neuromamba.config import Config
from neuromamba.files import InputError, read_json
from neuromamba.layout import Layout
from neuromamba.metrics import read_predictions
from neuromamba.participants import read_participants
from neuromamba.splits import PARTS, read_split
from neuromamba.tables import read_table

MOTION = "framewise_displacement"
LARGEST_GROUP = 200
"""Runs that the group FC is averaged over: more would change nothing that the eye can see."""
FACTS = ("n_volumes", "n_voxels", "n_constant_voxels", "n_tokens", "tsnr", "n_rois")


@dataclass(frozen=True)
class Data:
    """One dataset's runs.

    Attributes
    ----------
    name
        The dataset.
    index
        `index.tsv`, empty when it has not been made.
    runs
        Usable runs: `run`, `subject`, those of `FACTS` that the stages recorded, `mean_fd` in mm.
    excluded
        `excluded.tsv`.
    split
        Subjects of each part, of a cross-validation in its first fold; empty without a split.
    labels
        Site and targets by subject.
    preprocessed_by
        Subjects by what preprocessed them, as far as the derivatives tell.
    """

    name: str
    index: pd.DataFrame
    runs: pd.DataFrame
    excluded: pd.DataFrame
    split: dict[str, list[str]]
    labels: pd.DataFrame
    preprocessed_by: dict[str, int]


@dataclass(frozen=True)
class Training:
    """A finished training: `stage` is `pretrain` or the name of a target; of a `fold`, or none."""

    dataset: str
    model: str
    seed: int
    stage: str
    info: dict[str, Any]
    metrics: pd.DataFrame
    fold: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What `run_evaluate` wrote for one model, seed and target."""

    dataset: str
    model: str
    seed: int
    target: str
    metrics: pd.DataFrame
    comparison: pd.DataFrame
    predictions: pd.DataFrame
    notes: dict[str, Any]


def collect_data(config: Config, dataset: str) -> Data:
    """Read the tables of one dataset."""
    layout = Layout.of(config, dataset)
    index = _table(layout.index, ["run", "subject", "reason"])
    split = Layout.of(config.in_fold(config.splits.names[0]), dataset).split
    batches = range(config.compute.batches)
    runs = index.loc[index["reason"].isna(), ["run", "subject"]]
    for stage in ("volumes", "tokens", "rois"):
        parts = [_table(layout.manifest(stage, k), ["run", "reason"]) for k in batches]
        made = pd.concat(parts, ignore_index=True)
        made = made[made["reason"].isna()]
        new = [name for name in FACTS if name in made and name not in runs]
        runs = runs.merge(made[["run", *new]], on="run", how="inner" if len(made) else "left")
    runs = runs.assign(mean_fd=_mean_motion(index, runs["run"]))
    return Data(
        name=dataset,
        index=index,
        runs=runs.reset_index(drop=True),
        excluded=_table(layout.excluded, ["run", "stage", "reason"]),
        split=read_split(split) if split.exists() else {part: [] for part in PARTS},
        labels=_labels(config, dataset),
        preprocessed_by=_preprocessed_by(layout),
    )


def _preprocessed_by(layout: Layout) -> dict[str, int]:
    table = _table(layout.preprocess("subjects").with_suffix(".tsv"), ["generated_by"])
    return {str(name): int(n) for name, n in table["generated_by"].value_counts().items()}


def collect_trainings(config: Config, dataset: str, stage: str) -> Iterator[Training]:
    """The finished trainings of one stage, for every model, seed and fold of the config.

    A pretraining that models share is that of the model which it is named after.
    """
    for model, seed, fold in product(config.models, config.seeds, config.splits.names):
        of_fold, (source, pretrained) = config.in_fold(fold), config.pretraining_of(dataset, model)
        if stage != "pretrain":
            folder = Layout.of(of_fold, dataset).finetune(model, seed, stage)
        elif pretrained == model:
            folder = Layout.of(of_fold, source).pretrain(model, seed)
        else:
            continue
        if (folder / "model.json").exists() and (folder / "metrics.jsonl").exists():
            info = read_json(folder / "model.json")
            metrics = pd.read_json(folder / "metrics.jsonl", lines=True)
            yield Training(dataset, model, seed, stage, info, metrics, fold)


def collect_evaluations(config: Config, dataset: str, target: str) -> Iterator[Evaluation]:
    """The evaluations of one target, for every model and seed of the config."""
    layout = Layout.of(config, dataset)
    for model in config.models:
        for seed in config.seeds:
            folder = layout.evaluate(model, seed, target)
            if (folder / "metrics.tsv").exists():
                yield Evaluation(
                    dataset,
                    model,
                    seed,
                    target,
                    read_table(folder / "metrics.tsv", dtype={"predictor": str}),
                    read_table(folder / "comparison.tsv", dtype={"better": str}),
                    read_predictions(folder / "predictions.tsv"),
                    read_json(folder / "notes.json"),
                )


@dataclass(frozen=True)
class Example:
    """One run to be shown: images (z, y, x), voxel (x, y, z) to mm, and its store's attributes."""

    run: str
    mean: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.bool_] | None
    affine: npt.NDArray[np.float64]
    attributes: dict[str, Any]

    @property
    def height(self) -> npt.NDArray[np.float64]:
        """(z,) mm of each slice."""
        return self.affine[2, 3] + self.affine[2, 2] * np.arange(len(self.mask))


def example_run(config: Config, data: Data) -> Example | None:
    """The run whose tSNR is the median; `None` where there are no volumes."""
    if data.runs.empty:
        return None
    order = data.runs.sort_values("tsnr", kind="stable") if "tsnr" in data.runs else data.runs
    run = str(order["run"].iloc[len(order) // 2])
    layout = Layout.of(config, data.name)
    if not layout.array("volumes", run).exists():
        return None
    with xarray.open_zarr(layout.array("volumes", run), chunks=None) as volumes:
        mean, mask = volumes["mean"].values, volumes["mask"].values.astype(bool)
        attributes = {str(name): value for name, value in volumes.attrs.items()}
    tokens = None
    if layout.array("tokens", run).exists():
        with xarray.open_zarr(layout.array("tokens", run), chunks=None) as store:
            cells, edge = store["grid_index"].values.astype(int), config.tokens.patch
        kept = np.zeros([n // edge for n in mask.shape], dtype=bool)
        kept[cells[:, 2], cells[:, 1], cells[:, 0]] = True
        tokens = np.kron(kept, np.ones((edge, edge, edge), dtype=bool)).astype(bool)
    affine = np.asarray(attributes["affine"], dtype=np.float64)
    return Example(run, mean, mask, tokens, affine, attributes)


def group_connectivity(config: Config, data: Data) -> tuple[npt.NDArray[np.float64], int] | None:
    """Mean FC (by Fisher z) over runs, ROIs that no run has left out, and the number of runs."""
    layout = Layout.of(config, data.name)
    paths = [layout.array("rois", run) for run in data.runs["run"]]
    paths = [path for path in paths if path.exists()]
    chosen = paths[:: -(-len(paths) // LARGEST_GROUP)] if paths else []
    total, count = np.zeros(()), np.zeros(())
    for path in chosen:
        with xarray.open_zarr(path, chunks=None) as rois:
            z = np.arctanh(np.clip(rois["fc"].values.astype(float), -0.99999, 0.99999))
        total, count = total + np.nan_to_num(z), count + np.isfinite(z)
    if not chosen:
        return None
    mean = np.tanh(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))
    kept = np.isfinite(mean).any(axis=0)
    return mean[np.ix_(kept, kept)], len(chosen)


def _table(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame(columns=columns)
    return read_table(path, dtype={"run": str, "subject": str, "reason": str, "confounds": str})


def _mean_motion(index: pd.DataFrame, runs: pd.Series) -> list[float]:
    """Mean framewise displacement of each run, NaN where the confounds do not have it."""
    if "confounds" not in index:
        return [np.nan] * len(runs)
    files = index.set_index("run")["confounds"]
    return [_mean_of_column(files.get(run)) for run in runs]


def _mean_of_column(path: Any) -> float:
    if not isinstance(path, str):
        return np.nan
    try:
        table = read_table(path, usecols=lambda name: name == MOTION)
    except InputError:
        return np.nan
    return (
        float(pd.to_numeric(table[MOTION], errors="coerce").mean()) if MOTION in table else np.nan
    )


def _labels(config: Config, dataset: str) -> pd.DataFrame:
    try:
        return read_participants(config.datasets[dataset])
    except InputError:
        return pd.DataFrame()
