"""Small results trees in the form that the stages leave them, made without running the stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray
import zarr

from neuromamba.baseline_predictions import run_baselines
from neuromamba.checkpoint import save_model
from neuromamba.config import Config
from neuromamba.evaluate import run_evaluate
from neuromamba.layout import Layout
from neuromamba.participants import read_participants
from neuromamba.rois import run_rois
from neuromamba.store import finish
from neuromamba.tables import write_table

GRID = (12, 12, 12)
VOXEL = 8.0
REPETITION_TIME = 2.0


def make_config(folder: Path, **changes: Any) -> Config:
    """A config of one dataset `toy` with the targets `sex` and `age`, results under `folder`."""
    dataset = {
        "derivatives": str(folder / "derivatives"),
        "participants": {"file": str(folder / "participants.tsv"), "site_column": "site"},
        "targets": {
            "sex": {
                "kind": "classification",
                "column": "sex",
                "classes": {"female": "F", "male": "M"},
            },
            "age": {"kind": "regression", "column": "age"},
        },
        **changes.pop("dataset", {}),
    }
    raw = {
        "results": str(folder / "results"),
        "datasets": {"toy": dataset},
        "models": {"small": {"family": "neuromamba"}},
        "volumes": {"shape": GRID, "voxel_size": VOXEL, "shard_volumes": 8},
        "rois": {"cube": 24.0},
        "evaluate": {"bootstrap": 200, "inner_folds": 3},
        **changes,
    }
    return Config.model_validate(raw)


def make_participants(folder: Path, n: int, seed: int = 0) -> pd.DataFrame:
    """Write `participants.tsv`: sexes and ages spread over two sites."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"participant_id": [f"sub-{i:03}" for i in range(n)]})
    table["sex"] = np.where(np.arange(n) % 3 == 0, "F", "M")
    table["age"] = np.round(rng.uniform(20, 80, size=n), 1)
    table["site"] = np.where(np.arange(n) % 2 == 0, "north", "south")
    write_table(folder / "participants.tsv", table)
    return table


def ball(shape: tuple[int, int, int] = GRID, radius: float = 4.5) -> np.ndarray:
    """A round brain mask, (z, y, x) bool."""
    centre = (np.array(shape) - 1) / 2
    away = np.indices(shape[::-1]) - centre[::-1, None, None, None]
    return np.sqrt((away**2).sum(axis=0)) <= radius


def write_volumes(
    path: Path, run: str, bold: np.ndarray, mask: np.ndarray, voxel: float = VOXEL
) -> None:
    """Write a volumes store by its contract: float16 with scale and offset, NaN outside brain.

    `bold` is (time, z, y, x) in original units.
    """
    scale, offset = float(bold[:, mask].std()), float(bold[:, mask].mean())
    stored = np.where(mask, (bold - offset) / scale, np.nan).astype(np.float16)
    shape = mask.shape[::-1]
    affine = np.diag([voxel] * 3 + [1.0])
    affine[:3, 3] = -voxel * (np.array(shape) - 1) / 2
    space = ("z", "y", "x")
    outside = {"scale_factor": scale, "add_offset": offset}
    data = xarray.Dataset(
        {
            "bold": (("time", *space), stored, outside),
            "mask": (space, mask.astype(np.uint8)),
            "mean": (space, np.where(mask, bold.mean(axis=0), np.nan).astype(np.float32)),
            "sd": (space, np.where(mask, bold.std(axis=0), np.nan).astype(np.float32)),
        },
        coords={"time": ("time", np.arange(len(bold)) * REPETITION_TIME, {"units": "s"})},
        attrs={
            "affine": affine.tolist(),
            "space": "MNI152NLin2009cAsym",
            "repetition_time": REPETITION_TIME,
            "run": run,
            "subject": run.split("_")[0],
            "key": f"key of {run}",
        },
    )
    encoding = {"bold": {"chunks": (2, *mask.shape), "shards": (8, *mask.shape)}}
    data.to_zarr(path, zarr_format=3, consolidated=False, encoding=encoding)
    finish(zarr.open_group(path), {})


