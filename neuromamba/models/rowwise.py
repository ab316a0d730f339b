"""Elementwise chains of the Mamba-2 layer: convolution and SiLU; gate and RMS norm.

Each chain is written twice. `conv_silu_plain` and `gated_norm_plain` are the equations, on whole
tensors. On a GPU they are compiled, each into one kernel for either direction. On a CPU they would
stream arrays of the size of the whole sequence through memory once an operation, and keep several
of them for the backward pass; there a block of rows stays in the cache for the whole chain, and the
backward pass, written out, recomputes from the inputs.

Half-precision inputs are computed with in float32, also under autocast.

Dimensions in names: B batch, L length, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuromamba.models.compiled import compiled_on_gpu

CACHE_ELEMENTS = 1 << 16
"""Elements of a block of rows on a CPU (0.25 MiB in float32)."""


@torch.compiler.disable
def causal_conv_silu(
    x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None
) -> Tensor:
    """Convolve each channel with its own taps over the present and past steps, then SiLU.

    As a sum of shifted copies, which a CPU does faster than a grouped convolution.

    Parameters
    ----------
    x : Tensor, (batch, length, channels)
    weight : Tensor, (channels, taps)
        The last tap multiplies the present step; steps before the first are 0.
    bias : Tensor, (channels,)
    seq_idx : Tensor, (batch, length) integer, optional
        The sequence that each step belongs to, where several are packed one after the other; no
        tap reaches into another one.

    Returns
    -------
    Tensor, (batch, length, channels)
        In the dtype of `x`.
    """
    if x.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return _conv_silu_compiled(x, weight, bias, seq_idx)
    return _CausalConvSilu.apply(x, weight, bias, seq_idx)


@torch.compiler.disable
def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``g / sqrt(mean(g^2) + epsilon) * weight`` over the last axis, with ``g = y * silu(z)``.

    Parameters
    ----------
    y, z : Tensor, (batch, length, channels)
    weight : Tensor, (channels,)
    epsilon : float

    Returns
    -------
    Tensor, (batch, length, channels)
        In the dtype of `y`.
    """
    if y.is_cuda:
        with torch.autocast("cuda", enabled=False):
            return _gated_norm_compiled(y, z, weight, epsilon)
    return _GatedRmsNorm.apply(y, z, weight, epsilon)


