"""The Mamba-2 layer in plain PyTorch, for any device.

Sources: T. Dao and A. Gu (2024), arXiv 2405.21060, section 7.1 and figure 6 (the block), and the
defaults of the authors' `mamba_ssm.modules.mamba2.Mamba2` for what the paper leaves open: order of
the projections, initialisation, gated normalisation after the gate. Written from these; no code is
copied, and `mamba_ssm` is not needed.

Dimensions in names: B batch, L length, C channels, H heads, P head_dim, N state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromamba.models.kernels import Kernels, run_ssd
from neuromamba.models.rowwise import causal_conv_silu, gated_norm_plain, gated_rms_norm

EPSILON = 1e-5


class Cache(NamedTuple):
    """What a layer keeps of a sequence between two steps; `Mamba2.step` changes it in place.

    Attributes
    ----------
    inputs : Tensor, (batch, taps, channels)
        The last inputs of the convolution, the newest last; 0 before the first step.
    state : Tensor, (batch, heads, head_dim, state)
        The state of the scan. Both in float32, or float64 where the weights are.
    """

    inputs: Tensor
    state: Tensor


class Mamba2(nn.Module):
    """One Mamba-2 layer: (batch, length, width) to the same shape, causal in length.

    Parameters
    ----------
    width : int
        Width of the residual stream.
    state : int
        State dimension of a head (d_state).
    head_dim : int
        Channels a head; divides ``expand * width``.
    expand : int
        Inner width over `width`.
    conv : int
        Taps of the short convolution.
    chunk : int
        Steps a chunk of the scan; changes speed and rounding only.
    kernels : str
        What runs the scan; see `neuromamba.models.kernels.run_ssd`.
    """

    def __init__(
        self,
        width: int,
        state: int,
        head_dim: int = 64,
        expand: int = 2,
        conv: int = 4,
        chunk: int = 64,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        inner = expand * width
        heads = inner // head_dim
        self.head_dim, self.chunk, self.kernels = head_dim, chunk, kernels
        self.sizes = [inner, inner + 2 * state, heads]
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner + 2 * state, conv))
        self.conv_bias = nn.Parameter(torch.empty(inner + 2 * state))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the reference: A uniform in [1, 16], dt log-uniform in [0.001, 0.1], D 1.

        `dt_bias` is the inverse of softplus at dt. The convolution gets the default of `nn.Conv1d`.
        """
        bound = 1 / math.sqrt(self.conv_weight.shape[1])
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        with torch.no_grad():
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.A_log.uniform_(1, 16).log_()

    def forward(self, u_BLC: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Mix along the length; `seq_idx` (batch, length) keeps packed sequences apart."""
        z, xBC, dt = self.in_proj(u_BLC).split(self.sizes, dim=-1)
        xBC = causal_conv_silu(xBC, self.conv_weight, self.conv_bias, seq_idx)
        state = (xBC.shape[-1] - z.shape[-1]) // 2
        x, B, C = xBC.split([z.shape[-1], state, state], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        A = -torch.exp(self.A_log)
        x_BLHP = x.unflatten(-1, (-1, self.head_dim))
        y = run_ssd(x_BLHP, dt, A, B, C, self.D, self.chunk, seq_idx, self.kernels).flatten(2)
        return self.out_proj(gated_rms_norm(y, z, self.norm_weight, EPSILON))

    def start(self, batch: int) -> Cache:
        """The cache of `batch` sequences of which no step has been read."""
        channels, taps = self.conv_weight.shape
        heads, state = self.sizes[2], (channels - self.sizes[0]) // 2
        dtype = torch.promote_types(self.conv_weight.dtype, torch.float32)
        new = self.conv_weight.new_zeros
        return Cache(
            new(batch, taps, channels, dtype=dtype),
            new(batch, heads, self.head_dim, state, dtype=dtype),
        )

    def step(self, u_BC: Tensor, cache: Cache) -> Tensor:
        """Read one step of each sequence, and give what `forward` gives there: (batch, width).

        The recurrence itself (arXiv 2405.21060, equations 1 and 2): its cost and memory do not
        depend on how many steps were read before. For prediction only, without gradients.
        """
        z, xBC, dt = self.in_proj(u_BC).split(self.sizes, dim=-1)
        cache.inputs.copy_(torch.cat([cache.inputs[:, 1:], xBC[:, None]], dim=1))
        xBC = F.silu((cache.inputs * self.conv_weight.T).sum(1) + self.conv_bias)
        x, B_BN, C_BN = xBC.split([z.shape[-1], *[cache.state.shape[-1]] * 2], dim=-1)
        x_BHP = x.unflatten(-1, (-1, self.head_dim))
        dt_BH = F.softplus(dt.to(x.dtype) + self.dt_bias)
        decay_BH = torch.exp(-torch.exp(self.A_log) * dt_BH)
        cache.state.mul_(decay_BH[..., None, None])
        cache.state.add_((dt_BH[..., None] * x_BHP)[..., None] * B_BN[:, None, None])
        y_BHP = (cache.state @ C_BN[:, None, :, None])[..., 0] + self.D[:, None] * x_BHP
        y_BC = gated_norm_plain(y_BHP.flatten(1), z, self.norm_weight, EPSILON)
        return self.out_proj(y_BC.to(z.dtype))
