"""What runs in the processes that `test_kills.py` starts in order to kill them."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from fake_runs import samples, train
from tqdm import tqdm

from neuromamba.checkpoint import save_model
from neuromamba.record import provenance

# Everything that has a state of its own: dropout, a running average, snapshots, a faulty step, a
# rollback, a validation between two checkpoints.
SETTINGS = {
    "steps": 120,
    "batch_size": 2,
    "accumulate": 2,
    "ema": 0.9,
    "checkpoint_every": 3,
    "validate_every": 7,
    "log_every": 4,
    "keep_every": 40,
    "max_bad_steps": 3,
}
FAULTY = {30, 60, 61, 62}
PASSES = 2

# Asks git once for all the processes that are forked from here.
provenance()


def training(first: int, size: int) -> dict:
    batch = samples(first, size)
    step = first // size // PASSES
    return {**batch, "y": batch["y"] * math.nan} if step in FAULTY else batch


def run(folder: Path, ready: Connection, file_event: int | None) -> None:
    """Train to the end, or to the n-th time that a file in `folder` is touched."""
    if file_event is not None:
        kill_at(folder, file_event)
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        ready.send(True)
        _, fitted = train(folder, training=training, **SETTINGS)
    save_model(folder, fitted.weights, {"events": fitted.events}, fitted.last)


def kill_at(folder: Path, number: int) -> None:
    """Kill this process when the interpreter is about to touch a file there for the n-th time."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        touches = event == "open" or event.startswith(("os.", "shutil."))
        if touches and any(str(folder) in str(argument) for argument in arguments):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