def conv_silu_plain(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """The equation of `causal_conv_silu`, for any device and differentiable."""
    dtype, length, taps = _compute_dtype(x), x.shape[1], weight.shape[1]
    before = F.pad(x.to(dtype), (0, 0, taps - 1, 0))
    y = bias.to(dtype)
    for tap in range(taps):
        shifted = before[:, tap : tap + length]
        if seq_idx is not None and tap < taps - 1:
            shift = taps - 1 - tap
            there = F.pad(seq_idx, (shift, 0), value=-1)[:, :length]
            shifted = shifted * (there == seq_idx)[..., None]
        y = y + shifted * weight[:, tap].to(dtype)
    return F.silu(y).to(x.dtype)


def gated_norm_plain(y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The equation of `gated_rms_norm`, for any device and differentiable."""
    dtype = _compute_dtype(y)
    gated = y.to(dtype) * F.silu(z.to(dtype))
    scale = (gated.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (gated * scale * weight.to(dtype)).to(y.dtype)


_conv_silu_compiled = compiled_on_gpu(conv_silu_plain)
_gated_norm_compiled = compiled_on_gpu(gated_norm_plain)


class _CausalConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.seq_idx = seq_idx
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _row_blocks(x):
                y[:, rows] = F.silu(_Rows(x, weight, seq_idx, rows).convolve(bias))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias = ctx.saved_tensors
        dtype = _compute_dtype(x)
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
        dtaps = torch.zeros(weight.T.shape, dtype=dtype, device=x.device)
        dbias = torch.zeros(bias.shape, dtype=dtype, device=x.device)
        with torch.autocast(x.device.type, enabled=False):
            for rows in _row_blocks(x):
                block = _Rows(x, weight, ctx.seq_idx, rows)
                before_silu = block.convolve(bias)
                d = torch.ops.aten.silu_backward(dy[:, rows].to(dtype), before_silu)
                dbias += d.sum((0, 1))
                dx_near = dx[:, block.near]
                for tap, here, there in block.shifts():
                    d_tap = block.where_same(d[:, here], here, there)
                    dx_near[:, there].addcmul_(d_tap, block.taps[tap])
                    dtaps[tap] += (d_tap * block.x[:, there]).sum((0, 1))
        return dx.to(x.dtype), dtaps.T.to(weight.dtype), dbias.to(bias.dtype), None


class _Rows:
    """A block of rows of the convolution, with the rows before it that its taps reach.

    Attributes
    ----------
    near : slice
        Which rows of the whole these are.
    x : Tensor, (batch, rows of `near`, channels)
        Their inputs, converted once.
    taps : Tensor, (taps, channels)
    """

    def __init__(self, x: Tensor, weight: Tensor, seq_idx: Tensor | None, rows: slice) -> None:
        dtype = _compute_dtype(x)
        self.taps = weight.T.to(dtype).contiguous()
        self.near = slice(max(0, rows.start - len(self.taps) + 1), rows.stop)
        self.x = x[:, self.near].to(dtype)
        self.first = rows.start - self.near.start
        self.ids = None if seq_idx is None else seq_idx[:, self.near]
        if self.ids is not None and bool((self.ids == self.ids[:, :1]).all()):
            self.ids = None  # one sequence here, as in most blocks

    def convolve(self, bias: Tensor) -> Tensor:
        batch, n_near, channels = self.x.shape
        y = bias.to(self.x.dtype).expand(batch, n_near - self.first, channels).clone()
        for tap, here, there in self.shifts():
            y[:, here].addcmul_(self.where_same(self.x[:, there], here, there), self.taps[tap])
        return y

    def shifts(self) -> Iterator[tuple[int, slice, slice]]:
        """For each tap: the block's rows that have a row under it, and where in `near` they lie."""
        n_near = self.x.shape[1]
        for tap in reversed(range(len(self.taps))):
            shift = len(self.taps) - 1 - tap
            start = max(self.first, shift)
            if start < n_near:
                here = slice(start - self.first, n_near - self.first)
                yield tap, here, slice(start - shift, n_near - shift)

    def where_same(self, values: Tensor, here: slice, there: slice) -> Tensor:
        """`values`, with 0 where the row and the one under its tap are of different sequences."""
        if self.ids is None:
            return values
        now = slice(here.start + self.first, here.stop + self.first)
        return values * (self.ids[:, now] == self.ids[:, there])[..., None]


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.epsilon = epsilon
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        dtype = _compute_dtype(y)
        with torch.autocast(y.device.type, enabled=False):
            for rows in _row_blocks(y):
                gated = F.silu(z[:, rows].to(dtype)).mul_(y[:, rows])
                out[:, rows] = gated.mul_(_inverse_rms(gated, epsilon)).mul_(weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        y, z, weight = ctx.saved_tensors
        dtype = _compute_dtype(y)
        dy, dz = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (y, z))
        dweight = torch.zeros(weight.shape, dtype=dtype, device=y.device)
        with torch.autocast(y.device.type, enabled=False):
            for rows in _row_blocks(y):
                y_rows, z_rows, d = (v[:, rows].to(dtype) for v in (y, z, dout))
                gate = F.silu(z_rows)
                normed = y_rows * gate
                scale = _inverse_rms(normed, ctx.epsilon)
                normed *= scale
                dweight += (d * normed).sum((0, 1))
                d = d * weight
                along = (d * normed).mean(-1, keepdim=True)
                d = d.addcmul_(normed, along, value=-1).mul_(scale)
                dz[:, rows] = torch.ops.aten.silu_backward(d * y_rows, z_rows)
                dy[:, rows] = d.mul_(gate)
        return dy, dz, dweight.to(weight.dtype), None


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row_blocks(x: Tensor) -> Iterator[slice]:
    length = x.shape[1]
    size = max(1, CACHE_ELEMENTS // (x.shape[0] * x.shape[2]))
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    return x.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
