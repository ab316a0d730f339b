"""Several processes that train one model together: who they are, and what they tell each other.

`torchrun` starts them, one for each GPU, on one node or many, and tells each its number by the
environment. Gradients are averaged by torch's `DistributedDataParallel`, over NCCL between GPUs and
over Gloo between CPUs; everything else is a few numbers or lines of JSON.

Design choices
--------------
- All processes take every decision from the same numbers, so none waits for what another skips.
- The process of rank 0 alone reads and writes checkpoints, metrics and models, and tells the
  others: they need no file system in common but for the data.
- A process that fails closes its connections, which stops the others at once; one that hangs stops
  them after `TIMEOUT`.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from neuromamba.files import InputError

TIMEOUT = timedelta(minutes=10)
"""How long the processes wait for one of them (our choice)."""

_LOST = ("gloo/", "NCCL", "Connection closed", "Connection reset")


@dataclass(frozen=True)
class World:
    """The processes of a training, seen from one of them, which has the number `rank`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """How many windows of a batch are this process's; `InputError` when it cannot be shared."""
        if batch_size % self.size:
            self.fail(
                f"batch_size is {batch_size}, which {self.size} processes cannot share equally; "
                f"use a multiple of {self.size}, or start another number of processes"
            )
        return batch_size // self.size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the tensors of all processes, in place, on the device where they are."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What each process has to say, JSON-able, in the order of their ranks."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        width = int(max(sizes))
        texts = [torch.zeros(width, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(texts, nn.functional.pad(text, (0, width - len(text))))
        both = zip(texts, sizes, strict=True)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in both]

    def from_lead(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in rank 0, JSON-able; an `InputError` there ends all processes."""
        if self.size == 1:
            return make()
        problem, told = None, {}
        if self.leads:
            try:
                told = {"value": make()}
            except InputError as error:
                problem = error
        told = self.gather(told)[0]
        if problem is not None:
            raise problem
        if "value" not in told:
            self.fail("rank 0 has failed")
        return told["value"]

    def fail(self, message: str) -> NoReturn:
        """End all processes, which all call this: rank 0 by `InputError`, the others quietly."""
        if self.leads:
            raise InputError(message)
        raise SystemExit(2)

    def tensors_from_lead(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that rank 0 has, by name, on the CPU."""
        if self.size == 1:
            return dict(tensors)
        kinds = {
            name: [list(value.shape), str(value.dtype).removeprefix("torch.")]
            for name, value in tensors.items()
        }
        shared = {}
        for name, (shape, dtype) in self.gather(kinds)[0].items():
            value = torch.empty(shape, dtype=getattr(torch, dtype))
            if self.leads:
                value.copy_(tensors[name])
            dist.broadcast(value, 0)
            shared[name] = value
        return shared

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.gather(None)


def join() -> World:
    """Meet the processes that torchrun has started, once; without torchrun, a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        atexit.register(dist.destroy_process_group)
    return World(dist.get_rank(), dist.get_world_size())


class Loss(nn.Module):
    """A module whose forward pass is the loss of `model`: what gradients are averaged for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self.model.loss(batch)  # type: ignore[operator]


def wrap(model: nn.Module, world: World) -> nn.Module:
    """`Loss` of the model, whose gradients are averaged over all processes.

    Every parameter that requires a gradient has to take part in the loss.
    """
    loss = Loss(model)
    return DistributedDataParallel(loss) if world.size > 1 else loss


@contextmanager
def adding_up(loss: nn.Module, last: bool) -> Iterator[None]:
    """Keep gradients to this process but for the `last` of the batches that make up a step."""
    if last or not isinstance(loss, DistributedDataParallel):
        yield
    else:
        with loss.no_sync():
            yield


@contextmanager
def telling_lost_processes(world: World) -> Iterator[None]:
    """Turn the loss of another process into an `InputError` that says where to look."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)
        if world.size == 1 or not lost:
            raise
        raise InputError(
            f"process {world.rank} of {world.size} has lost another one, which has failed or has "
            f"not answered for {TIMEOUT}; its own message says why, and the same command continues "
            "from the last checkpoint"
        ) from error
