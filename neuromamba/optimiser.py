"""AdamW with linear warm-up and cosine decay, and its state as plain tensors."""

from __future__ import annotations

import math

import torch
from torch import nn

from neuromamba.config import Optimiser


def make_optimizer(model: nn.Module, settings: Optimiser) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient.

    Weight decay acts on matrices (and filters) only: not on norms, biases, and the per-head
    parameters of state-space layers, all of which have one dimension.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


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
    for key, value in tensors.items():
        what, name = key.split(".", 1)
        # AdamW keeps its step counts on the CPU whatever the device of the parameters.
        device = torch.device("cpu") if what == "step" else parameters[name].device
        optimizer.state[parameters[name]][what] = value.to(device)
