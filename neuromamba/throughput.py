"""How fast a training goes, and what it takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

TRAIN_FLOPS = 3.0
"""Operations of a step over those of its forward pass: the backward pass takes twice as many."""


@dataclass
class Meter:
    """Sums over the steps since the last row of `metrics.jsonl`.

    Attributes
    ----------
    steps
        How many.
    seconds, waited
        How long they took, and how much of that the loop waited for batches.
    tokens, flops
        Tokens, and operations of the forward pass, in the batches of all processes; 0 where batches
        hold no `tokens`, or the model does not tell.
    """

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def add(self, tokens: float, flops: float, waited: float, started: float) -> None:
        """Count one more step, which `started` at that `time.perf_counter()`."""
        self.steps += 1
        self.tokens += tokens
        self.flops += flops
        self.waited += waited
        self.seconds += time.perf_counter() - started

    def speeds(self, windows: int, steps_left: int, peak: Callable[[], float]) -> dict[str, float]:
        """What a row tells of these steps, which had `windows` windows each.

        Returns
        -------
        dict
            `samples_per_second`; `tokens_per_second`; `data_wait`, a share of the time;
            `seconds_left` at this pace; `mfu`, the model's operations in a second over `peak()`.
        """
        seconds = max(self.seconds, 1e-9)
        rates = {
            "samples_per_second": self.steps * windows / seconds,
            "seconds_left": steps_left * seconds / self.steps,
            "data_wait": self.waited / seconds,
        }
        if self.tokens:
            rates["tokens_per_second"] = self.tokens / seconds
        if self.flops:
            rates["mfu"] = TRAIN_FLOPS * self.flops / seconds / peak()
        return rates


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, in MiB: on a GPU by tensors, otherwise by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@cache
def peak_flops(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product on this device, measured once (a second).

    The yardstick of `mfu`. It is lower than what a vendor promises, and the same program reaches it
    with the same library, precision and number of threads.
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = getattr(torch, precision)
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, device=device).to(dtype)
    times = []
    for _ in range(4):
        _finish(device)
        start = time.perf_counter()
        matrix @ matrix
        _finish(device)
        times.append(time.perf_counter() - start)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # these matrices are not the training's
    return 2 * size**3 / min(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