def make_bold(subject: Mapping[str, Any], times: int = 24) -> np.ndarray:
    """A signal whose left-right correlation is stronger in men and weaker with age."""
    rng = np.random.default_rng(int(str(subject["participant_id"])[4:]) + 1)
    shared = rng.normal(size=(times, 1, 1, 1))
    strength = 0.3 + (subject["sex"] == "M") * 0.9 + (80 - subject["age"]) / 60
    signal = rng.normal(size=(times, *GRID[::-1]))
    halves = np.sign(np.arange(GRID[0]) - GRID[0] / 2 + 0.5)
    return 1000 + 10 * (signal + strength * shared * np.where(halves > 0, 1, 0.8))


def make_data(folder: Path, n: int = 30, config: Config | None = None) -> Config:
    """Index, volumes, tokens (manifest only), ROI stores and labels of `n` subjects."""
    config = config or make_config(folder)
    layout = Layout(Path(config.results), "toy")
    participants = make_participants(folder, n)
    rows, runs = [], []
    for subject in participants.to_dict("records"):
        name = subject["participant_id"]
        run = f"{name}_task-rest"
        runs.append(run)
        path = layout.array("volumes", run)
        write_volumes(path, run, make_bold(subject), ball())
        rows.append({"run": run, "subject": name, "n_volumes": 24, "task": "rest", "reason": None})
    write_table(layout.index, pd.DataFrame(rows))
    made = pd.DataFrame({"run": runs, "reason": None, "key": "made"})
    for stage in ("volumes", "tokens"):
        write_table(layout.manifest(stage, 0), made)
    run_rois(config, "toy", 0)
    return config


def make_split(config: Config, n: int, test: int = 10) -> dict[str, list[str]]:
    """Write a split of subjects 0 to n - 1: the last ones are for testing."""
    names = [f"sub-{i:03}" for i in range(n)]
    cut = n - test
    parts = {"train": names[: cut - 3], "validation": names[cut - 3 : cut], "test": names[cut:]}
    rows = [(name, part) for part, members in parts.items() for name in members]
    layout = Layout(Path(config.results), "toy")
    write_table(layout.split, pd.DataFrame(rows, columns=["subject", "part"]))
    write_table(layout.excluded, pd.DataFrame(columns=["run", "stage", "reason"]))
    return parts


def make_model(
    config: Config, parts: Mapping[str, list[str]], stage: str, model: str = "small", seed: int = 0
) -> Path:
    """Write the files of a finished training; `stage` is `pretrain` or a target's name."""
    layout = Layout.of(config, "toy")
    folder = layout.pretrain(model, seed)
    if stage != "pretrain":
        folder = layout.finetune(model, seed, stage)
    rng = np.random.default_rng(seed)
    lines, best = [], {}
    for step in range(0, 101, 10):
        loss = 0.6 + 0.4 * np.exp(-step / 30) + 0.01 * rng.normal()
        row = {"loss": loss}
        if stage == "pretrain":
            row |= {"skill_mean": 1 - loss, "skill_persistence": 0.35 - 0.5 * np.exp(-step / 20)}
        for split in ("train", "validation"):
            lines.append({"step": step, "split": split, **row, "seconds": step * 1.5})
        best = {"step": step, **row}
    info = {
        "step": 100,
        "best": best,
        "parameters": 1_420_000,
        "subjects": {part: parts[part] for part in ("train", "validation")},
        "inputs": {"split": "0" * 64, "runs": "1" * 64},
        "left_out": {},
    }
    save_model(folder, {"weight": torch.zeros(3)}, info)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def predict_by_age_and_sex(noise: float = 1.0) -> Callable[..., pd.DataFrame]:
    """A stand-in for `predict_subjects` that knows the labels, blurred by noise."""

    def predict(
        config: Config, dataset: str, model: str, seed: int, target: str, subjects: list[str]
    ) -> pd.DataFrame:
        truth = read_participants(config.datasets[dataset])[target].loc[subjects]
        rng = np.random.default_rng(seed)
        table = pd.DataFrame({"subject": subjects})
        if target == "age":
            blurred = truth.to_numpy(float) + 20 * noise * rng.normal(size=len(subjects))
            return table.assign(value=blurred)
        signal = (truth == "male").to_numpy(float) - 0.5 + noise * rng.normal(size=len(subjects))
        share = 1 / (1 + np.exp(-2 * signal))
        return table.assign(prob_female=1 - share, prob_male=share)

    return predict


def run_both(config: Config, dataset: str, model: str, seed: int, target: str) -> None:
    """Predict by the baselines, then evaluate the model beside them."""
    run_baselines(config, dataset, target)
    run_evaluate(config, dataset, model, seed, target)
