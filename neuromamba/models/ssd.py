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

Dimensions in names: B batch, L length, H heads, P head_dim, N state, K chunks of a group, Q steps
of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHE_ELEMENTS = 1 << 17
"""Elements of the largest temporary that a group of chunks makes on a CPU (0.5 MiB in float32)."""


def ssd_recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Run the recurrence one step at a time, in the dtype of `x`: the reference, and slow.

    Parameters and return value are those of `ssd_chunked`.
    """
    state_BHNP = x.new_zeros(x.shape[0], x.shape[2], B.shape[-1], x.shape[3])
    outputs = []
    for x_BHP, dt_BH, B_BN, C_BN in zip(
        x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True
    ):
        update = torch.einsum("bn,bhp->bhnp", B_BN, dt_BH[..., None] * x_BHP)
        state_BHNP = torch.exp(dt_BH * A)[..., None, None] * state_BHNP + update
        outputs.append(torch.einsum("bn,bhnp->bhp", C_BN, state_BHNP) + D[:, None] * x_BHP)
    return torch.stack(outputs, dim=1)


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int = 64
) -> Tensor:
    """Run the recurrence in chunks; the same numbers as `ssd_recurrence`.

    Half-precision inputs are kept as they are between the passes and computed with in float32,
    also under autocast; float64 stays float64.

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

    Returns
    -------
    Tensor, (batch, length, heads, head_dim)
        Output in the dtype of `x`.
    """
    return _Ssd.apply(x, dt, A, B, C, D, chunk)


class _Group(NamedTuple):
    """What forward and backward both need of one group of chunks."""

    x_BKHQP: Tensor
    u_BKHQP: Tensor  # dt x
    dt_BKHQ: Tensor
    B_BKQN: Tensor
    C_BKQN: Tensor
    L_BKHQQ: Tensor  # decay from step j to step i, 0 for j > i
    M_BKHQQ: Tensor  # L * C B^T
    from_entry_BKHQ: Tensor  # decay from the chunk's entry to step i
    to_end_BKHQ: Tensor  # decay from step j to the chunk's end
    C_in_BKHQN: Tensor  # C decayed from the chunk's entry
    B_out_BKHQN: Tensor  # B decayed to the chunk's end
    total_BKH: Tensor  # decay over the chunk
    carry_BHE: Tensor  # decay from the group's entry to state i, of E = K + 1 states
    passing_BHEK: Tensor  # decay from the end of chunk j to state i, 0 for j >= i
    states_BEHNP: Tensor  # at each chunk's entry, and after the last chunk


class _Inputs(NamedTuple):
    """The arguments of the scan, or their part for one group of chunks."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor

    def part(self, rows: slice) -> _Inputs:
        x, dt, A, B, C, D = self
        return _Inputs(x[:, rows], dt[:, rows], A, B[:, rows], C[:, rows], D)


