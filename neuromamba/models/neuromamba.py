"""NeuroMamba: next-patch prediction over the brain patches of a 4D scan.

Source: the NeuroMamba paper (OpenReview kftg4lmQi8, NeurIPS 2025 workshop). As published: raw
patches through a linear embedding, plus a projected Fourier code of the continuous centre
(x, y, z, t) of each patch; background patches are not in the sequence; raster order with time
fastest; blocks of RMSNorm -> Mamba-2 -> residual, a final RMSNorm, and a linear head that predicts
the next raw patch by mean squared error.

Ours, where the paper is silent or we differ:

- A run's patches are its own (the published code keeps the union over the batch), so that no
  output depends on batch mates.
- Background voxels inside a kept patch are 0 and count in the loss like any other value.
- The first time patch of a spatial patch is predicted from the patches before it without being
  told where it lies, as the published order implies.
- `embed` averages the final normalised hidden states over the run's patches and time, with weights
  that fine-tuning learns (attention pooling, `POOL_HEADS` groups of channels). They start out
  equal, so that a model which is only pretrained gives the plain mean. A plain mean cannot tell
  where in the brain a state occurred, nor that its size varies; learnt weights can.
- Output projections of the blocks start smaller by sqrt(depth), as in the Mamba reference model.

Dimensions in names: B batch, P patches (space), T time patches, V values of a patch, L = P * T
positions in the sequence (index p * T + t), C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuromamba.config.schema import NeuroMamba as Settings
from neuromamba.models.position import fourier_features
from neuromamba.models.skill import masked_mean, skills
from neuromamba.models.ssm import EPSILON, Mamba2

Batch = dict[str, Tensor]

POOL_HEADS = 8


class Block(nn.Module):
    """RMSNorm -> Mamba-2 -> residual."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(settings.width, EPSILON)
        self.mixer = Mamba2(
            settings.width,
            settings.state,
            settings.head_dim,
            settings.expand,
            settings.conv,
            settings.chunk,
        )

    def forward(self, h_BLC: Tensor) -> Tensor:
        return h_BLC + self.mixer(self.norm(h_BLC))


