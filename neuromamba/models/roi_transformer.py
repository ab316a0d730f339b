"""RoiTransformer: a masked autoencoder over patches of ROI series.

Of the class of BrainLM (ICLR 2024, OpenReview RwI7ZEfR27) and Brain-JEPA (arXiv 2409.19407), to
compare other families of ROI series with: a token is a patch of one ROI's series, most tokens are
masked, and a Transformer reads those that are visible (the masked autoencoder, arXiv 2111.06377).
Ours:

- A token is a linear embedding of its values, a learned embedding of its ROI (no coordinates of
  regions are needed) and a code of its time in seconds.
- `mask: patches` masks any tokens; `times` masks all ROIs at some times, so that nothing measured
  at the same time is seen.
- The decoder's masked tokens read the visible ones, but not one another, as in CrossMAE
  (arXiv 2401.14391), which found that it loses nothing by that; it costs much less.
- The error is that of the values, in z units of the run, not of each patch: the size of a
  fluctuation is of interest here.
- Tokens of missing ROIs are in no sequence.
- `embed` averages the final states over the tokens with weights that fine-tuning learns, one set
  for each of `heads` groups of channels, as `NeuroMamba` does. They start out equal.

Dimensions in names: B samples, R ROIs, L volumes, T time patches, V volumes of a patch,
G = R * T places of a grid (time fastest), N tokens of a sequence, C channels, H groups of channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuromamba.config import Compute
from neuromamba.config import RoiTransformer as Settings
from neuromamba.models.roi_layers import TIME_FEATURES, AttentionBlock, time_code
from neuromamba.models.roi_masks import mask_generator, mean_of_samples, reference_errors
from neuromamba.models.skill import skills
from neuromamba.models.ssm import EPSILON

Batch = dict[str, Tensor]


class Chosen(NamedTuple):
    """The tokens of each sample that are read, padded to as many as the largest has.

    Attributes
    ----------
    places : Tensor, (B, N) int64
        Where on the grid of (ROI, time) they are; of padding, anywhere.
    real : Tensor or None, (B, N) bool
        False for padding; `None` where there is none.
    """

    places: Tensor
    real: Tensor | None

    def take(self, grid_BGC: Tensor) -> Tensor:
        """(B, G, C) -> (B, N, C)."""
        return grid_BGC.gather(1, self.places[..., None].expand(-1, -1, grid_BGC.shape[-1]))


def choose(wanted_BG: Tensor) -> Chosen:
    """The places where `wanted_BG` is True, in their order, for each sample."""
    count_B = wanted_BG.sum(1)
    longest = int(count_B.max())
    places = wanted_BG.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    real = torch.arange(longest, device=wanted_BG.device) < count_B[:, None]
    return Chosen(places, None if bool((count_B == longest).all()) else real)


def make_blocks(settings: Settings, depth: int) -> nn.ModuleList:
    """`depth` pre-norm Transformer blocks."""
    s = settings
    return nn.ModuleList(AttentionBlock(s.width, s.heads, s.mlp_ratio) for _ in range(depth))


class Decoder(nn.Module):
    """From the states of visible tokens to the values of hidden ones, told by their positions."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        s = settings
        self.place = nn.Linear(s.width, s.width)
        self.time = nn.Linear(TIME_FEATURES, s.width, bias=False)
        self.blocks = make_blocks(s, s.decoder_depth)
        self.norm = nn.RMSNorm(s.width, EPSILON)
        self.values = nn.Linear(s.width, s.patch)

    def forward(self, query_BNC: Tensor, of_BMC: Tensor, seen_BM: Tensor | None) -> Tensor:
        for block in self.blocks:
            query_BNC = block(query_BNC, seen_BM, of_BMC)
        return self.values(self.norm(query_BNC))