class _Ssd(torch.autograd.Function):
    """The chunked scan with its gradient written out."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs, chunk = _Inputs(*arguments[:-1]), arguments[-1]
        batch, length, heads, head_dim = inputs.x.shape
        entry_BHNP = inputs.x.new_zeros(
            (batch, heads, inputs.B.shape[-1], head_dim), dtype=_compute_dtype(inputs.x)
        )
        y = torch.empty(inputs.x.shape, dtype=inputs.x.dtype, device=inputs.x.device)
        size = chunk * _chunks_per_group(inputs.x, chunk)
        entries = []
        with torch.autocast(y.device.type, enabled=False):
            for start in range(0, length, size):
                rows = slice(start, start + size)
                entries.append(entry_BHNP)
                y[:, rows], entry_BHNP = _forward_group(inputs.part(rows), chunk, entry_BHNP)
        ctx.save_for_backward(*inputs, torch.stack(entries))
        ctx.chunk, ctx.size = chunk, size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, entries = ctx.saved_tensors
        inputs = _Inputs(*saved)
        total = _Inputs(*(torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in inputs))
        dentry_BHNP = torch.zeros_like(entries[0])
        with torch.autocast(dy.device.type, enabled=False):
            for index in reversed(range(len(entries))):
                rows = slice(index * ctx.size, (index + 1) * ctx.size)
                gradient, dentry_BHNP = _backward_group(
                    inputs.part(rows), ctx.chunk, entries[index], dy[:, rows], dentry_BHNP
                )
                for whole, part in zip(total.part(rows), gradient, strict=True):
                    whole += part
        return (*total, None)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks_per_group(x: Tensor, chunk: int) -> int:
    """Few enough for the cache on a CPU; on a GPU as many as keep its cores busy."""
    elements = CACHE_ELEMENTS if x.device.type == "cpu" else 64 * CACHE_ELEMENTS
    return max(1, elements // (x.shape[0] * x.shape[2] * chunk * max(chunk, x.shape[3])))


def _cut(v: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """(B, L, ...) -> (B, K, Q, ...), padded with zeros: steps of dt = 0 change nothing."""
    missing = -v.shape[1] % chunk
    if missing:
        v = torch.cat([v, v.new_zeros(v.shape[0], missing, *v.shape[2:])], dim=1)
    return v.to(dtype).unflatten(1, (-1, chunk))


def _join(v_BKQ: Tensor, length: int) -> Tensor:
    return v_BKQ.flatten(1, 2)[:, :length]


def _decays(logs: Tensor) -> Tensor:
    """exp of the sums of `logs` over (j, i]: (..., n) -> (..., n, n), lower triangular."""
    # In float64, or a gentle decay after a brutal one would drown in the running sum's rounding.
    sums = logs.cumsum(-1, dtype=torch.float64)
    between = (sums[..., :, None] - sums[..., None, :]).to(logs.dtype)
    upper = torch.ones(between.shape[-2:], dtype=torch.bool, device=logs.device).triu(1)
    return between.masked_fill_(upper, -torch.inf).exp_()


def _prepare(inputs: _Inputs, chunk: int, entry_BHNP: Tensor) -> _Group:
    dtype = entry_BHNP.dtype
    x_BKHQP = _cut(inputs.x, chunk, dtype).transpose(2, 3).contiguous()
    dt_BKHQ = _cut(inputs.dt, chunk, dtype).transpose(2, 3).contiguous()
    B_BKQN, C_BKQN = _cut(inputs.B, chunk, dtype), _cut(inputs.C, chunk, dtype)
    u_BKHQP = x_BKHQP * dt_BKHQ[..., None]
    logs_BKHQ = dt_BKHQ * inputs.A.to(dtype)[:, None]
    L_BKHQQ = _decays(logs_BKHQ)
    M_BKHQQ = L_BKHQQ * (C_BKQN @ B_BKQN.mT)[:, :, None]
    from_entry_BKHQ = logs_BKHQ.cumsum(-1).exp_()
    to_end_BKHQ = L_BKHQQ[..., -1, :]
    C_in_BKHQN = C_BKQN[:, :, None] * from_entry_BKHQ[..., None]
    B_out_BKHQN = B_BKQN[:, :, None] * to_end_BKHQ[..., None]
    total_BHK = logs_BKHQ.sum(-1).transpose(1, 2)
    across_BHEE = _decays(F.pad(total_BHK, (1, 0)))
    carry_BHE, passing_BHEK = across_BHEE[..., 0], across_BHEE[..., 1:]
    states_BEHNP = torch.einsum("bhek,bkhnp->behnp", passing_BHEK, B_out_BKHQN.mT @ u_BKHQP)
    states_BEHNP += torch.einsum("bhe,bhnp->behnp", carry_BHE, entry_BHNP)
    return _Group(
        x_BKHQP=x_BKHQP,
        u_BKHQP=u_BKHQP,
        dt_BKHQ=dt_BKHQ,
        B_BKQN=B_BKQN,
        C_BKQN=C_BKQN,
        L_BKHQQ=L_BKHQQ,
        M_BKHQQ=M_BKHQQ,
        from_entry_BKHQ=from_entry_BKHQ,
        to_end_BKHQ=to_end_BKHQ,
        C_in_BKHQN=C_in_BKHQN,
        B_out_BKHQN=B_out_BKHQN,
        total_BKH=from_entry_BKHQ[..., -1],
        carry_BHE=carry_BHE,
        passing_BHEK=passing_BHEK,
        states_BEHNP=states_BEHNP,
    )


def _forward_group(inputs: _Inputs, chunk: int, entry_BHNP: Tensor) -> tuple[Tensor, Tensor]:
    """The group's output and the state after it."""
    g = _prepare(inputs, chunk, entry_BHNP)
    y_BKHQP = g.M_BKHQQ @ g.u_BKHQP
    y_BKHQP += g.C_in_BKHQN @ g.states_BEHNP[:, :-1]
    y_BKHQP += g.x_BKHQP * inputs.D.to(y_BKHQP.dtype)[:, None, None]
    return _join(y_BKHQP.transpose(2, 3), inputs.x.shape[1]), g.states_BEHNP[:, -1]


