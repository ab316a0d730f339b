"""For tests of training: a dataset whose token stores exist in memory alone, and a toy model."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from neuromamba.config import Config, Optimiser
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.tables import write_table
from neuromamba.train import fit

# Threads cost more than they bring at this size, and far more where tests run beside each other.
torch.set_num_threads(1)

PATCH, TIME_PATCH, VALUES = 2, 2, 16


class FakeStore:
    """A `TokenStore` of random values, which are higher in subjects with an odd number."""

    poisoned: ClassVar[set[str]] = set()
    short: ClassVar[set[str]] = set()
    opened: ClassVar[list[str]] = []

    def __init__(self, path: Path) -> None:
        run = Path(path).stem
        subject = run.split("_")[0]
        FakeStore.opened.append(run)
        assert subject not in self.poisoned, f"{run} must never be opened"
        if run.endswith("run-broken"):
            raise InputError(f"{path}: its shards are damaged; make the tokens again")
        rng = np.random.default_rng(zlib.crc32(run.encode()))
        self.n_time_patches = 2 if run in self.short else 6 + int(rng.integers(4))
        self.n_tokens = 4 + int(rng.integers(4))
        shape = (self.n_time_patches, self.n_tokens, VALUES)
        odd = int(subject.removeprefix("sub-")) % 2
        self.values = rng.standard_normal(shape, dtype=np.float32) + np.float32(odd - 0.5)
        self.n_values = VALUES
        self.center = rng.random((self.n_tokens, 3), dtype=np.float32)
        self.shift = {"global": 1.0, "voxel": 0.0}

    def normalized(self, start: int, n_patches: int, kind: str) -> np.ndarray:
        return self.values[start : start + n_patches] + np.float32(self.shift[kind])

    def mean_normalized(self, kind: str) -> np.ndarray:
        return np.full((self.n_tokens, VALUES), self.shift[kind], np.float32)


def make_config(folder: Path, **model: object) -> Config:
    """A config for fake runs: windows of 4 time patches, a model of a few thousand weights."""
    steps = {"batch_size": 4, "validate_every": 4, "checkpoint_every": 4, "log_every": 2}
    small = {"width": 8, "depth": 1, "state": 4, "head_dim": 8, "volumes": 4 * TIME_PATCH}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {
                "fake": {
                    "derivatives": "nowhere",
                    "participants": {"file": str(folder / "participants.tsv")},
                    "targets": {
                        "sex": {
                            "kind": "classification",
                            "column": "sex",
                            "classes": {"female": "F", "male": "M"},
                        },
                        "age": {"kind": "regression", "column": "age"},
                    },
                }
            },
            "models": {
                "tiny": {
                    "family": "neuromamba",
                    **small,
                    "pretrain": {"steps": 8, **steps},
                    "finetune": {"steps": 8, "evaluation_windows": 3, **steps},
                    **model,
                }
            },
            "volumes": {"shape": (4, 4, 4)},
            "tokens": {"patch": PATCH, "time_patch": TIME_PATCH},
            "compute": {"batches": 2, "device": "cpu"},
        }
    )


def write_dataset(folder: Path, subjects: int = 14) -> dict[str, list[str]]:
    """Write the tables that the data stages leave; half the subjects have a second run.

    The split has two subjects for validation and two for testing, which are poisoned.
    """
    names = [f"sub-{number:02d}" for number in range(1, subjects + 1)]
    runs = [f"{name}_task-rest_run-1" for name in names]
    runs += [f"{name}_task-rest_run-2" for name in names[::2]]
    layout = Layout(folder / "results", "fake")
    table = pd.DataFrame({"run": sorted(runs), "reason": None})
    write_table(layout.index, table.assign(subject=[run.split("_")[0] for run in table["run"]]))
    for batch in range(2):
        write_table(layout.manifest("tokens", batch), table.iloc[batch::2])
    parts = {"validation": names[:2], "test": names[2:4], "train": names[4:]}
    rows = [(name, part) for part, of_part in parts.items() for name in of_part]
    write_table(layout.split, pd.DataFrame(rows, columns=["subject", "part"]))
    people = pd.DataFrame({"participant_id": names})
    people["sex"] = ["F" if int(name[4:]) % 2 else "M" for name in names]
    people["age"] = [20.0 + 3 * number for number in range(subjects)]
    write_table(folder / "participants.tsv", people)
    FakeStore.poisoned, FakeStore.short, FakeStore.opened = set(parts["test"]), set(), []
    return parts


# --- A toy to train -------------------------------------------------------------------------------

CPU = torch.device("cpu")
SETTINGS = {
    "steps": 20,
    "batch_size": 4,
    "learning_rate": 0.01,
    "warmup_steps": 3,
    "log_every": 3,
    "validate_every": 4,
    "checkpoint_every": 5,
}


class Toy(nn.Module):
    """Learns to add, through dropout, so that its steps depend on the generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 1)
        )

    def loss(self, batch):
        mse = (self.layers(batch["x"])[:, 0] - batch["y"]).square().mean()
        return {"loss": mse, "mse_model": mse, "mse_zero": batch["y"].square().mean()}


def batch_of(number: int, size: int = 4) -> dict:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(number))
    return {"x": x, "y": x.sum(1), "run": [f"run-{number}-{k}" for k in range(size)]}


def validation() -> list[dict]:
    return [batch_of(10_000), batch_of(10_001, 2)]


def train(
    folder: Path, *, model=None, training=batch_of, on_change="refuse", record=None, **change
):
    settings = Optimiser(**{**SETTINGS, **change})
    record = record or {"settings": settings.model_dump(mode="json"), "inputs": {"split": "a"}}
    model = model or Toy()
    best = fit(
        model,
        settings,
        training,
        validation,
        folder,
        record,
        seed=7,
        device=CPU,
        on_change=on_change,
    )
    return model, best


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
