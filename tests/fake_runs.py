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
from neuromamba.distributed import World
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.owned import own
from neuromamba.tables import write_table
from neuromamba.train import fit

# Threads cost more than they bring at this size, and far more where tests run beside each other.
torch.set_num_threads(1)

PATCH, TIME_PATCH, VALUES = 2, 2, 16
ATTRIBUTES = {
    "patch": PATCH,
    "time_patch": TIME_PATCH,
    "brain_fraction": 0.0,
    "patch_grid": [2, 2, 2],
    "affine": np.diag([2.0, 2.0, 2.0, 1.0]).tolist(),
    "space": "MNI152NLin2009cAsym",
}


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
        self.grid_index = rng.integers(0, 2, (self.n_tokens, 3)).astype(np.int16)
        self.path, self.attrs = path, {**ATTRIBUTES, "run": run, "subject": subject, "key": run}
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
    table = pd.DataFrame({"run": sorted(runs), "reason": None, "key": "made"})
    subject = [run.split("_")[0] for run in table["run"]]
    write_table(layout.index, table.assign(subject=subject, repetition_time=1.5))
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

CPU, WORLD = torch.device("cpu"), World()
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


def samples(first: int, size: int) -> dict:
    """The samples `first` to `first + size - 1` of an endless sequence."""
    numbers = range(first, first + size)
    x = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(n)) for n in numbers])
    return {"x": x, "y": x.sum(1), "run": [f"run-{n}" for n in numbers]}


def validation() -> list[dict]:
    return [samples(10_000, 4), samples(10_004, 2)]


def train(
    folder: Path,
    *,
    model=None,
    training=samples,
    validation=validation,
    on_change="refuse",
    record=None,
    world=WORLD,
    device=CPU,
    **change,
):
    settings = Optimiser(**{**SETTINGS, **change})
    record = record or {"settings": settings.model_dump(mode="json"), "inputs": {"split": "a"}}
    model = model or Toy()
    with own(folder, world.leads) as owned:
        best = fit(
            model,
            settings,
            training,
            validation,
            owned,
            record,
            seed=7,
            device=device,
            world=world,
            on_change=on_change,
        )
    return model, best


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


TIMES = ("seconds", "seconds_left", "samples_per_second", "tokens_per_second", "data_wait", "mfu")


def timeless(folder: Path) -> list[dict]:
    """The rows without what differs each time."""
    other = {*TIMES, "peak_memory_mib"}
    return [{k: v for k, v in row.items() if k not in other} for row in rows(folder)]


def failing_at(step: int):
    """A `training` that is broken off when it reads the samples of a step."""

    def training(first: int, size: int) -> dict:
        if first == step * size:
            raise KeyboardInterrupt
        return samples(first, size)

    return training


def assert_same(one, other) -> None:
    """Two trainings (`train`) ended in the same bits."""
    (model, fitted), (model2, fitted2) = one, other
    for tensors, tensors2 in (
        (model.state_dict(), model2.state_dict()),
        (fitted.weights, fitted2.weights),
        (fitted.last, fitted2.last),
    ):
        assert tensors.keys() == tensors2.keys()
        assert all(torch.equal(tensors[name], tensors2[name]) for name in tensors)
    for name in ("step", "validation", "events"):
        assert getattr(fitted, name) == getattr(fitted2, name)
