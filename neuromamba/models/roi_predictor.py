"""From the states of ROIs over time to one vector: region weights, then a model of the sequence.

Dimensions in names: B samples, R ROIs, T time patches, C channels, M maps (weights of the ROIs),
W features of walks, F features of time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuromamba.config import Compute, Lmae
from neuromamba.models.roi_layers import TIME_FEATURES, AttentionBlock, projection
from neuromamba.models.ssm import EPSILON, Mamba2


class StateSpace(nn.Module):
    """RMSNorm -> Mamba-2 -> residual, `predictor_depth` times."""

    def __init__(self, settings: Lmae, compute: Compute) -> None:
        super().__init__()
        s = settings
        count = range(s.predictor_depth)
        self.norms = nn.ModuleList(nn.RMSNorm(s.width, EPSILON) for _ in count)
        self.mixers = nn.ModuleList(
            Mamba2(s.width, s.state, s.head_dim, s.expand, kernels=compute.kernels) for _ in count
        )
        for mixer in self.mixers:
            nn.init.zeros_(mixer.out_proj.weight)  # type: ignore[union-attr,arg-type]

    def forward(self, z_BTC: Tensor, time_BTF: Tensor) -> Tensor:
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            z_BTC = z_BTC + mixer(norm(z_BTC))
        return z_BTC


class Recurrent(nn.Module):
    """RMSNorm -> gated recurrent units (`predictor_depth` layers) -> Linear -> residual."""

    def __init__(self, settings: Lmae) -> None:
        super().__init__()
        width = settings.width
        self.norm = nn.RMSNorm(width, EPSILON)
        self.units = nn.GRU(width, width, settings.predictor_depth, batch_first=True)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z_BTC: Tensor, time_BTF: Tensor) -> Tensor:
        return z_BTC + self.out(self.units(self.norm(z_BTC))[0])


class SelfAttention(nn.Module):
    """The code of time is added, then `predictor_depth` pre-norm Transformer blocks."""

    def __init__(self, settings: Lmae) -> None:
        super().__init__()
        width = settings.width
        self.time = nn.Linear(TIME_FEATURES, width, bias=False)
        self.blocks = nn.ModuleList(
            AttentionBlock(width, width // settings.head_dim, settings.expand)
            for _ in range(settings.predictor_depth)
        )
        for block in self.blocks:
            for last in (block.attention.out, block.mlp[-1]):  # type: ignore[union-attr,index]
                nn.init.zeros_(last.weight)  # type: ignore[union-attr,arg-type]
                nn.init.zeros_(last.bias)  # type: ignore[union-attr,arg-type]

    def forward(self, z_BTC: Tensor, time_BTF: Tensor) -> Tensor:
        z_BTC = z_BTC + self.time(time_BTF)
        for block in self.blocks:
            z_BTC = block(z_BTC)
        return z_BTC


class Predictor(nn.Module):
    """Summary of all ROIs at each time, a sequence model over the times, and their mean.

    The summary of channel c is a sum over the ROIs with weights of its own,
    z_tc = sum_r U_rc h_rtc. A mean over the ROIs would not tell where in the brain a state
    occurred. Beside its mean over time stand the forms u' P^k e of the walk vectors, for all pairs
    of `settings.maps` weights u of the ROIs and of the ROIs' embeddings e: linear in the
    connectivity of k steps, as the correlations are that linear models of connectivity read.

    The weights start out random and sequence models as the identity, so that the embedding of a
    model that is only pretrained is one of random projections, which keep how people differ. That
    takes many of them, on both sides of P, for what tells people apart is spread over all its rows
    and columns: hence wide embeddings, and all pairs, where one form for each feature of the walks
    would be enough to learn from. Means over the ROIs would lose it. Longer walks than
    `settings.read_steps` are left to the experts: on real data linear models gained nothing from
    them (`benchmarks/abide_ladder.py`).

    Parameters
    ----------
    settings : neuromamba.config.Lmae
    n_rois : int
    vectors : int
        Walk features of each ROI that are read, W.
    compute : neuromamba.config.Compute

    Attributes
    ----------
    width : int
        Of the output: ``settings.width + settings.maps * vectors``.
    """

    def __init__(self, settings: Lmae, n_rois: int, vectors: int, compute: Compute) -> None:
        super().__init__()
        self.width = settings.width + settings.maps * vectors
        self.regions = nn.Parameter(projection(n_rois, settings.width))
        self.connections = nn.Parameter(projection(n_rois, settings.maps)) if vectors else None
        self.sequence: nn.Module | None = None
        match settings.predictor:
            case "ssm":
                self.sequence = StateSpace(settings, compute)
            case "gru":
                self.sequence = Recurrent(settings)
            case "attention":
                self.sequence = SelfAttention(settings)

    def forward(
        self, h_BRTC: Tensor, vectors_BRW: Tensor, present_BR: Tensor, time_BTF: Tensor
    ) -> Tensor:
        """The embedding: (B, width) float32."""
        with torch.autocast(h_BRTC.device.type, enabled=False):
            # Sums over more ROIs are not larger.
            share_BR1 = (present_BR / present_BR.sum(1, keepdim=True).clamp(min=1).sqrt())[
                ..., None
            ]
            z_BTC = (h_BRTC * (share_BR1 * self.regions)[:, :, None]).sum(1)
        if self.sequence is not None:
            z_BTC = self.sequence(z_BTC, time_BTF)
        states_BC = z_BTC.float().mean(1)
        if self.connections is None:
            return states_BC
        with torch.autocast(h_BRTC.device.type, enabled=False):
            forms_BMW = (share_BR1 * self.connections).transpose(1, 2) @ vectors_BRW
        return torch.cat([states_BC, forms_BMW.flatten(1)], dim=-1)
