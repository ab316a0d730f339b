"""The machine that training runs on: its device, its signals, its threads and its randomness."""

from __future__ import annotations

import errno
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import torch

from neuromamba.files import InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
TRY_AGAIN = os.EX_TEMPFAIL
"""Exit status (75) of a training that was told to stop: the same command goes on with it."""
STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""What a cluster sends before it takes the node away, by itself or on request."""


def describe_device(device: torch.device) -> str:
    """What a training ran on, for the reader of its results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def choose_device(name: str) -> torch.device:
    """The device for `compute.device`: of several GPUs, the one that torchrun meant for us.

    Raises
    ------
    InputError
        For a GPU that is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("compute.device is cuda, and torch finds no GPU; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise InputError(
            f"this is process {number + 1} of a node with {there} GPUs; start one for each GPU "
            f"(torchrun --nproc-per-node {there}), or set compute.device to cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


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
def stop_on_signal() -> Iterator[threading.Event]:
    """Give an event that any signal of `STOPPING` sets."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may handle signals; there the default stays in force.
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