class RoiTransformer(nn.Module):
    """A Transformer over patches of ROI series, pretrained by reconstruction.

    A batch is a dict of

    - ``rois`` (B, L, R) float32: ROI series in z units of the run, L = `settings.volumes`;
    - ``present`` (B, R) bool: ROIs that there are, at least one in each sample; whatever the others
      hold has no influence;
    - ``repetition_time`` (B,) float32: in s.

    Parameters
    ----------
    settings : neuromamba.config.RoiTransformer
    n_rois : int
        Regions of the atlas, R.
    compute : neuromamba.config.Compute
        Whether the blocks are compiled.

    Attributes
    ----------
    width : int
        Width of `embed`.
    """

    needs: tuple[str, ...] = ("rois",)

    def __init__(self, settings: Settings, n_rois: int, compute: Compute) -> None:
        super().__init__()
        s = settings
        self.settings, self.n_rois, self.width = s, n_rois, s.width
        self.places = nn.Parameter(torch.randn(n_rois, s.width) * 0.5)
        self.embedding = nn.Linear(s.patch, s.width)
        self.time = nn.Linear(TIME_FEATURES, s.width, bias=False)
        self.blocks = make_blocks(s, s.depth)
        self.norm = nn.RMSNorm(s.width, EPSILON)
        self.head = Decoder(s)
        self.pool = nn.Linear(s.width, s.heads, bias=False)
        nn.init.zeros_(self.pool.weight)
        if compute.compile:
            for block in [*self.blocks, *self.head.blocks]:
                block.compile(dynamic=True)

    def embed(self, batch: Batch) -> Tensor:
        """Weighted mean of the final states over the tokens of the ROIs there are: (B, width)."""
        present_BRL = self._present(batch)
        chosen = choose(present_BRL[..., :: self.settings.patch].flatten(1))
        h_BNC = self._encode(batch, chosen, present_BRL)
        score_BNH = self.pool(h_BNC).float()
        if chosen.real is not None:
            score_BNH = score_BNH.masked_fill(~chosen.real[..., None], -torch.inf)
        groups_BNHC = h_BNC.float().unflatten(-1, (self.settings.heads, -1))
        return (score_BNH.softmax(1)[..., None] * groups_BNHC).sum(1).flatten(1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Squared error of the masked values, and what two honest guesses get.

        Each scalar is a mean over the samples of its mean over a sample's masked values.

        Returns
        -------
        dict of scalar Tensors
            - ``loss``: the mean squared error; the only one with a gradient.
            - ``mse_model``: the same; ``mse_mean``, ``mse_interpolation``: of each ROI's mean over
              its visible volumes, and of a straight line in time over each gap. In squared z units
              of the run.
            - ``skill_mean``, ``skill_interpolation``: see `neuromamba.models.skills`.
        """
        patch, present_BRL = self.settings.patch, self._present(batch)
        present_BG = present_BRL[..., ::patch].flatten(1)
        hidden_BG = self._masks(batch["present"]).flatten(1) & present_BG
        visible, hidden = choose(present_BG & ~hidden_BG), choose(hidden_BG)
        h_BNC = self._encode(batch, visible, present_BRL)
        place_RC = self.head.place(self.places)
        query_BNC = self._positions(batch, place_RC, self.head.time, hidden)
        predicted_BNV = self.head(query_BNC, h_BNC, visible.real).float()
        series_BRL = batch["rois"].transpose(1, 2)
        target_BNV = hidden.take(series_BRL.unflatten(-1, (-1, patch)).flatten(1, 2))
        real = torch.ones_like(hidden.places, dtype=torch.bool)
        real_BNV = (real if hidden.real is None else hidden.real)[..., None].expand_as(target_BNV)
        loss = mean_of_samples((predicted_BNV - target_BNV).square(), real_BNV)
        hidden_BRL = hidden_BG.view(*batch["present"].shape, -1).repeat_interleave(patch, -1)
        errors = {"mse_model": loss.detach()}
        errors |= reference_errors(series_BRL, present_BRL & ~hidden_BRL, hidden_BRL)
        return {"loss": loss, **errors, **skills(errors)}

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the forward pass of `loss`, a multiply-add counted as two.

        The matrix products alone, as if no ROI were missing; a backward pass takes twice as many.
        """
        s, (samples, volumes, rois) = self.settings, batch["rois"].shape
        tokens = rois * (volumes // s.patch)
        hidden = round(s.mask_share * tokens)
        seen = tokens - hidden
        mlp = 2 * s.mlp_ratio * s.width**2
        encoder = s.depth * seen * (4 * s.width**2 + mlp + 2 * seen * s.width)
        decoder = hidden * (2 * s.width**2 + mlp + 2 * seen * s.width) + 2 * seen * s.width**2
        ends = tokens * s.patch * s.width
        return 2.0 * samples * (encoder + s.decoder_depth * decoder + ends)

    def _present(self, batch: Batch) -> Tensor:
        return batch["present"][..., None].expand(-1, -1, self.settings.volumes)

    def _masks(self, present_BR: Tensor) -> Tensor:
        """What is masked of the ROIs there are: (B, R, T) bool."""
        s, (samples, rois) = self.settings, present_BR.shape
        shape = (rois if s.mask == "patches" else 1, s.volumes // s.patch)
        scores = [
            torch.rand(shape, generator=mask_generator(self.training)) for _ in range(samples)
        ]
        score_BRT = torch.stack(scores).to(present_BR.device).expand(-1, rois, -1)
        if s.mask == "times":
            masked = min(max(1, round(s.mask_share * shape[1])), shape[1] - 1)
            return score_BRT.argsort(-1).argsort(-1) < masked
        # The places of missing ROIs come last, so that the share is that of what is there.
        score_BG = torch.where(present_BR[..., None], score_BRT, 2.0).flatten(1)
        count_B = present_BR.sum(1) * shape[1]
        masked_B = (s.mask_share * count_B).round().clamp(min=1).minimum(count_B - 1)
        rank_BG = score_BG.argsort(-1).argsort(-1)
        return (rank_BG < masked_B[:, None]).view_as(score_BRT)

    def _encode(self, batch: Batch, chosen: Chosen, present_BRL: Tensor) -> Tensor:
        """States of the chosen tokens after the final norm: (B, N, C)."""
        s = self.settings
        series_BRL = torch.where(present_BRL, batch["rois"].transpose(1, 2), 0.0)
        patches_BGV = series_BRL.unflatten(-1, (-1, s.patch)).flatten(1, 2)
        where_BNC = self._positions(batch, self.places, self.time, chosen)
        h_BNC = self.embedding(chosen.take(patches_BGV)).to(where_BNC.dtype) + where_BNC
        for block in self.blocks:
            h_BNC = block(h_BNC, chosen.real)
        return self.norm(h_BNC)

    def _positions(self, batch: Batch, place_RC: Tensor, time: nn.Module, chosen: Chosen) -> Tensor:
        """Where and when the chosen tokens are: (B, N, C) in the precision of the weights."""
        s, n_time = self.settings, self.settings.volumes // self.settings.patch
        code_BTC = time(time_code(batch["repetition_time"], n_time, s.patch))
        roi_BN, step_BN = chosen.places // n_time, chosen.places % n_time
        when_BNC = code_BTC.gather(1, step_BN[..., None].expand(-1, -1, s.width))
        return (place_RC[roi_BN] + when_BNC).to(self.places.dtype)
