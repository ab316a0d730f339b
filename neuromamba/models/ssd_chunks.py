"""The inside of the chunked scan: forward and gradient of one group of chunks.

See `neuromamba.models.ssd` for the equations, and for the reasons behind this form.

Dimensions in names: B batch, L length, H heads, P head_dim, N state, K chunks of a group, Q steps
of a chunk, E = K + 1 states between and around the chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESET = -1000.0
"""Log decay where a new sequence starts: exp(RESET) is exactly 0 in float64, and 64 of them in a
float64 sum still leave twelve digits to the decays beside them."""


class Inputs(NamedTuple):
    """The arguments of the scan, or their part for one group of chunks."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    starts: Tensor | None  # (batch, length) bool: the first step of a sequence; has no gradient

    def chunks(self, rows: slice, chunk: int) -> Inputs:
        """These rows, (batch, length, ...), as (batch, chunks, chunk, ...)."""
        x, dt, A, B, C, D, starts = self
        if starts is not None:
            starts = cut(starts[:, rows], chunk)
        x, dt, B, C = (cut(v[:, rows], chunk) for v in (x, dt, B, C))
        return Inputs(x, dt, A, B, C, D, starts)


def cut(v: Tensor, chunk: int) -> Tensor:
    """(B, L, ...) -> (B, K, Q, ...), padded with zeros: steps of dt = 0 change nothing."""
    missing = -v.shape[1] % chunk
    if missing:
        v = torch.cat([v, v.new_zeros(v.shape[0], missing, *v.shape[2:])], dim=1)
    return v.unflatten(1, (-1, chunk))


def join(v_BKQ: Tensor, length: int) -> Tensor:
    """(B, K, Q, ...) -> (B, L, ...), the inverse of `cut`."""
    return v_BKQ.flatten(1, 2)[:, :length]


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


def product_dtype(x: Tensor) -> torch.dtype:
    """What the factors of matrix products are rounded to: bfloat16 where the inputs are.

    As in the reference's kernels; a product is added up in float32 either way. Everything else,
    decays, states and their gradients among it, is at least float32.
    """
    return x.dtype if x.dtype == torch.bfloat16 else torch.promote_types(x.dtype, torch.float32)


def _decays(logs: Tensor) -> Tensor:
    """exp of the sums of `logs` over (j, i]: (..., n) -> (..., n, n), lower triangular."""
    # In float64, or a gentle decay after a brutal one would drown in the running sum's rounding.
    sums = logs.cumsum(-1, dtype=torch.float64)
    between = (sums[..., :, None] - sums[..., None, :]).to(logs.dtype)
    upper = torch.ones(between.shape[-2:], dtype=torch.bool, device=logs.device).triu(1)
    return between.masked_fill_(upper, -torch.inf).exp_()


def _prepare(inputs: Inputs, entry_BHNP: Tensor) -> _Group:
    dtype, product = entry_BHNP.dtype, product_dtype(inputs.x)
    x_BKHQP = inputs.x.to(dtype).transpose(2, 3).contiguous()
    dt_BKHQ = inputs.dt.to(dtype).transpose(2, 3).contiguous()
    B_BKQN, C_BKQN = inputs.B.to(product), inputs.C.to(product)
    u_BKHQP = (x_BKHQP * dt_BKHQ[..., None]).to(product)
    logs_BKHQ = dt_BKHQ * inputs.A.to(dtype)[:, None]
    if inputs.starts is not None:
        logs_BKHQ = logs_BKHQ.masked_fill(inputs.starts[:, :, None], RESET)
    L_BKHQQ = _decays(logs_BKHQ)
    M_BKHQQ = (L_BKHQQ * (C_BKQN @ B_BKQN.mT)[:, :, None]).to(product)
    from_entry_BKHQ = logs_BKHQ.cumsum(-1).exp_()
    to_end_BKHQ = L_BKHQQ[..., -1, :]
    C_in_BKHQN = (C_BKQN[:, :, None] * from_entry_BKHQ[..., None]).to(product)
    B_out_BKHQN = (B_BKQN[:, :, None] * to_end_BKHQ[..., None]).to(product)
    total_BHK = logs_BKHQ.sum(-1).transpose(1, 2)
    across_BHEE = _decays(F.pad(total_BHK, (1, 0)))
    carry_BHE, passing_BHEK = across_BHEE[..., 0], across_BHEE[..., 1:]
    added_BKHNP = (B_out_BKHQN.mT @ u_BKHQP).to(dtype)
    states_BEHNP = torch.einsum("bhek,bkhnp->behnp", passing_BHEK, added_BKHNP)
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


