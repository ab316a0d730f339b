"""The Mamba-2 layer in plain PyTorch, for any device.

Sources: T. Dao and A. Gu (2024), arXiv 2405.21060, section 7.1 and figure 6 (the block), and the
defaults of the authors' `mamba_ssm.modules.mamba2.Mamba2` for what the paper leaves open: order of
the projections, initialisation, gated normalisation after the gate. Written from these; no code is
copied, and `mamba_ssm` is not needed.

Dimensions in names: B batch, L length, C channels, H heads, P head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuromamba.models.rowwise import causal_conv_silu, gated_rms_norm
from neuromamba.models.ssd import ssd_chunked

EPSILON = 1e-5


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
    """

    def __init__(
        self,
        width: int,
        state: int,
        head_dim: int = 64,
        expand: int = 2,
        conv: int = 4,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        inner = expand * width
        heads = inner // head_dim
        self.head_dim, self.chunk = head_dim, chunk
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

    def forward(self, u_BLC: Tensor) -> Tensor:
        z, xBC, dt = self.in_proj(u_BLC).split(self.sizes, dim=-1)
        xBC = causal_conv_silu(xBC, self.conv_weight, self.conv_bias)
        state = (xBC.shape[-1] - z.shape[-1]) // 2
        x, B, C = xBC.split([z.shape[-1], state, state], dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        A = -torch.exp(self.A_log)
        x_BLHP = x.unflatten(-1, (-1, self.head_dim))
        y = ssd_chunked(x_BLHP, dt, A, B, C, self.D, self.chunk).flatten(2)
        return self.out_proj(gated_rms_norm(y, z, self.norm_weight, EPSILON))
