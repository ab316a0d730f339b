"""Lmae: local masked autoencoder, random-walk mixture of experts, state-space predictor.

Source: arXiv 2508.16597, of which only the abstract is open: pretraining of ROI series by a masked
autoencoder whose masks are local in time, which blunts the haemodynamic response and noise; a
mixture of experts that clusters features over space and time by random walks, which reach indirect
interactions of regions; a state-space model that predicts from them. All else is ours:

- Masks (`mask_seconds`, `mask_share`, `mask_rois`): contiguous stretches of one ROI's volumes, at
  other times in each ROI, so that what is masked can be inferred from regions that work together
  with it and not from the own past alone. Their length is in seconds: the haemodynamic response,
  which is to be bridged, is as long at every repetition time.
- Input: patches of `patch` volumes of a ROI, masked values as 0 with a flag for each; a learned
  embedding of the ROI; a code of time in seconds.
- Encoder (`depth`): blocks that act within a ROI and on neighbouring times alone. Everything
  between regions is left to the walks, which cost a product of matrices each.
- Graph (`neighbors`, `signed`): Pearson correlations of the window's visible values, the strongest
  of each ROI. Negative ones are dropped: a walk needs probabilities. With `signed` they are a
  second graph. Windows, not runs, because the experts are to follow changes of state. A ROI that
  correlates with none, as one that is masked from end to end, steps by the likeness of the ROIs'
  embeddings.
- Mixture (`walk_steps`, `experts`, `top_k`, `balance`): see `random_walk`. It is part of the path
  in pretraining, where it can infer masked values from other regions. Without experts there is one
  perceptron on the ROI's own state, and no walk at all, for comparison.
- Predictor (`predictor`, `region_width`, `maps`, `read_steps`): see `roi_predictor`. It is no
  part of pretraining, and so is the `pool`.

Dimensions in names: B samples, R ROIs, L volumes, T time patches, V volumes of a patch (L = T * V),
C channels, E experts, F features of time, D width of the ROIs' embeddings, W features of walks,
D for each step of each graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from neuromamba.config import Compute
from neuromamba.config import Lmae as Settings
from neuromamba.models.random_walk import (
    RandomWalkExperts,
    correlation,
    imbalance,
    transitions,
    walk,
)
from neuromamba.models.roi_layers import (
    TIME_FEATURES,
    LocalBlock,
    Perceptron,
    projection,
    time_code,
)
from neuromamba.models.roi_masks import local_masks, mean_of_samples, reference_errors
from neuromamba.models.roi_predictor import Predictor
from neuromamba.models.skill import skills
from neuromamba.models.ssm import EPSILON

Batch = dict[str, Tensor]


class Encoded(NamedTuple):
    """What the model makes of a window.

    Attributes
    ----------
    states : Tensor, (B, R, T, C)
        After the final norm.
    vectors : Tensor, (B, R, W) float32
        Walk vectors; W is 0 without experts.
    time : Tensor, (B, T, F)
        The code of time.
    gates : Tensor or None, (B, R, T, E) float32
        Weights of the experts.
    """

    states: Tensor
    vectors: Tensor
    time: Tensor
    gates: Tensor | None


class Lmae(nn.Module):
    """A masked autoencoder of ROI series whose regions meet by random walks.

    A batch is a dict of

    - ``rois`` (B, L, R) float32: ROI series in z units of the run, L = `settings.volumes`;
    - ``present`` (B, R) bool: ROIs that there are; whatever the others hold has no influence;
    - ``repetition_time`` (B,) float32: in s.

    Parameters
    ----------
    settings : neuromamba.config.Lmae
    n_rois : int
        Regions of the atlas, R.
    compute : neuromamba.config.Compute
        Which kernels run the scan, and whether the blocks are compiled.

    Attributes
    ----------
    width : int
        Width of `embed`: `settings.width`, and `settings.maps * settings.region_width` for each
        step of each graph that is read.
    """

    needs: tuple[str, ...] = ("rois",)

    def __init__(self, settings: Settings, n_rois: int, compute: Compute) -> None:
        super().__init__()
        s = settings
        self.settings, self.n_rois = s, n_rois
        self.graphs = (2 if s.signed else 1) if s.experts else 0
        self.walks = self.graphs * s.walk_steps
        self.places = nn.Parameter(projection(n_rois, s.region_width))
        self.embedding = nn.Linear(2 * s.patch, s.width)
        self.place = nn.Linear(s.region_width, s.width, bias=False)
        self.time = nn.Linear(TIME_FEATURES, s.width, bias=False)
        self.blocks = nn.ModuleList(LocalBlock(s.width) for _ in range(s.depth))
        self.mixture_norm = nn.RMSNorm(s.width, EPSILON)
        self.mixture: RandomWalkExperts | Perceptron = (
            RandomWalkExperts(s.width, s.region_width, self.walks, s.experts, s.top_k)
            if s.experts
            else Perceptron(s.width, s.width)
        )
        self.norm = nn.RMSNorm(s.width, EPSILON)
        self.head = nn.Linear(s.width, s.patch)
        self.pool = Predictor(s, n_rois, self.graphs * s.read_steps * s.region_width, compute)
        self.width = self.pool.width
        if compute.compile:
            for block in self.blocks:
                block.compile(dynamic=True)

    def embed(self, batch: Batch) -> Tensor:
        """What the predictor makes of the whole window, nothing masked: (B, width) float32."""
        encoded = self._encode(batch, self._visible(batch))
        # (B, R, graph, step, D), of which short walks alone are read.
        steps = (self.graphs, self.settings.walk_steps, self.settings.region_width)
        vectors = encoded.vectors.unflatten(-1, steps)[..., : self.settings.read_steps, :]
        return self.pool(encoded.states, vectors.flatten(2), batch["present"], encoded.time)

    @torch.no_grad()
    def experts(self, batch: Batch) -> dict[str, Tensor]:
        """Weights of the experts, for maps of them.

        Returns
        -------
        dict of Tensor
            ``weights`` (B, T, R, E) float32, which sum to 1 over the experts; 0 for a ROI that is
            missing. Empty without a mixture.
        """
        gates_BRTE = self._encode(batch, self._visible(batch)).gates
        if gates_BRTE is None:
            return {}
        weights = gates_BRTE * batch["present"][:, :, None, None]
        return {"weights": weights.transpose(1, 2)}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Squared error of the masked values, and what two honest guesses get.

        Each scalar is a mean over the samples of its mean over a sample's masked values.

        Returns
        -------
        dict of scalar Tensors
            - ``loss``: ``mse_model + settings.balance * imbalance``; the only one with a gradient.
            - ``imbalance``: of the use of the experts, see `random_walk.imbalance`; not without
              experts.
            - ``mse_model``, ``mse_mean``, ``mse_interpolation``: mean squared errors of the model,
              of each ROI's mean over its visible volumes, and of a straight line in time over each
              gap. In squared z units of the run.
            - ``skill_mean``, ``skill_interpolation``: see `neuromamba.models.skills`.
        """
        s, present_BRL = self.settings, self._visible(batch)
        masked_BRL = local_masks(
            present_BRL.shape[1],
            s.volumes,
            batch["repetition_time"],
            s.mask_seconds,
            s.mask_share,
            s.mask_rois,
            self.training,
        )
        visible_BRL, target_BRL = present_BRL & ~masked_BRL, present_BRL & masked_BRL
        encoded = self._encode(batch, visible_BRL)
        series_BRL = batch["rois"].transpose(1, 2)
        predicted_BRL = self.head(encoded.states).flatten(2).float()
        error = mean_of_samples((predicted_BRL - series_BRL).square(), target_BRL)
        errors = {"mse_model": error.detach()}
        errors |= reference_errors(series_BRL, visible_BRL, target_BRL)
        scalars = {"loss": error, **errors, **skills(errors)}
        if encoded.gates is not None:
            uneven = imbalance(encoded.gates, batch["present"])
            scalars |= {"loss": error + s.balance * uneven, "imbalance": uneven.detach()}
        return scalars

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the forward pass of `loss`, a multiply-add counted as two.

        The matrix products alone; a backward pass takes twice as many, but for the correlations.
        """
        s = self.settings
        samples, volumes, rois = batch["rois"].shape
        tokens, places = samples * rois * volumes // s.patch, samples * rois
        each = 3 * s.patch * s.width + 4 * s.depth * s.width**2
        if not s.experts:
            return 2.0 * tokens * (each + 2 * s.width**2)
        inner, reached = s.experts * s.width, 1 + self.walks
        each += (reached + 1) * s.width * inner + 2 * s.experts * s.width
        roi = s.region_width * (self.walks * inner + reached * s.experts)
        pair = 2 * volumes + self.walks * (s.width * volumes // s.patch + s.region_width)
        return 2.0 * (tokens * each + places * roi + places * rois * pair)

    def _visible(self, batch: Batch) -> Tensor:
        return batch["present"][..., None].expand(-1, -1, self.settings.volumes)

    def _encode(self, batch: Batch, visible_BRL: Tensor) -> Encoded:
        """States of the window of which the rest is hidden."""
        s = self.settings
        seen_BRL = torch.where(visible_BRL, batch["rois"].transpose(1, 2), 0.0)
        time_BTF = time_code(batch["repetition_time"], s.volumes // s.patch, s.patch)
        flagged = torch.stack([seen_BRL, (~visible_BRL).to(seen_BRL.dtype)], dim=2)
        patches = flagged.unflatten(-1, (-1, s.patch)).transpose(2, 3).flatten(3)
        h_BRTC = self.embedding(patches) + self.time(time_BTF)[:, None]
        # Under autocast the residual stream stays in the precision of the weights.
        h_BRTC = h_BRTC.to(self.embedding.weight.dtype) + self.place(self.places)[:, None]
        for block in self.blocks:
            h_BRTC = block(h_BRTC)
        normed, gates = self.mixture_norm(h_BRTC), None
        if isinstance(self.mixture, Perceptron):
            mixed, vectors = self.mixture(normed), h_BRTC.new_zeros(*h_BRTC.shape[:2], 0)
        else:
            graphs = self._graphs(seen_BRL, visible_BRL)
            vectors = self._walk_vectors(graphs, len(normed))
            reached = walk(graphs, normed.flatten(2), s.walk_steps)
            states = [one.view_as(normed) for one in reached]
            mixed, gates = self.mixture(normed, states, self.places, vectors, time_BTF)
        return Encoded(self.norm(h_BRTC + mixed), vectors, time_BTF, gates)

    def _graphs(self, seen_BRL: Tensor, visible_BRL: Tensor) -> list[Tensor]:
        """Matrices of steps between ROIs, in float32."""
        s = self.settings
        with torch.autocast(seen_BRL.device.type, enabled=False):
            affinity_RR = self.places @ self.places.T / math.sqrt(s.region_width)
            correlation_BRR = correlation(seen_BRL, visible_BRL)
            usable_BR = visible_BRL.any(-1)
            return transitions(correlation_BRR, usable_BR, affinity_RR, s.neighbors, s.signed)

    def _walk_vectors(self, graphs: list[Tensor], samples: int) -> Tensor:
        """The mean embedding of the ROIs that are 1, 2, ... steps away, (B, R, W) in float32."""
        with torch.autocast(self.places.device.type, enabled=False):
            each_BRD = self.places.expand(samples, -1, -1)
            return torch.cat(walk(graphs, each_BRD, self.settings.walk_steps), dim=-1)
