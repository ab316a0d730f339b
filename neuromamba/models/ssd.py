"""State-space duality (SSD), the sequence mixer of Mamba-2, in plain PyTorch.

Source of the equations: T. Dao and A. Gu, "Transformers are SSMs: Generalized Models and Efficient
Algorithms Through Structured State Space Duality" (2024), arXiv 2405.21060.

Every head runs the linear recurrence (their equations 1 and 2 with a scalar A, zero-order hold on
A and Euler on B, plus the skip D)::

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        h: (state, head_dim), h_0 = 0
    y_t = C_t^T h_t + D x_t

`ssd_recurrence` is that loop, the reference. `ssd_chunked` is their block decomposition (section
6): inside a chunk of Q steps the quadratic form ``y = (L * C B^T) (dt x)``, with
``L_ij = exp(sum_{k=j+1..i} dt_k A)``, and between chunks the recurrence on the chunks' last states.

Choices made for a CPU, where memory traffic costs more than arithmetic:

- Chunks are worked through in groups small enough for the cache, which carry their state to the
  next group; the group's own chunk-to-chunk recurrence is one more small SSD matrix (their
  equation 22).
- The backward pass is written out and recomputes L and the states from the inputs, so that nothing
  quadratic in Q, and only one state a group, is kept.
- Every decay is the exponential of a sum of non-positive terms, never a ratio of exponentials. The
  gradient of a decay sums only the pairs (i, j) that it lies between, never the difference of two
  large sums, so that it survives extreme dt.

Several sequences packed one after the other are told apart by a decay of exactly 0 at the first
step of each, so that packing costs nothing.

Dimensions in names: B batch, L length, H heads, P head_dim, N state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuromamba.models.compiled import compiled_on_gpu
from neuromamba.models.ssd_chunks import Inputs, backward_group, cut, forward_group, join

CACHE_ELEMENTS = 1 << 17
"""Elements of the largest temporary that a group of chunks makes on a CPU (0.5 MiB in float32)."""


def ssd_recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Run the recurrence one step at a time, in the dtype of `x`: the reference, and slow.

    Parameters and return value are those of `ssd_chunked`.
    """
    state_BHNP = x.new_zeros(x.shape[0], x.shape[2], B.shape[-1], x.shape[3])
    starts = first_steps(torch.zeros(x.shape[:2], device=x.device) if seq_idx is None else seq_idx)
    outputs = []
    for x_BHP, dt_BH, B_BN, C_BN, starts_B in zip(
        x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), starts.unbind(1), strict=True
    ):
        update = torch.einsum("bn,bhp->bhnp", B_BN, dt_BH[..., None] * x_BHP)
        state_BHNP = state_BHNP.masked_fill(starts_B[:, None, None, None], 0)
        state_BHNP = torch.exp(dt_BH * A)[..., None, None] * state_BHNP + update
        outputs.append(torch.einsum("bn,bhnp->bhp", C_BN, state_BHNP) + D[:, None] * x_BHP)
    return torch.stack(outputs, dim=1)


def first_steps(seq_idx: Tensor) -> Tensor:
    """Where a sequence starts: (batch, length) bool, true wherever `seq_idx` changes."""
    first = torch.ones_like(seq_idx[:, :1], dtype=torch.bool)
    return torch.cat([first, seq_idx[:, 1:] != seq_idx[:, :-1]], dim=1)


@torch.compiler.disable
def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk: int = 64,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Run the recurrence in chunks; the same numbers as `ssd_recurrence`.

    Half-precision inputs are kept as they are between the passes and computed with in float32,
    also under autocast, but for the factors of matrix products, which stay bfloat16 where `x` is;
    float64 stays float64.

    Parameters
    ----------
    x : Tensor, (batch, length, heads, head_dim)
        Input; any length >= 1.
    dt : Tensor, (batch, length, heads)
        Step sizes, >= 0.
    A : Tensor, (heads,)
        Decay rates, <= 0.
    B, C : Tensor, (batch, length, state)
        Input and output maps, shared by all heads.
    D : Tensor, (heads,)
        Skip connection.
    chunk : int
        Steps a chunk; changes speed and rounding only.
    seq_idx : Tensor, (batch, length) integer, optional
        The sequence that each step belongs to, where several are packed one after the other: the
        state is 0 at the start of each, wherever in a chunk that is.

    Returns
    -------
    Tensor, (batch, length, heads, head_dim)
        Output in the dtype of `x`.
    """
    starts = None if seq_idx is None else first_steps(seq_idx)
    return _Ssd.apply(x, dt, A, B, C, D, starts, chunk)


_forward_compiled = compiled_on_gpu(forward_group)
_backward_compiled = compiled_on_gpu(backward_group)


class _Ssd(torch.autograd.Function):
    """The chunked scan with its gradient written out."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, chunk = Inputs(*arguments[:-1]), arguments[-1]
        batch, length, heads, head_dim = inputs.x.shape
        entry_BHNP = inputs.x.new_zeros(
            (batch, heads, inputs.B.shape[-1], head_dim), dtype=_compute_dtype(inputs.x)
        )
        y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
        size = chunk * _chunks_per_group(inputs.x, chunk)
        forward = _forward_compiled if y.is_cuda else forward_group
        entries = []
        with torch.autocast(y.device.type, enabled=False):
            for start in range(0, length, size):
                rows = slice(start, min(start + size, length))
                entries.append(entry_BHNP)
                y_BKQHP, entry_BHNP = forward(inputs.chunks(rows, chunk), entry_BHNP)
                y[:, rows] = join(y_BKQHP, rows.stop - rows.start)
        ctx.save_for_backward(*inputs, torch.stack(entries))
        ctx.chunk, ctx.size = chunk, size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, entries = ctx.saved_tensors
        inputs, chunk, length = Inputs(*saved), ctx.chunk, dy.shape[1]
        dx, ddt, dA, dB, dC, dD = (torch.zeros_like(v) for v in saved[:6])
        backward = _backward_compiled if dy.is_cuda else backward_group
        dentry_BHNP = torch.zeros_like(entries[0])
        with torch.autocast(dy.device.type, enabled=False):
            for index in reversed(range(len(entries))):
                rows = slice(index * ctx.size, min((index + 1) * ctx.size, length))
                part, dentry_BHNP = backward(
                    inputs.chunks(rows, chunk), entries[index], cut(dy[:, rows], chunk), dentry_BHNP
                )
                for whole, gradient in ((dx, part.x), (ddt, part.dt), (dB, part.B), (dC, part.C)):
                    whole[:, rows] = join(gradient, rows.stop - rows.start)
                dA += part.A
                dD += part.D
        return dx, ddt, dA, dB, dC, dD, None, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks_per_group(x: Tensor, chunk: int) -> int:
    """Few enough for the cache on a CPU; on a GPU as many as keep its cores busy."""
    elements = CACHE_ELEMENTS if x.device.type == "cpu" else 64 * CACHE_ELEMENTS
    return max(1, elements // (x.shape[0] * x.shape[2] * chunk * max(chunk, x.shape[3])))