def _backward_group(
    inputs: _Inputs, chunk: int, entry_BHNP: Tensor, dy: Tensor, dexit_BHNP: Tensor
) -> tuple[_Inputs, Tensor]:
    """Gradients of the inputs and the entry state, given those of y and the exit state."""
    g = _prepare(inputs, chunk, entry_BHNP)
    dtype = entry_BHNP.dtype
    dy_BKHQP = _cut(dy, chunk, dtype).transpose(2, 3).contiguous()

    # States, last to first: each gets what its own chunk reads and what later states inherit.
    dread_BEHNP = torch.cat([g.C_in_BKHQN.mT @ dy_BKHQP, dexit_BHNP[:, None]], dim=1)
    dend_BKHNP = torch.einsum("bhek,behnp->bkhnp", g.passing_BHEK, dread_BEHNP)
    dentry_BHNP = torch.einsum("bhe,behnp->bhnp", g.carry_BHE, dread_BEHNP)

    dM_BKHQQ = dy_BKHQP @ g.u_BKHQP.mT
    dC_in_BKHQN = dy_BKHQP @ g.states_BEHNP[:, :-1].mT
    dB_out_BKHQN = g.u_BKHQP @ dend_BKHNP.mT
    du_BKHQP = g.M_BKHQQ.mT @ dy_BKHQP
    du_BKHQP += g.B_out_BKHQN @ dend_BKHNP
    dCB_BKQQ = (dM_BKHQQ * g.L_BKHQQ).sum(2)
    dC_BKQN = dCB_BKQQ @ g.B_BKQN
    dC_BKQN += (dC_in_BKHQN * g.from_entry_BKHQ[..., None]).sum(2)
    dB_BKQN = dCB_BKQQ.mT @ g.C_BKQN
    dB_BKQN += (dB_out_BKHQN * g.to_end_BKHQ[..., None]).sum(2)

    dlogs_BKHQ = _decay_gradient(g, dM_BKHQQ, dC_in_BKHQN, dB_out_BKHQN, dend_BKHNP)
    xdu_BKHQ = (g.x_BKHQP * du_BKHQP).sum(-1)
    ddt_BKHQ = xdu_BKHQ + inputs.A.to(dtype)[:, None] * dlogs_BKHQ
    dx_BKHQP = du_BKHQP * g.dt_BKHQ[..., None]
    dx_BKHQP += dy_BKHQP * inputs.D.to(dtype)[:, None, None]
    length = dy.shape[1]
    gradient = _Inputs(
        x=_join(dx_BKHQP.transpose(2, 3), length),
        dt=_join(ddt_BKHQ.transpose(2, 3), length),
        A=(g.dt_BKHQ * dlogs_BKHQ).sum((0, 1, 3)),
        B=_join(dB_BKQN, length),
        C=_join(dC_BKQN, length),
        D=(g.x_BKHQP * dy_BKHQP).sum((0, 1, 3, 4)),
    )
    return gradient, dentry_BHNP


def _decay_gradient(
    g: _Group, dM_BKHQQ: Tensor, dC_in_BKHQN: Tensor, dB_out_BKHQN: Tensor, dend_BKHNP: Tensor
) -> Tensor:
    """Gradient of the log decays dt A: for step k, the sum over all paths that cross it.

    A path runs from where a value enters (step j < k, or the chunk's entry) to where it is read
    (step i >= k, or the chunk's end).
    """
    steps = g.M_BKHQQ.shape[-1]
    ones = torch.ones(steps, steps, dtype=dM_BKHQQ.dtype, device=dM_BKHQQ.device)
    paths_BKHQQ = dM_BKHQQ * g.M_BKHQQ
    step_to_step = (paths_BKHQQ @ ones.triu(1)).mul_(ones.tril()).sum(-2)
    entry_to_step = (dC_in_BKHQN * g.C_in_BKHQN).sum(-1)
    entry_to_step = entry_to_step.flip(-1).cumsum(-1).flip(-1)
    step_to_end = F.pad((dB_out_BKHQN * g.B_out_BKHQN).sum(-1), (1, -1))
    entry_to_end = (dend_BKHNP * g.states_BEHNP[:, :-1]).sum((-1, -2)) * g.total_BKH
    return step_to_step + entry_to_step + step_to_end.cumsum(-1) + entry_to_end[..., None]
