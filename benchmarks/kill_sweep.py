"""Does a pretraining that is killed again and again end in the same bits as one that is not?

    python benchmarks/kill_sweep.py              # 100 kills, some minutes
    python benchmarks/kill_sweep.py --kills 20

Makes synthetic scans and their tokens, pretrains a tiny NeuroMamba on them without a kill, and then
in processes that get SIGKILL at a random moment, each going on where the one before was killed. A
training that gets to its end is compared with the first, file by file, and the next one begins. The
run fails when a weight or a row of metrics (but for times) differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, head, machine, write_results
from tqdm import tqdm

from neuromamba.bids import run_index
from neuromamba.config import Config, build_config
from neuromamba.demo import write_demo
from neuromamba.layout import Layout
from neuromamba.pretrain import run_pretrain
from neuromamba.rois import run_rois
from neuromamba.splits import run_splits
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

# A fork server has loaded torch once for all the processes that will be killed.
CONTEXT = multiprocessing.get_context("forkserver")

PRETRAIN = {
    "steps": 40,
    "batch_size": 2,
    "accumulate": 2,
    "ema": 0.9,
    "log_every": 5,
    "validate_every": 10,
    "checkpoint_every": 1,
    "keep_every": 20,
}
TIMES = ("seconds", "seconds_left", "samples_per_second", "tokens_per_second", "data_wait", "mfu")


@dataclass
class Outcome:
    """What became of the processes.

    Attributes
    ----------
    kills
        Processes that were killed.
    while_saving
        Those that were writing a checkpoint, and left it half-written.
    trainings
        Trainings that came to their end, with several kills each.
    different
        Those that ended otherwise than the one without a kill.
    """

    kills: int = 0
    while_saving: int = 0
    trainings: int = 0
    different: int = 0


def make_config(folder: Path) -> Config:
    dataset = {"derivatives": str(folder / "data")}
    return build_config(
        {
            "results": str(folder / "results"),
            "datasets": {"made": dataset},
            "models": {
                "tiny": {
                    "family": "neuromamba",
                    "width": 32,
                    "depth": 2,
                    "state": 16,
                    "head_dim": 32,
                    "volumes": 8,
                    "pretrain": PRETRAIN,
                }
            },
            "volumes": {"shape": [24, 24, 24], "voxel_size": 8.0, "shard_volumes": 16},
            "rois": {"cube": 48.0},
            "splits": {"test": 0.3, "validation": 0.2},
            "compute": {"device": "cpu"},
        },
        folder,
        "kill_sweep.py",
    )


def make_tokens(folder: Path) -> None:
    write_demo(folder / "data", subjects=12, volumes=24, voxel_size=8.0, seed=0)
    config = make_config(folder)
    run_index(config, "made")
    for stage in (run_volumes, run_tokens, run_rois):
        stage(config, "made", 0)
    run_splits(config, "made")


def pretrain(folder: Path, ready: Connection) -> None:
    torch.set_num_threads(1)  # more cost more than they bring at this size
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed
    config = make_config(folder)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        ready.send(True)
        run_pretrain(config, "made", "tiny", 0)


def run(folder: Path, kill_after: float | None) -> tuple[bool, float]:
    """Pretrain in a process of its own: whether it came to the end, and how long it took."""
    hear, ready = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=pretrain, args=(folder, ready))
    process.start()
    ready.close()
    hear.recv()
    started = time.perf_counter()
    process.join(kill_after)
    process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        sys.exit(f"the training failed by itself, with status {process.exitcode}")
    return process.exitcode == 0, time.perf_counter() - started


def contents(trained: Path) -> dict[str, object]:
    """All weights that a training left, and its rows without times."""
    found: dict[str, object] = {
        str(path.relative_to(trained)): path.read_bytes() for path in trained.rglob("*.safetensors")
    }
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in (*TIMES, "peak_memory_mib"):
            row.pop(name, None)
    return found | {"metrics.jsonl": rows}


def sweep(folder: Path, kills: int, seed: int) -> tuple[Outcome, float]:
    """Kill so many times: what came of it, and the seconds of a training that nothing stops."""
    trained = Layout(folder / "results", "made").pretrain("tiny", 0)
    for _ in range(2):  # the second is timed: the first has things to load
        shutil.rmtree(trained, ignore_errors=True)
        _, seconds = run(folder, None)
    expected = contents(trained)
    shutil.rmtree(trained)
    rng, outcome = np.random.default_rng(seed), Outcome()
    while outcome.kills < kills or trained.exists():
        killing = outcome.kills < kills
        ended, _ = run(folder, float(rng.uniform(0, seconds / 3)) if killing else None)
        if ended:
            outcome.trainings += 1
            outcome.different += contents(trained) != expected
            shutil.rmtree(trained)
        else:
            outcome.kills += 1
            outcome.while_saving += any(trained.glob(".tmp-owner-*/*-step-*"))
        print(f"\r{asdict(outcome)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return outcome, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    packages = ("torch", "safetensors")
    host = machine(*packages)
    CONTEXT.set_forkserver_preload(["neuromamba.pretrain"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        making = CONTEXT.Process(target=make_tokens, args=(folder,))
        making.start()
        making.join()
        outcome, seconds = sweep(folder, options.kills, options.seed)
    text = (
        f"{head(host, packages)}\n\n"
        f"A pretraining of {PRETRAIN['steps']} steps ({seconds:.1f} s when nothing stops it) was "
        f"killed {outcome.kills} times, {outcome.while_saving} of them while it wrote a "
        f"checkpoint. {outcome.trainings} trainings came to their end in this way; "
        f"{outcome.different} of them differ from the one without a kill in a weight or a row of "
        "metrics."
    )
    print(text)
    result = {"machine": host, "pretrain": PRETRAIN, "seconds": seconds, **asdict(outcome)}
    write_results(options.results, "kill_sweep", result, text)
    if outcome.different or not outcome.trainings:
        sys.exit(1)


if __name__ == "__main__":
    main()
