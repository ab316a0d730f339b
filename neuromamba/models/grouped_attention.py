"""Grouped-query attention with rotary positions, and the Transformer block that is made of it.

Sources: grouped-query attention, J. Ainslie et al. 2023 (arXiv 2305.13245); rotary positions, J. Su
et al. 2021 (arXiv 2104.09864), equation 34. Which channels make a pair is not told by either; here
it is channel i and i + D / 2 of a head, as in TABLeT's released code and in most others.

Dimensions in names: B samples, N tokens of a sequence, C channels, H heads, G groups of heads that
share keys and values, D channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 10000.0
"""The longest period of the rotation is 2 pi times as many positions."""


class Rotation(NamedTuple):
    """The cosines and sines of each token's angles.

    Attributes
    ----------
    cos, sin : Tensor, (N, D / 2) float32
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BHND: Tensor) -> Tensor:
        """Rotate each pair of channels by its angle; in float32, given back as it came."""
        first, second = x_BHND.float().chunk(2, -1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, -1).to(x_BHND.dtype)


def rotation(position_N: Tensor, channels: int) -> Rotation:
    """The rotation of tokens at some positions, float32, in heads of `channels` (even) channels."""
    half = channels // 2
    pair = torch.arange(half, device=position_N.device, dtype=torch.float32)
    angles_ND = position_N[:, None] * BASE ** (-pair / half)
    return Rotation(angles_ND.cos(), angles_ND.sin())


class GroupedAttention(nn.Module):
    """Softmax attention among all tokens, in which groups of heads share keys and values.

    Parameters
    ----------
    width
        Channels, C.
    heads, groups
        H and G; head h reads the keys and values of group h // (H / G).
    """

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        shared = width // heads * groups
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, shared)
        self.value = nn.Linear(width, shared)
        self.out = nn.Linear(width, width)

    def forward(self, x_BNC: Tensor, turn: Rotation | None) -> Tensor:
        query_BHND = self.query(x_BNC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key_BGND = self.key(x_BNC).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        value_BGND = self.value(x_BNC).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        if turn is not None:
            query_BHND, key_BGND = turn(query_BHND), turn(key_BGND)
        if query_BHND.is_cuda and query_BHND.dtype == torch.float32:
            # Of the kernels that share keys, none that takes float32 on a GPU does without the
            # whole (N, N) matrix; copies of keys and values are small beside that.
            copies = self.heads // self.groups
            key_BGND, value_BGND = (
                one.repeat_interleave(copies, 1) for one in (key_BGND, value_BGND)
            )
        read = F.scaled_dot_product_attention(query_BHND, key_BGND, value_BGND, enable_gqa=True)
        return self.out(read.transpose(1, 2).flatten(2))


class GroupedBlock(nn.Module):
    """LayerNorm -> attention -> residual, LayerNorm -> Linear -> ReLU -> Linear -> residual."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = GroupedAttention(width, heads, groups)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, h_BNC: Tensor, turn: Rotation | None) -> Tensor:
        h_BNC = h_BNC + self.attention(self.norm(h_BNC), turn)
        return h_BNC + self.mlp(self.mlp_norm(h_BNC))
