"""What runs in the processes that `test_kills.py` and `test_owned.py` start to kill or to stop."""

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
from neuromamba.files import InputError
from neuromamba.owned import own
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


def run(
    folder: Path, pipe: Connection, file_event: int | None, number: int = signal.SIGKILL
) -> None:
    """Train to the end; at the n-th time that a file in `folder` is touched, send oneself a signal.

    The pipe hears of the beginning, and what the training was ended by, if anything.
    """
    if file_event is not None:
        signal_at(folder, file_event, number)
    tqdm.set_lock(threading.RLock())  # its own would outlive a process that is killed
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        pipe.send(True)
        try:
            train_and_save(folder)
        except InputError as error:
            pipe.send(str(error))
            raise SystemExit(2) from error


def train_and_save(folder: Path) -> None:
    _, fitted = train(folder, training=training, **SETTINGS)
    with own(folder) as owned:
        info = {"events": fitted.events}
        save_model(folder, fitted.weights, info, fitted.last, owned.writing)


def signal_at(folder: Path, file_event: int, number: int) -> None:
    """Send this process a signal when the interpreter is about to touch a file the n-th time."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        touches = event == "open" or event.startswith(("os.", "shutil."))
        if touches and any(str(folder) in str(argument) for argument in arguments):
            count += 1
            if count == file_event:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)
