"""NeuroMamba: next-patch prediction over the brain patches of a 4D scan.

Source: the NeuroMamba paper (OpenReview kftg4lmQi8, NeurIPS 2025 workshop). As published: raw
patches through a linear embedding, plus a projected Fourier code of the continuous centre
(x, y, z, t) of each patch; background patches are not in the sequence; raster order with time
fastest; blocks of RMSNorm -> Mamba-2 -> residual, a final RMSNorm, and a linear head that predicts
the next raw patch by mean squared error.

Ours, where the paper is silent or we differ:

- A run's patches are its own (the published code keeps the union over the batch), so that no
  output depends on batch mates. The windows of a batch are packed into one sequence, and the state
  starts anew with each.
- Background voxels inside a kept patch are 0 and count in the loss like any other value.
- The first time patch of a spatial patch is predicted from the patches before it without being
  told where it lies, as the published order implies.
- `embed` averages the final normalised hidden states over the run's patches and time, with weights
  that fine-tuning learns (attention pooling, `POOL_HEADS` groups of channels). They start out
  equal, so that a model which is only pretrained gives the plain mean. A plain mean cannot tell
  where in the brain a state occurred, nor that its size varies; learnt weights can.
- Output projections of the blocks start smaller by sqrt(depth), as in the Mamba reference model.
- `order: space-fastest`, `target: patch` (each target patch minus its own mean, divided by its own
  SD, as in the masked autoencoder of arXiv 2111.06377), and the objectives `mae` and `huber`.
- `parametrization: mup` is meant to keep the best learning rate where it is when the width changes
  (maximal update parametrization for Adam, arXiv 2203.03466, table 8). Matrices that sum over the
  width learn at ``base_width / width`` of the rate, and the head starts smaller by the square root
  of that; at `base_width` nothing differs from `standard`.

Dimensions in names: B windows, N patches of all windows, T time patches, V values of a patch,
L = N * T steps of the sequence, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuromamba.config.schema import Compute
from neuromamba.config.schema import NeuroMamba as Settings
from neuromamba.models.packing import Packing, mean_of_windows
from neuromamba.models.position import fourier_features
from neuromamba.models.rollout import roll_out
from neuromamba.models.skill import skills
from neuromamba.models.ssm import EPSILON, Cache, Mamba2

Batch = dict[str, Tensor]

POOL_HEADS = 8


class Block(nn.Module):
    """RMSNorm -> Mamba-2 -> residual."""

    def __init__(self, settings: Settings, compute: Compute) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(settings.width, EPSILON)
        self.mixer = Mamba2(
            settings.width,
            settings.state,
            settings.head_dim,
            settings.expand,
            settings.conv,
            settings.chunk,
            compute.kernels,
        )

    def forward(self, h_BLC: Tensor, seq_idx: Tensor | None) -> Tensor:
        return h_BLC + self.mixer(self.norm(h_BLC), seq_idx)

    def step(self, h_BC: Tensor, cache: Cache) -> Tensor:
        """`forward` for one more step of each sequence."""
        return h_BC + self.mixer.step(self.norm(h_BC), cache)


class NeuroMamba(nn.Module):
    """A causal Mamba-2 over the brain patches of windows of fMRI volumes.

    A batch is a dict of

    - ``tokens`` (N, T, V) float32: normalised patch values, one window after the other, T >= 2 for
      `loss`;
    - ``patches`` (B,) int64: how many of the N rows belong to each window;
    - ``centers`` (N, 3) float32: patch centres in [0, 1];
    - ``mean`` (N, V) float32: each voxel's mean over the run, in the units of ``tokens`` (only
      `loss` reads it).

    Parameters
    ----------
    settings : neuromamba.config.schema.NeuroMamba
    patch_values : int
        Values of one patch, V.
    compute : neuromamba.config.schema.Compute
        Which kernels run the scan, and whether the blocks are compiled.

    Attributes
    ----------
    width : int
        Width of `embed`.
    """

    needs: tuple[str, ...] = ("tokens",)

    def __init__(self, settings: Settings, patch_values: int, compute: Compute) -> None:
        super().__init__()
        self.width = settings.width
        self.settings = settings
        self.embedding = nn.Linear(patch_values, settings.width)
        self.position = nn.Linear(4 * (1 + 2 * settings.bands), settings.width)
        self.blocks = nn.ModuleList(Block(settings, compute) for _ in range(settings.depth))
        self.norm = nn.RMSNorm(settings.width, EPSILON)
        self.head = nn.Linear(settings.width, patch_values)
        self.pool = nn.Linear(settings.width, POOL_HEADS, bias=False)
        nn.init.zeros_(self.pool.weight)
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.out_proj.weight /= math.sqrt(settings.depth)  # type: ignore[union-attr,operator]
            self.head.weight *= math.sqrt(self._width_ratio)
        if compute.compile:
            for block in self.blocks:
                block.compile(dynamic=True)

    def learning_rate_scales(self) -> dict[str, float]:
        """Multipliers of the learning rate by parameter; 1 for those that are not named."""
        deep = ("in_proj.weight", "out_proj.weight", "head.weight", "pool.weight")
        names = (name for name, _ in self.named_parameters() if name.endswith(deep))
        return dict.fromkeys(names, self._width_ratio)

    def encode(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm: (N, T, width)."""
        packing = self._packing(batch)
        return packing.to_grid(self._states(batch, packing))

    def embed(self, batch: Batch) -> Tensor:
        """Weighted mean of the hidden states over each window's positions: (B, width)."""
        h_NTC = self.encode(batch)
        counts = batch["patches"].tolist()
        pooled = []
        for h, score in zip(h_NTC.split(counts), self.pool(h_NTC).split(counts), strict=True):
            weights_LH = score.flatten(0, 1).softmax(0).to(h.dtype)
            groups_LHC = h.flatten(0, 1).unflatten(-1, (POOL_HEADS, -1))
            pooled.append((weights_LH[..., None] * groups_LHC).sum(0).flatten())
        return torch.stack(pooled)

    def predict_next(self, batch: Batch) -> Tensor:
        """What follows each patch in the sequence, as predicted: (L, V) in sequence order."""
        return self.head(self._states(batch, self._packing(batch)))

    def roll_out(self, batch: Batch, known: int) -> Tensor:
        """Forecast each window from its first `known` time patches; see `rollout.roll_out`."""
        return roll_out(self, batch, known)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Next-patch error, and what two honest predictors get.

        Every position is predicted from those before it, but for the first of a window. Each scalar
        is a mean over the windows of its mean over a window's positions, so that averages over
        batches of equally many windows are those of one large batch.

        These errors and skills are those of the next patch in the sequence, not of a forecast: of
        the patches before it, later times are known as well. See `neuromamba.models.rollout`.

        Returns
        -------
        dict of scalar Tensors
            - ``loss``: the objective over all predicted positions and values; the only one with a
              gradient.
            - ``mse_model``, ``mse_persistence``, ``mse_mean``: mean squared errors over the
              positions that have an earlier time patch at the same place (t >= 1), of the model, of
              a copy of that time patch, and of each voxel's mean over the run. (The run's mean has
              seen the future, which makes it the harder predictor to beat.) In the units of the
              target: with ``target: patch`` every patch, predictions included, has its own mean and
              SD taken out first.
            - ``skill_persistence``, ``skill_mean``: 1 - mse_model / mse_<predictor>; 0 is as good
              as the predictor, 1 is perfect. Over several batches average the three errors and
              call `neuromamba.models.skills` on them: a mean of ratios is not the ratio of means.
        """
        packing = self._packing(batch)
        if packing.n_time < 2:
            raise ValueError(
                f"a window holds {packing.n_time} time patch, but predicting the next one needs at "
                "least 2; raise the model's `volumes`"
            )
        target_NTV = self._target(batch["tokens"])
        prediction_LV = self.head(self._states(batch, packing)[:-1]).to(target_NTV.dtype)
        following_LV = packing.to_sequence(target_NTV)[1:]
        # Nothing predicts the first position of a window; its error is that of the window before.
        error_L = F.pad(self._error(prediction_LV, following_LV).mean(-1), (1, 0))
        loss = mean_of_windows(tuple(part[1:] for part in error_L.split(packing.steps)))
        with torch.no_grad():
            if self.settings.objective != "mse":
                error_L = F.pad((prediction_LV - following_LV).square_().mean(-1), (1, 0))
            next_NTV, last_NTV = target_NTV[:, 1:], target_NTV[:, :-1]
            mean_NV = self._target(batch["mean"])
            errors_NT = {
                "mse_model": packing.to_grid(error_L)[:, 1:],
                "mse_persistence": (next_NTV - last_NTV).square_().mean(-1),
                "mse_mean": (next_NTV - mean_NV[:, None]).square_().mean(-1),
            }
            means = {
                name: mean_of_windows(error.split(packing.patches))
                for name, error in errors_NT.items()
            }
        return {"loss": loss, **means, **skills(means)}

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the forward pass of `loss`, a multiply-add counted as two.

        The matrix products alone, those of the chunked scan among them; a backward pass takes twice
        as many. What is recomputed in it to save memory is not counted.
        """
        s, (n_patches, n_time, values) = self.settings, batch["tokens"].shape
        inner = s.expand * s.width
        mixer = self.blocks[0].mixer
        projections = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel()  # type: ignore[union-attr,operator]
        scan = s.chunk * (s.state + inner) + 2 * s.state * inner
        convolution = s.conv * (inner + 2 * s.state)
        each = 2 * values * s.width + s.depth * (projections + scan + convolution)
        return 2.0 * n_patches * n_time * each

    @property
    def _width_ratio(self) -> float:
        s = self.settings
        return s.base_width / s.width if s.parametrization == "mup" else 1.0

    def _packing(self, batch: Batch) -> Packing:
        counts = batch["patches"].tolist()
        return Packing(counts, batch["tokens"].shape[1], self.settings.order)

    def _states(self, batch: Batch, packing: Packing) -> Tensor:
        """Hidden states after the final norm, in sequence order: (L, width)."""
        tokens_NTV = batch["tokens"]
        position_NTC = self._position(batch["centers"], packing.n_time)
        h_BLC = packing.to_sequence(self.embedding(tokens_NTV) + position_NTC)[None]
        # Under autocast the residual stream stays in the precision of the weights.
        h_BLC = h_BLC.to(self.embedding.weight.dtype)
        seq_idx = packing.seq_idx(h_BLC.device)
        for block in self.blocks:
            if self.settings.checkpoint_blocks and torch.is_grad_enabled():
                h_BLC = checkpoint(block, h_BLC, seq_idx, use_reentrant=False)
            else:
                h_BLC = block(h_BLC, seq_idx)
        return self.norm(h_BLC)[0]

    def _target(self, values: Tensor) -> Tensor:
        """The values to predict: as they are, or in z units of each patch of V values."""
        if self.settings.target == "raw":
            return values
        # A patch that does not vary becomes 0.
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        match self.settings.objective:
            case "mse":
                return (prediction - target).square()
            case "mae":
                return (prediction - target).abs()
            case "huber":
                return F.huber_loss(prediction, target, reduction="none")

    def _position(self, centers_N3: Tensor, n_time: int) -> Tensor:
        """Projected code of (x, y, z, t), computed apart for space and time: (N, T, width)."""
        t = (torch.arange(n_time, device=centers_N3.device, dtype=centers_N3.dtype) + 0.5) / n_time
        bands = self.settings.bands
        space_NF, time_TF = fourier_features(centers_N3, bands), fourier_features(t[:, None], bands)
        space_weight, time_weight = self.position.weight.split(
            [space_NF.shape[-1], time_TF.shape[-1]], dim=1
        )
        space_NC = F.linear(space_NF, space_weight, self.position.bias)
        return space_NC[:, None] + F.linear(time_TF, time_weight)