class NeuroMamba(nn.Module):
    """A causal Mamba-2 over the brain patches of a window of fMRI volumes.

    A batch is a dict of

    - ``tokens`` (B, P, T, V) float32: normalised patch values, T >= 2 for `loss`;
    - ``patch_mask`` (B, P) bool: true for the run's patches, which come before the padding;
    - ``centers`` (B, P, 3) float32: patch centres in [0, 1];
    - ``mean`` (B, P, V) float32: each voxel's mean over the run, in the units of ``tokens``
      (only `loss` reads it).

    Parameters
    ----------
    settings : neuromamba.config.schema.NeuroMamba
    patch_values : int
        Values of one patch, V.

    Attributes
    ----------
    width : int
        Width of `embed`.
    """

    needs: tuple[str, ...] = ("tokens",)

    def __init__(self, settings: Settings, patch_values: int) -> None:
        super().__init__()
        self.width = settings.width
        self.bands = settings.bands
        self.checkpoint_blocks = settings.checkpoint_blocks
        self.embedding = nn.Linear(patch_values, settings.width)
        self.position = nn.Linear(4 * (1 + 2 * settings.bands), settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.depth))
        self.norm = nn.RMSNorm(settings.width, EPSILON)
        self.head = nn.Linear(settings.width, patch_values)
        self.pool = nn.Linear(settings.width, POOL_HEADS, bias=False)
        nn.init.zeros_(self.pool.weight)
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.out_proj.weight /= math.sqrt(settings.depth)  # type: ignore[union-attr,operator]

    def encode(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm: (B, L, width); those of padding mean nothing."""
        tokens_BPTV = batch["tokens"]
        position_BPTC = self._position(batch["centers"], tokens_BPTV.shape[2])
        h_BLC = (self.embedding(tokens_BPTV) + position_BPTC).flatten(1, 2)
        # Under autocast the residual stream stays in the precision of the weights.
        h_BLC = h_BLC.to(self.embedding.weight.dtype)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                h_BLC = checkpoint(block, h_BLC, use_reentrant=False)
            else:
                h_BLC = block(h_BLC)
        return self.norm(h_BLC)

    def embed(self, batch: Batch) -> Tensor:
        """Weighted mean of the hidden states over a run's positions: (B, width)."""
        mask_BP11 = batch["patch_mask"][:, :, None, None]
        h_BLC = self.encode(batch)
        score_BPTH = self.pool(h_BLC).unflatten(1, (mask_BP11.shape[1], -1))
        score_BLH = score_BPTH.masked_fill(~mask_BP11, -torch.inf).flatten(1, 2)
        groups_BLHC = h_BLC.unflatten(-1, (POOL_HEADS, -1))
        weights_BLH = score_BLH.softmax(1).to(h_BLC.dtype)
        return (weights_BLH[..., None] * groups_BLHC).sum(1).flatten(1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Next-patch mean squared error, and what two honest predictors get.

        Every position is predicted from those before it, but for the first of a run.

        Returns
        -------
        dict of scalar Tensors
            - ``loss``: mean squared error over all predicted positions and values; the only one
              with a gradient.
            - ``mse_model``, ``mse_persistence``, ``mse_mean``: mean squared errors over the
              positions that have an earlier time patch at the same place (t >= 1), of the model, of
              a copy of that time patch, and of each voxel's mean over the run. (The run's mean has
              seen the future, which makes it the harder predictor to beat.)
            - ``skill_persistence``, ``skill_mean``: 1 - mse_model / mse_<predictor>; 0 is as good
              as the predictor, 1 is perfect. Over several batches average the three errors and
              call `neuromamba.models.skills` on them: a mean of ratios is not the ratio of means.
        """
        tokens_BPTV, patch_mask_BP = batch["tokens"], batch["patch_mask"]
        n_time = tokens_BPTV.shape[2]
        if n_time < 2:
            raise ValueError(
                f"a window holds {n_time} time patch, but predicting the next one needs at least "
                "2; raise the model's `volumes`"
            )
        prediction_BLV = self.head(self.encode(batch)[:, :-1])
        error_BLV = prediction_BLV.to(tokens_BPTV.dtype) - tokens_BPTV.flatten(1, 2)[:, 1:]
        error_BL = error_BLV.square().mean(-1)
        target_BL = patch_mask_BP.repeat_interleave(n_time, dim=1)[:, 1:]
        loss = masked_mean(error_BL, target_BL)
        with torch.no_grad():
            # One position has no prediction; it is the first time patch of the first patch.
            error_BPT = F.pad(error_BL, (1, 0)).unflatten(1, (-1, n_time))
            next_BPTV, last_BPTV = tokens_BPTV[:, :, 1:], tokens_BPTV[:, :, :-1]
            mask_BPT = patch_mask_BP[:, :, None].expand(-1, -1, n_time - 1)
            errors = {
                "mse_model": error_BPT[:, :, 1:],
                "mse_persistence": (next_BPTV - last_BPTV).square_().mean(-1),
                "mse_mean": (next_BPTV - batch["mean"][:, :, None]).square_().mean(-1),
            }
            means = {name: masked_mean(error, mask_BPT) for name, error in errors.items()}
        return {"loss": loss, **means, **skills(means)}

    def _position(self, centers_BP3: Tensor, n_time: int) -> Tensor:
        """Projected code of (x, y, z, t), computed apart for space and time: (B, P, T, width)."""
        t = (
            torch.arange(n_time, device=centers_BP3.device, dtype=centers_BP3.dtype) + 0.5
        ) / n_time
        space_BPF = fourier_features(centers_BP3, self.bands)
        time_TF = fourier_features(t[:, None], self.bands)
        space_weight, time_weight = self.position.weight.split(
            [space_BPF.shape[-1], time_TF.shape[-1]], dim=1
        )
        space_BPC = F.linear(space_BPF, space_weight, self.position.bias)
        return space_BPC[:, :, None] + F.linear(time_TF, time_weight)
