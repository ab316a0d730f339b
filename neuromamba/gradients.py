"""The gradient of a step: the mean over its batches, and over the processes that share them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from neuromamba.batches import Batch
from neuromamba.config import Optimiser
from neuromamba.distributed import World, adding_up
from neuromamba.scalars import scalars_of


@dataclass(frozen=True)
class Gradients:
    """What is known of a step when its gradients are there and no weight has changed.

    Attributes
    ----------
    scalars
        Means over all windows of the step, and `grad_norm`, before clipping.
    tokens, flops
        Sums over the batches; 0 where nothing tells.
    stop
        Whether any process was told to stop. All this is the same in all processes.
    runs
        The runs that this process has read.
    waited
        Seconds that it waited for them.
    """

    scalars: dict[str, float]
    tokens: float
    flops: float
    stop: bool
    runs: list[str]
    waited: float


def compute_gradients(
    loss: nn.Module,
    batches: Iterator[Batch],
    settings: Optimiser,
    device: torch.device,
    world: World,
    flops: Callable[[Batch], float],
    stopping: Callable[[], bool],
) -> Gradients:
    """Leave the step's mean gradient, clipped, in the parameters of `loss` (`distributed.wrap`).

    The step takes the next `settings.accumulate` of the `batches`. It goes through all of them
    whatever they give, because the other processes do so too.
    """
    sums: dict[str, torch.Tensor] = {}
    counts = [0.0, 0.0]
    runs: list[str] = []
    waited = 0.0
    share = 1 / (settings.accumulate * world.size)
    for number in range(settings.accumulate):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        with adding_up(loss, last=number == settings.accumulate - 1):
            scalars = scalars_of(loss, batch, device, settings.precision)
            (scalars["loss"] / settings.accumulate).backward()
        for name, value in scalars.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() * share
        if "tokens" in batch:
            counts[0] += batch["tokens"].shape[:2].numel()
        counts[1] += flops(batch)
        runs += batch["run"]
    told = torch.tensor([*counts, float(stopping())], dtype=torch.float64, device=device)
    total = world.sum(torch.cat([torch.stack(list(sums.values())), told]))
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, settings.clip_norm)
    # One transfer from the device for all numbers.
    *means, tokens, operations, stop, grad_norm = torch.cat([total, norm.double()[None]]).tolist()
    named = dict(zip(sums, means, strict=True)) | {"grad_norm": grad_norm}
    return Gradients(named, tokens, operations, stop > 0, runs, waited)
