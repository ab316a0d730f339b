"""What runs in the processes that `test_distributed.py` starts, two for each training.

As a script, started by torchrun, it trains the toy and the models of a config.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from fake_runs import FakeStore, Toy, make_config, samples, train
from safetensors.torch import save_file

from neuromamba import batches, distributed
from neuromamba.distributed import join
from neuromamba.files import InputError
from neuromamba.finetune import run_finetune
from neuromamba.pretrain import run_pretrain


class Plain(Toy):
    """The toy without dropout, which each process would draw for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].p = 0.0


SETTINGS = {"batch_size": 4, "accumulate": 2, "steps": 12, "log_every": 1, "keep_every": 12}


def validation() -> list[dict]:
    """Three batches of unequal size for one process; for two, two of the first and one other."""
    world = join()
    every = [samples(10_000, 4), samples(10_004, 1), samples(10_005, 3)]
    return every[world.rank :: world.size]


def train_toy(folder: Path, **change):
    return train(
        folder,
        **{"model": Plain(), "validation": validation, "world": join(), **SETTINGS, **change},
    )


def train_config(folder: Path) -> None:
    """Pretrain and fine-tune the models that `make_config` describes, for data that are there."""
    batches.TokenStore = FakeStore
    change = {"finetune": {"steps": 4, "batch_size": 4, "mode": "full", "log_every": 1}}
    config = make_config(folder, **change)
    run_pretrain(config, "fake", "tiny", 0)
    run_finetune(config, "fake", "tiny", 0, "sex")


def run(rank: int, port: int, folder: Path, scenario: str) -> None:
    """One of two processes: what came of the scenario goes to `{rank}.json`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.TIMEOUT = timedelta(seconds=3 if scenario == "hanging" else 60)
    started = time.perf_counter()
    try:
        told = SCENARIOS[scenario](folder / "training", join())
    except InputError as error:
        told = {"error": str(error)}
    except SystemExit as error:
        told = {"status": error.code}
    told["seconds"] = time.perf_counter() - started
    (folder / f"{rank}.json").write_text(json.dumps(told))


def _weights(model: torch.nn.Module) -> dict:
    return {name: value.tolist() for name, value in model.state_dict().items()}


def _fault_of_one(folder: Path, world: distributed.World) -> dict:
    def training(first: int, size: int) -> dict:
        batch = samples(first, size)
        spoilt = world.rank == 1 and first // 8 in (5, 7, 8)
        return {**batch, "y": batch["y"] * math.nan} if spoilt else batch

    model, _ = train_toy(folder, training=training, max_bad_steps=2)
    return {"weights": _weights(model)}


def _signal_to_one(folder: Path, world: distributed.World) -> dict:
    class Signalled(Plain):
        passes = 0

        def loss(self, batch):
            self.passes += self.training
            if world.rank == 1 and self.passes == 11:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(batch)

    try:
        train_toy(folder, model=Signalled())
    except SystemExit as error:
        status = error.code
    model, _ = train_toy(folder)
    return {"status": status, "weights": _weights(model)}


def _uninterrupted(folder: Path, world: distributed.World) -> dict:
    return {"weights": _weights(train_toy(folder)[0])}


def _unequal(folder: Path, world: distributed.World) -> dict:
    train_toy(folder, batch_size=3)
    return {}


def _unreadable(folder: Path, world: distributed.World) -> dict:
    def training(first: int, size: int) -> dict:
        if world.rank == 1 and first >= 40:
            raise InputError("run-40 cannot be read")
        return samples(first, size)

    train_toy(folder, training=training)
    return {}


def _hanging(folder: Path, world: distributed.World) -> dict:
    def training(first: int, size: int) -> dict:
        if first == 42:
            time.sleep(6)
        return samples(first, size)

    train_toy(folder, training=training)
    return {}


def _damaged(folder: Path, world: distributed.World) -> dict:
    checkpoint = folder / "checkpoints" / "step-00000005"
    if world.leads:
        checkpoint.mkdir(parents=True)
    world.wait()
    train_toy(folder)
    return {}


SCENARIOS = {
    "fault": _fault_of_one,
    "signal": _signal_to_one,
    "whole": _uninterrupted,
    "unequal": _unequal,
    "unreadable": _unreadable,
    "hanging": _hanging,
    "damaged": _damaged,
}


def train_all(folder: Path) -> None:
    """Train the toy and the models of a config."""
    reads = []

    def watched(first: int, size: int) -> dict:
        reads.append([first, size])
        return samples(first, size)

    trained, _ = train_toy(folder / "toy", training=watched, ema=0.5)
    (folder / f"reads-{join().rank}.json").write_text(json.dumps(reads))
    if join().leads:
        save_file(trained.state_dict(), folder / "toy.safetensors")
    train_config(folder)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
