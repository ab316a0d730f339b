"""Low-rank adapters: a frozen model is fine-tuned by small changes of its linear layers (LoRA).

A weight W (out, in) becomes W + alpha / rank * up @ down, with `up` (out, rank), `down` (rank, in).
Source: Hu et al. 2021 (arXiv 2106.09685).

Design choices
--------------
- `up` starts at 0, so that the first step is that of the pretrained model; `down` starts as a
  linear layer of torch does, as in the authors' code.
- All `nn.Linear` of the backbone are adapted, but for its `head`, which an embedding does without,
  and its `pool`, which learns itself. Nothing else in it learns: norms, biases, convolutions and
  state-space parameters stay, and it works as in evaluation.
- They are parametrizations (`torch.nn.utils.parametrize`): code that reads a layer's `weight`, as
  fused kernels do, gets the adapted one, and no family knows of adapters.
- The sum is taken in the precision of the weights also under autocast. What is merged into plain
  weights at the end is then what was trained, and whoever loads a model need not know either.
- A layer with a side shorter than `rank` gets that side for its rank: more could add nothing.
- Where the learning rate follows the width (muP), that of `down`, which sums over the layer's
  input, is scaled as the layer's own would be, and that of `up`, which sums over the rank, is not.
  These are the orders that Hayou et al. 2024 (arXiv 2402.12354) find to be right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from neuromamba.config import Adapters

APART = ("head", "pool")
"""Parts of a backbone that get no adapters."""
_ADDED = ".parametrizations.weight."


class LowRank(nn.Module):
    """From a weight (out, in) to the adapted one.

    Parameters
    ----------
    weight
        As pretrained.
    settings
        Rank and alpha.
    rate
        Multiplier of the learning rate of `down`.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, settings: Adapters, rate: float) -> None:
        super().__init__()
        rank = min(settings.rank, *weight.shape)
        self.rate = rate
        # With the weights, so that these can be merged by whoever has nothing else.
        self.register_buffer("scale", weight.new_tensor(settings.alpha / settings.rank))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        # Drawn on the CPU: the same on every device.
        down = nn.init.kaiming_uniform_(torch.empty(rank, weight.shape[1]), a=math.sqrt(5))
        self.down = nn.Parameter(down.to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return _adapt(weight, self.up, self.down, self.scale)


def add_adapters(backbone: nn.Module, settings: Adapters) -> None:
    """Adapt the linear layers of a model, whose weights stay as they are.

    `down` is drawn from torch's global generator. That a frozen weight requires no gradient is up
    to the caller.
    """
    rates: dict[str, float] = getattr(backbone, "learning_rate_scales", dict)()
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and name.split(".")[0] not in APART
    }
    for name, layer in layers.items():
        change = LowRank(layer.weight.detach(), settings, rates.get(f"{name}.weight", 1.0))
        parametrize.register_parametrization(layer, "weight", change)


def remove_adapters(model: nn.Module) -> None:
    """Leave the weights as they were before `add_adapters`."""
    for layer, _ in list(_adapted(model)):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def adapter_rates(model: nn.Module) -> dict[str, float]:
    """Multipliers of the learning rate of the adapters in a model, by parameter."""
    modules = model.named_modules()
    return {f"{name}.down": one.rate for name, one in modules if isinstance(one, LowRank)}


def merge_adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain weights of those of a model with adapters; of any other model, the same."""
    merged = {}
    for name, value in weights.items():
        layer, added, part = name.partition(_ADDED)
        if not added:
            merged[name] = value
        elif part == "original":
            up, down, scale = (weights[f"{layer}{_ADDED}0.{n}"] for n in ("up", "down", "scale"))
            merged[f"{layer}.weight"] = _adapt(value, up, down, scale)
    return merged


def _adapted(model: nn.Module) -> Iterator[tuple[nn.Module, LowRank]]:
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            (change,) = module.parametrizations["weight"]  # type: ignore[index]
            if isinstance(change, LowRank):
                yield module, change


def _adapt(weight: Tensor, up: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    return weight + scale * (up @ down)
