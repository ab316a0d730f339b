"""AdamW with linear warm-up and cosine decay, and a running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from neuromamba.config import Optimiser


def make_optimizer(model: nn.Module, settings: Optimiser) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, in groups of one rate and one decay.

    Weight decay acts on matrices (and filters) only: not on norms, biases, and the per-head
    parameters of state-space layers, all of which have one dimension.

    A model may scale the learning rate of its parameters (`learning_rate_scales`, from name to
    multiplier), as the maximal update parametrization does for matrices that grow with the width
    (Tensor Programs V, arXiv 2203.03466). AdamW shrinks a weight by rate * decay a step, whatever
    its gradient; the decay is divided by the multiplier, so that this product, and with it the time
    over which a matrix forgets, is the same at every width.
    """
    scales: dict[str, float] = getattr(model, "learning_rate_scales", dict)()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = scales.get(name, 1.0)
            decay = settings.weight_decay / scale if parameter.ndim >= 2 else 0.0
            groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "scale": scale}
            for (scale, decay), parameters in groups.items()
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate(settings: Optimiser, step: int) -> float:
    """The rate of update number `step`, counted from 0: linear warm-up, then half a cosine."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    height = settings.learning_rate - settings.final_learning_rate
    return settings.final_learning_rate + height * (1 + math.cos(math.pi * share)) / 2


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, torch.Tensor]:
    """The optimiser's state as tensors by name, `{what}.{parameter}`."""
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{what}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for what, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, each tensor on its parameter's device."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        what, name = key.split(".", 1)
        # AdamW keeps its step counts on the CPU whatever the device of the parameters.
        device = torch.device("cpu") if what == "step" else parameters[name].device
        optimizer.state[parameters[name]][what] = value.to(device)


class WeightAverage:
    """Exponential running average of the trained parameters, in float32.

    After update n (from 0) it moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights: the
    first updates count for less than a fixed decay would have them count, which would remember the
    random start for as long as it remembers anything. Buffers and frozen parameters are not in it,
    which torch's `AveragedModel` would copy with the whole model.

    Parameters
    ----------
    model
        Its present weights are the first average.
    decay
        The share of the average that one update leaves, in the long run.

    Attributes
    ----------
    tensors : dict of str to torch.Tensor
        By the parameters' names.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters = list(trained.values())
        self.tensors = {name: p.detach().float().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take in the weights after update `number`, counted from 0."""
        kept = min(self.decay, (1 + number) / (10 + number))
        weights = [parameter.float() for parameter in self._parameters]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - kept)

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` was."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the model have the average for its weights, and put its own back after that."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self.tensors.values(), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)
