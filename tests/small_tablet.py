"""Small models of codes, batches for them, and a naive model in float64 to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from neuromamba.config import Compute, Tablet
from neuromamba.models import build_model

VOLUMES, TOKENS, WIDTH = 6, 27, 24
SMALL = {"volumes": VOLUMES, "width": 24, "depth": 2, "heads": 6, "groups": 2, "hidden": 40}
CODES = {"n_tokens": TOKENS, "code_width": WIDTH}
SCALARS = {"loss", "mse_model", "mse_visible", "mse_static", "skill_visible", "skill_static"}


def settings(**changes: object) -> Tablet:
    return Tablet.model_validate({"family": "tablet", **SMALL, **changes})


def tablet(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return build_model(settings(**changes), 0, Compute(), codes=CODES)


def make_batch(samples: int = 3, volumes: int = VOLUMES) -> dict[str, Tensor]:
    """Codes that change slowly about a mean of each token, on scales as different as real ones."""
    random = torch.Generator().manual_seed(1)
    mean = torch.randn(samples, 1, TOKENS, WIDTH, generator=random) * 3
    change = torch.randn(samples, volumes, TOKENS, WIDTH, generator=random).cumsum(1)
    return {
        "codes": mean + 0.3 * change,
        "repetition_time": torch.tensor([2.0, 0.72, 1.5, 2.0])[:samples],
    }


def naive_states(model: nn.Module, tokens_BLC: Tensor) -> Tensor:
    """States of CLS and embedded tokens after the last norm, head by head, in the model's dtype."""
    s = model.settings
    states = []
    for sample in tokens_BLC:
        h = normed(torch.cat([model.cls[None], sample]), model.input_norm)
        for block in model.blocks:
            h = h + attend(block.attention, normed(h, block.norm), s.position == "rope")
            inner = linear(normed(h, block.mlp_norm), block.mlp[0]).clamp(min=0)
            h = h + linear(inner, block.mlp[2])
        states.append(normed(h, model.norm))
    return torch.stack(states)


def attend(attention: nn.Module, x: Tensor, turned: bool) -> Tensor:
    """Attention of one sequence (token, channel), one head after the other."""
    heads, groups = attention.heads, attention.groups
    size = x.shape[1] // heads
    query, key, value = (linear(x, getattr(attention, n)) for n in ("query", "key", "value"))
    read = []
    for head in range(heads):
        group = head // (heads // groups)
        q = query[:, head * size : (head + 1) * size]
        k, v = (one[:, group * size : (group + 1) * size] for one in (key, value))
        if turned:
            q, k = turn(q), turn(k)
        scores = torch.stack([(q * one).sum(-1) for one in k], 1) / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        read.append(weights @ v)
    return linear(torch.cat(read, 1), attention.out)


def turn(x: Tensor) -> Tensor:
    """Each pair of channels (i, i + half) as a complex number times exp(i * place * frequency)."""
    half = x.shape[1] // 2
    place = torch.arange(len(x), dtype=x.dtype)
    turned = torch.empty_like(x)
    for pair in range(half):
        angle = place * 10000.0 ** (-pair / half)
        number = torch.complex(x[:, pair], x[:, pair + half]) * torch.polar(
            torch.ones_like(angle), angle
        )
        turned[:, pair], turned[:, pair + half] = number.real, number.imag
    return turned


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    center = x - x.mean(-1, keepdim=True)
    spread = (center.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return center / spread * norm.weight + norm.bias
