"""TABLeT: a Transformer over the codes that a 2D image autoencoder gives of whole volumes.

Follows "Can Natural Image Autoencoders Compactly Tokenize fMRI Volumes for Long-Range Dynamics
Modeling?" (CVPR 2026, arXiv 2604.03619), and its released code where that tells more. Each volume
comes as 27 tokens, one for each place of a 3 x 3 x 3 grid:

    LayerNorm(W) -> Linear -> [CLS, tokens] -> LayerNorm -> 12 blocks -> CLS

with T = 256 volumes, 14 heads that share 2 sets of keys and values, and ReLU. Pretraining hides
half of the tokens, the same at all times (a tube), behind one learnable vector, and asks for them
by a linear layer; the loss is L1. At the published sizes this is 129.5 million parameters, as many
as the release has, of which the blocks have 126.8; pretraining's linear layer has 2.8 more.

- **Position.** The paper says rotary; its released code hands the switch for that to another
  argument, so that what was run there had none. `position: rope` (the default) rotates by the place
  in the sequence, time slowest, x fastest, CLS first; `none` is the release as it runs. Without
  positions nothing tells hidden tokens of a window apart, so pretraining then learns one guess.
  `grid` is ours, for small models: a learnt vector for each place of the grid, and a rotation by
  volume. A rotation by the sequence alone tells a hidden token its place no other way than by its
  distances from others; a model of 16 channels did not learn that in 80 steps.
- **What is asked for** is not told. Ours by default is each token minus its mean over its SD
  (`target: normed`): the values of an autoencoder differ by orders of magnitude between tokens in
  and outside of the brain. Of `raw` and `changes` see `code_masks.targets_of`.
- **The loss is easy to lower and says little**: a token hardly changes in time, so who knows its
  mean knows nearly everything. The log therefore has `skill_static` beside it, over a guess that
  knows each hidden token's own mean in the window; above 0, change in time is told.
- **What is read.** `input: codes` (the default) is as published. Only about 6 % of the variance of
  a code is change in time, and a small model that gets both in one finds little of it. `input:
  split` is ours: the mean of a token's visible volumes, and its changes about that in units of
  their SD, with a linear layer each, are added up.
- Ours: `Linear` and the mask's vector come before the second LayerNorm; a last LayerNorm after the
  blocks, without which the size of a pre-norm state grows with the depth. Initial values are
  torch's, and there is no dropout, as in the release.
- **Pretraining trains no output of CLS**, of which a loss asks nothing, as published. For models
  whose weights are frozen, `readout: mean` averages the tokens' final states instead.
- Repetition times are not read, as published: a position counts volumes, not seconds.

Dimensions in names: B samples, T volumes, N = 27 tokens of a volume, L = T * N tokens of a window,
M hidden ones, W values of a token, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuromamba.config import Compute
from neuromamba.config import Tablet as Settings
from neuromamba.models.code_masks import (
    draw_hidden,
    hidden_count,
    reference_errors,
    split_changes,
    take,
    targets_of,
)
from neuromamba.models.grouped_attention import GroupedBlock, Rotation, rotation
from neuromamba.models.skill import skills

Batch = dict[str, Tensor]


class Guess(nn.Module):
    """What pretraining alone needs: the vector of hidden tokens, and the layer that tells them."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.randn(width))
        self.values = nn.Linear(width, values)

    def forward(self, h_BMC: Tensor) -> Tensor:
        return self.values(h_BMC)


