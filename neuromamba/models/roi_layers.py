"""Layers that the models of ROI series share: time in seconds, local blocks, attention.

Dimensions in names: B samples, R ROIs, T time patches, N tokens, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromamba.models.ssm import EPSILON

PERIODS = tuple(2.0**k for k in range(2, 10))
"""Periods of the code of time, in s: from twice a usual repetition time to half a usual run."""

TIME_FEATURES = 2 * len(PERIODS)


def time_code(repetition_time_B: Tensor, n_time: int, patch: int) -> Tensor:
    """Sines and cosines of the time of each patch's centre since the window's start.

    Sinusoids as in arXiv 1706.03762, section 3.5, but of seconds, so that windows of different
    repetition times are told apart by what they are: sampled at other times.

    Parameters
    ----------
    repetition_time_B : Tensor
        In s.
    n_time : int
        Patches of a window.
    patch : int
        Volumes of a patch.

    Returns
    -------
    Tensor, (B, n_time, TIME_FEATURES)
    """
    volumes_T = (torch.arange(n_time, device=repetition_time_B.device) + 0.5) * patch
    seconds_BT = repetition_time_B[:, None] * volumes_T
    angles = seconds_BT[..., None] * (2 * math.pi / seconds_BT.new_tensor(PERIODS))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def projection(n_rois: int, columns: int) -> Tensor:
    """A random matrix (n_rois, columns) with orthogonal columns, where there are enough ROIs.

    Its entries have a variance of 1. Sums over the ROIs with such weights keep a little more of how
    samples differ than sums with independent weights do.
    """
    return nn.init.orthogonal_(torch.empty(n_rois, columns), math.sqrt(max(n_rois, columns)))


class LocalBlock(nn.Module):
    """RMSNorm -> convolution of each channel over neighbouring times -> perceptron -> residual.

    The block of ConvNeXt (arXiv 2201.03545) in one dimension. It acts within a ROI, on
    (B, R, T, C).

    Parameters
    ----------
    width : int
    taps : int
        Odd; a patch reads those within ``taps // 2`` of it.
    """

    def __init__(self, width: int, taps: int = 3) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, EPSILON)
        self.taps = nn.Parameter(torch.empty(taps, width).normal_(std=taps**-0.5))
        self.mlp = Perceptron(width, 2 * width)

    def forward(self, h_BRTC: Tensor) -> Tensor:
        n_time, reach = h_BRTC.shape[2], len(self.taps) // 2
        padded = F.pad(self.norm(h_BRTC), (0, 0, reach, reach))
        parts = [padded[:, :, k : k + n_time] * tap for k, tap in enumerate(self.taps)]
        return h_BRTC + self.mlp(torch.stack(parts).sum(0))


class Perceptron(nn.Sequential):
    """Linear -> GELU -> Linear, to the same width."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Attention(nn.Module):
    """Softmax attention with several heads, by torch's fused kernels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, to_BNC: Tensor, of_BNC: Tensor, seen_BN: Tensor | None) -> Tensor:
        """Read `of_BNC`, where `seen_BN` is True, for each token of `to_BNC`."""
        query = self.query(to_BNC).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        both = self.key_value(of_BNC).unflatten(-1, (2, self.heads, -1))
        key, value = both.permute(2, 0, 3, 1, 4)
        mask = None if seen_BN is None else seen_BN[:, None, None, :]
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(read.transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """Pre-norm Transformer block: attention, then a perceptron, each with a residual.

    Its tokens read one another, or with `of_BNC` other tokens, which are taken as they are.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, EPSILON)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width, EPSILON)
        self.mlp = Perceptron(width, mlp_ratio * width)

    def forward(
        self, h_BNC: Tensor, seen_BN: Tensor | None = None, of_BNC: Tensor | None = None
    ) -> Tensor:
        normed = self.norm(h_BNC)
        h_BNC = h_BNC + self.attention(normed, normed if of_BNC is None else of_BNC, seen_BN)
        return h_BNC + self.mlp(self.mlp_norm(h_BNC))