def forward_group(inputs: Inputs, entry_BHNP: Tensor) -> tuple[Tensor, Tensor]:
    """The group's output, in chunks as `inputs` is, and the state after it."""
    g = _prepare(inputs, entry_BHNP)
    y_BKHQP = (g.M_BKHQQ @ g.u_BKHQP).to(entry_BHNP.dtype)
    y_BKHQP += g.C_in_BKHQN @ g.states_BEHNP[:, :-1].to(g.u_BKHQP.dtype)
    y_BKHQP += g.x_BKHQP * inputs.D.to(y_BKHQP.dtype)[:, None, None]
    return y_BKHQP.transpose(2, 3), g.states_BEHNP[:, -1]


def backward_group(
    inputs: Inputs, entry_BHNP: Tensor, dy: Tensor, dexit_BHNP: Tensor
) -> tuple[Inputs, Tensor]:
    """Gradients of the inputs and the entry state, given those of y and the exit state.

    `inputs`, `dy` and the gradients are in chunks.
    """
    g = _prepare(inputs, entry_BHNP)
    dtype = entry_BHNP.dtype
    product = product_dtype(inputs.x)
    dy_BKHQP = dy.to(product).transpose(2, 3).contiguous()

    # States, last to first: each gets what its own chunk reads and what later states inherit.
    dread_BKHNP = (g.C_in_BKHQN.mT @ dy_BKHQP).to(dtype)
    dread_BEHNP = torch.cat([dread_BKHNP, dexit_BHNP[:, None]], dim=1)
    dend_BKHNP = torch.einsum("bhek,behnp->bkhnp", g.passing_BHEK, dread_BEHNP)
    dentry_BHNP = torch.einsum("bhe,behnp->bhnp", g.carry_BHE, dread_BEHNP)

    dM_BKHQQ = dy_BKHQP @ g.u_BKHQP.mT
    dC_in_BKHQN = dy_BKHQP @ g.states_BEHNP[:, :-1].mT.to(product)
    dB_out_BKHQN = g.u_BKHQP @ dend_BKHNP.mT.to(product)
    du_BKHQP = (g.M_BKHQQ.mT @ dy_BKHQP).to(dtype)
    du_BKHQP += g.B_out_BKHQN @ dend_BKHNP.to(product)
    dCB_BKQQ = (dM_BKHQQ * g.L_BKHQQ).sum(2).to(product)
    dC_BKQN = (dCB_BKQQ @ g.B_BKQN).to(dtype)
    dC_BKQN += (dC_in_BKHQN * g.from_entry_BKHQ[..., None]).sum(2)
    dB_BKQN = (dCB_BKQQ.mT @ g.C_BKQN).to(dtype)
    dB_BKQN += (dB_out_BKHQN * g.to_end_BKHQ[..., None]).sum(2)

    dlogs_BKHQ = _decay_gradient(g, dM_BKHQQ, dC_in_BKHQN, dB_out_BKHQN, dend_BKHNP)
    xdu_BKHQ = (g.x_BKHQP * du_BKHQP).sum(-1)
    ddt_BKHQ = xdu_BKHQ + inputs.A.to(dtype)[:, None] * dlogs_BKHQ
    dx_BKHQP = du_BKHQP * g.dt_BKHQ[..., None]
    dx_BKHQP += dy_BKHQP * inputs.D.to(dtype)[:, None, None]
    gradient = Inputs(
        x=dx_BKHQP.transpose(2, 3),
        dt=ddt_BKHQ.transpose(2, 3),
        A=(g.dt_BKHQ * dlogs_BKHQ).sum((0, 1, 3)),
        B=dB_BKQN,
        C=dC_BKQN,
        D=(g.x_BKHQP * dy_BKHQP).sum((0, 1, 3, 4)),
        starts=None,
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
    step_to_step = (paths_BKHQQ @ ones.triu(1)).mul_(ones.tril()).sum(-2, dtype=g.L_BKHQQ.dtype)
    entry_to_step = (dC_in_BKHQN * g.C_in_BKHQN).sum(-1, dtype=g.L_BKHQQ.dtype)
    entry_to_step = entry_to_step.flip(-1).cumsum(-1).flip(-1)
    step_to_end = (dB_out_BKHQN * g.B_out_BKHQN).sum(-1, dtype=g.L_BKHQQ.dtype)
    step_to_end = F.pad(step_to_end, (1, -1))
    entry_to_end = (dend_BKHNP * g.states_BEHNP[:, :-1]).sum((-1, -2)) * g.total_BKH
    return step_to_step + entry_to_step + step_to_end.cumsum(-1) + entry_to_end[..., None]