class Tablet(nn.Module):
    """A Transformer over the codes of volumes, pretrained by masked token modelling.

    A batch is a dict of

    - ``codes`` (B, T, N, W) float32: T = `settings.volumes`, tokens of a volume with x fastest.

    Parameters
    ----------
    settings : neuromamba.config.Tablet
    codes : mapping
        What the codes are: `n_tokens` of a volume, N, and `code_width`, W: 3 axes times slices of a
        group times channels of the autoencoder. All of it is kept, as what it has learnt to read.
    compute : neuromamba.config.Compute
        Whether the blocks are compiled.

    Attributes
    ----------
    width : int
        Width of `embed`.
    """

    needs: tuple[str, ...] = ("codes",)

    def __init__(self, settings: Settings, codes: Mapping[str, Any], compute: Compute) -> None:
        super().__init__()
        s = settings
        self.settings, self.width = s, s.width
        self.codes, self.n_tokens, code_width = dict(codes), codes["n_tokens"], codes["code_width"]
        self.code_norm = nn.LayerNorm(code_width)
        self.projection = nn.Linear(code_width, s.width)
        self.cls = nn.Parameter(torch.randn(s.width))
        if s.input == "split":
            self.changes = nn.Linear(code_width, s.width)
        if s.position == "grid":
            self.places = nn.Parameter(torch.randn(self.n_tokens, s.width))
        self.input_norm = nn.LayerNorm(s.width)
        self.blocks = nn.ModuleList(
            GroupedBlock(s.width, s.heads, s.groups, s.hidden) for _ in range(s.depth)
        )
        self.norm = nn.LayerNorm(s.width)
        self.head = Guess(s.width, code_width)
        if compute.compile:
            for block in self.blocks:
                block.compile(dynamic=True)

    def embed(self, batch: Batch) -> Tensor:
        """The final state of CLS, or the mean of those of the tokens: (B, width) float32."""
        h_BLC = self._encode(self._project(batch["codes"]))
        return (h_BLC[:, 0] if self.settings.readout == "cls" else h_BLC[:, 1:].mean(1)).float()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Error of the hidden tokens' values, and what two honest guesses get.

        Each scalar is a mean over the samples of its mean over a sample's hidden values, in units
        of the target.

        Returns
        -------
        dict of scalar Tensors
            - ``loss``: the mean absolute or squared error; the only one with a gradient.
            - ``mse_model``: the mean squared error; ``mse_visible``, ``mse_static``: of guesses,
              see `code_masks.reference_errors`.
            - ``skill_visible``, ``skill_static``: see `neuromamba.models.skills`.
        """
        s, codes_BTNW = self.settings, batch["codes"]
        samples, volumes, tokens, _ = codes_BTNW.shape
        drawn = draw_hidden(s.mask, samples, volumes, tokens, s.mask_share, self.training)
        places_BM = drawn.to(codes_BTNW.device)
        seen_BL = torch.ones_like(codes_BTNW[..., 0]).flatten(1).scatter(1, places_BM, 0.0)
        e_BLC = self._project(codes_BTNW, seen_BL.view(samples, volumes, tokens))
        hidden_BL = seen_BL == 0
        h_BLC = self._encode(torch.where(hidden_BL[..., None], self.head.mask, e_BLC))
        guess_BMW = self.head(take(h_BLC[:, 1:], places_BM)).float()
        with torch.autocast(codes_BTNW.device.type, enabled=False), torch.no_grad():
            target_BTNW = targets_of(codes_BTNW.float(), s.target)
            errors = reference_errors(target_BTNW, places_BM, s.mask)
            wanted_BMW = take(target_BTNW.flatten(1, 2), places_BM)
        error = F.l1_loss if s.objective == "mae" else F.mse_loss
        loss = error(guess_BMW, wanted_BMW)
        errors["mse_model"] = F.mse_loss(guess_BMW.detach(), wanted_BMW)
        return {"loss": loss, **errors, **skills(errors)}

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the forward pass of `loss`, a multiply-add counted as two.

        The matrix products alone; a backward pass takes twice as many.
        """
        s, (samples, volumes, tokens, values) = self.settings, batch["codes"].shape
        length = volumes * tokens
        hidden = hidden_count(s.mask, volumes, tokens, s.mask_share)
        shared = s.width // s.heads * s.groups
        projections = 2 * s.width * (s.width + shared + s.hidden)
        block = (length + 1) * (projections + 2 * (length + 1) * s.width)
        embedded = length + hidden + (tokens if s.input == "split" else 0)
        return 2.0 * samples * (s.depth * block + embedded * values * s.width)

    def _project(self, codes_BTNW: Tensor, seen_BTN: Tensor | None = None) -> Tensor:
        """Embedded tokens, (B, L, C), of which some may be hidden; those mean nothing then."""
        if self.settings.input == "codes":
            return self.projection(self.code_norm(codes_BTNW.flatten(1, 2)))
        with torch.autocast(codes_BTNW.device.type, enabled=False), torch.no_grad():
            seen_BTN = torch.ones_like(codes_BTNW[..., 0]) if seen_BTN is None else seen_BTN
            mean_B1NW, changes_BTNW = split_changes(codes_BTNW, seen_BTN)
        e_BTNC = self.projection(self.code_norm(mean_B1NW)) + self.changes(changes_BTNW)
        return e_BTNC.flatten(1, 2)

    def _encode(self, e_BLC: Tensor) -> Tensor:
        """States of CLS and the tokens after the final norm: (B, 1 + L, C)."""
        s = self.settings
        if s.position == "grid":
            e_BLC = e_BLC + self.places.repeat(e_BLC.shape[1] // self.n_tokens, 1)
        cls_B1C = self.cls.to(e_BLC.dtype).expand(len(e_BLC), 1, -1)
        h_BLC = self.input_norm(torch.cat([cls_B1C, e_BLC], 1))
        turn = self._turn(h_BLC)
        for block in self.blocks:
            if s.checkpoint_blocks and torch.is_grad_enabled():
                h_BLC = checkpoint(block, h_BLC, turn, use_reentrant=False)
            else:
                h_BLC = block(h_BLC, turn)
        return self.norm(h_BLC)

    def _turn(self, h_BLC: Tensor) -> Rotation | None:
        """The rotation by the place in the sequence, or by the volume; CLS is at 0 in both."""
        s = self.settings
        if s.position == "none":
            return None
        place_L = torch.arange(h_BLC.shape[1], device=h_BLC.device)
        if s.position == "grid":
            place_L = (place_L + self.n_tokens - 1) // self.n_tokens
        return rotation(place_L.float(), s.width // s.heads)
