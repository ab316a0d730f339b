"""The machine that training runs on: its device, its signals, its threads and its randomness."""

from __future__ import annotations

import errno
import os
import queue
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import torch

from neuromamba.files import InputError

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT)
STOPPED = 128 + signal.SIGTERM
"""Exit status of a training that was told to stop, as a shell reports it."""


def choose_device(name: str) -> torch.device:
    """The device for `compute.device`; `InputError` for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device is cuda, and torch finds no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def seed_torch(*words: int) -> None:
    """Seed torch's generators from some numbers that together name a place in a training."""
    torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


@contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch for algorithms that give the same bits each time."""
    # cuBLAS reads this when it starts and is not reproducible without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    switch = torch.utils.deterministic
    filling = switch.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Meant for finding bugs, and costs a pass over every new tensor.
    switch.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        switch.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Give an event that SIGTERM sets: SLURM sends it before it takes the node away."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; there the default stays in force.
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def telling_full_disk(folder: Path) -> Iterator[None]:
    """Turn what a full disk raises into an `InputError` with the cure."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors tells the number of an error in its text alone.
        told = [f"os error {number})" in str(error) for number in FULL]
        if getattr(error, "errno", None) not in FULL and not any(told):
            raise
        raise InputError(
            f"{folder}: the disk is full; free some space and start again: the training continues "
            "from its last checkpoint"
        ) from error


def prefetch(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Iterate over `items` in their order, up to `depth` ahead, in one background thread.

    An exception in `items` is raised here, at its place. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not closed.is_set():
            try:
                return ready.put((kind, value), timeout=0.05)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if closed.is_set():
                    return
            put("end", None)
        except BaseException:
            put("error", sys.exc_info()[1])

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        closed.set()
        thread.join()
