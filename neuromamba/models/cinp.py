"""Cinp: T1w images and functional connectivity networks of the same people, brought together.

Source: Hu, Wang and Xiao 2025, "Learning 3D Medical Image Models From Brain Functional Connectivity
Network Supervision For Mental Disorder Diagnosis", arXiv 2503.04205 (MICCAI 2025): CINP, which is
contrastive image-network pretraining. From there: a 3D Swin Transformer of the T1w image and a
Brain Network Transformer of the connectivity of its AAL-116 regions, both to 768 channels; the
contrast of images and networks in both directions with a learnable temperature (INC), masked image
modelling with an L1 loss on 30 % of the voxels (MIM), the matching of pairs (INM); their sum, the
latter two weighted by alpha and beta (`mim`, `inm`, both 1). There is no public code. All else is
ours:

- The contrast and the matching see whole images, as at test time, and a second pass of the encoder
  sees the masked ones (as ALBEF does with masked text). Masks are cubes (`mask_patch`), since
  single voxels could be told by their neighbours; what is hidden is 0, and only brain counts.
- The matching is a perceptron on both embeddings, with hard negatives: see `contrastive`.
- Who has a T1w image alone takes part in masked image modelling and is a negative in the contrast,
  who has a network alone is a negative. `embed` is of the image, or, where there is none, of the
  network, which is in the same space; the network encoder learns in pretraining alone.
- Large batches on little memory (`chunk`), as by gradient caching (Gao et al. 2021, arXiv
  2101.06983): chunks are encoded without a graph, the loss is of all embeddings, and each chunk is
  encoded again, with the same random numbers, when its embeddings' gradient is there. This is what
  checkpointing each chunk's encoding does.
- Images of different people are nearly the same to a network, and a contrast falls back on giving
  everybody one embedding. Projections are therefore standardised over the people of the whole batch
  before they are brought to length 1 (`contrastive.Standardise`), as SimCLR's are (Chen et al.
  2020, arXiv 2002.05709); an embedding goes by the means over training subjects (`settle`).
- Masks and changes of a sample are a function of the step and of its place in the whole batch.

Dimensions in names: B samples, Z, Y, X voxels, R regions, C channels of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuromamba.config import Cinp as Settings
from neuromamba.models.brain_network_transformer import BrainNetworkTransformer
from neuromamba.models.contrastive import (
    LogitScale,
    Matcher,
    Pairs,
    Standardise,
    at_least_float32,
    contrast,
    match,
    normalise,
    processes,
)
from neuromamba.models.image_changes import ImageChanges, hide_cubes
from neuromamba.models.swin_image import ImageDecoder, SwinImage

Batch = dict[str, Tensor]
Encoded = tuple[Tensor, Tensor, Tensor]


class Supervision(nn.Module):
    """What images are brought together with, and rebuilt by: their embedding does without."""

    def __init__(self, settings: Settings, n_rois: int, channels: int) -> None:
        super().__init__()
        s = settings
        self.network = BrainNetworkTransformer(
            n_rois,
            s.width,
            s.network_depth,
            s.network_heads,
            s.network_hidden,
            s.clusters,
            s.reduced,
            s.learn_centers,
        )
        self.scale = LogitScale(s.temperature)
        self.standardise = nn.ModuleList(Standardise(s.width) for _ in range(2))
        # A part of no weight is left out, because every parameter has to take part in the loss.
        self.matcher = Matcher(s.width) if s.inm else None
        self.decoder = ImageDecoder(channels, s.patch) if s.mim else None


class Cinp(nn.Module):
    """Contrastive pretraining of an image encoder by connectivity networks.

    A batch is a dict of

    - ``anat`` (B, Z, Y, X) float32: T1w images in [0, 1], 0 where there is no brain;
    - ``fc`` (B, R, R) float32: Pearson correlations, 0 in rows and columns of missing regions;
    - ``present`` (B, R) bool: regions that there are;
    - ``has_anat``, ``has_fc`` (B,) bool: which of both a sample has; the rest is not looked at;
    - ``person`` (B,) int64: samples of one person have the same number.

    Parameters
    ----------
    settings : neuromamba.config.Cinp
    n_rois : int
        Regions of the atlas, R.

    Attributes
    ----------
    width : int
        Of the embeddings: `settings.width`.
    head : Supervision
        The network encoder, the scale of similarities, the matcher and the decoder.

    Raises
    ------
    InputError
        When `settings.clusters` is more than `n_rois`.
    """

    needs: tuple[str, ...] = ("fc", "anat")

    def __init__(self, settings: Settings, n_rois: int) -> None:
        super().__init__()
        self.settings, self.n_rois, self.width = settings, n_rois, settings.width
        s = settings
        self.image = SwinImage(s.feature_size, s.width, s.window, s.patch)
        self.head = Supervision(settings, n_rois, self.image.channels)
        self._change: ImageChanges | None = None

    @property
    def image_encoder(self) -> nn.Module:
        return self.image.swin

    @property
    def similarity_scale(self) -> Tensor:
        return self.head.scale.logarithm.detach().exp()

    def embed(self, batch: Batch) -> Tensor:
        """Of the image, or of the network where there is no image: (B, C) float32, of length 1.

        In training the images are changed at random, by numbers of this process.
        """
        images = batch["anat"]
        if self.training:
            images = self._changed(images, _seeds(int(torch.randint(2**62, ())), 0, len(images)))
        first = self._known(0, self.image(images))
        if bool(batch["has_anat"].all()):
            return first
        second = self._known(1, self._networks(batch))
        return torch.where(batch["has_anat"][:, None], first, second)

    @torch.no_grad()
    def settle(self, batches: Iterable[Batch]) -> None:
        """Set the means and SDs that embeddings go by, from samples as they are."""
        mode = self.training
        self.eval()
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for batch in batches:
            found[0].append(self.image(batch["anat"])[batch["has_anat"]])
            found[1].append(self._networks(batch)[batch["has_fc"]])
        self.train(mode)
        for one, parts in zip(self.head.standardise, found, strict=True):
            cast(Standardise, one).settle(torch.cat(parts))

    @torch.no_grad()
    def embed_pairs(self, batch: Batch) -> Pairs:
        """Embeddings of images (first) and networks (second), one row a sample of the batch."""
        first = self._known(0, self.image(batch["anat"]))
        second = self._known(1, self._networks(batch))
        return Pairs(first, second, batch["has_anat"], batch["has_fc"], batch["person"])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """INC + mim * MIM + inm * INM, of the samples of all processes in training.

        In evaluation it is of the samples of this batch.

        Returns
        -------
        dict of scalar Tensors
            - ``loss``: the only one with a gradient.
            - ``inc``, ``mim``, ``inm``: its parts; the latter two not where their weight is 0. MIM
              is in units of an image that goes from 0 to 1.
            - ``top1_image``, ``top1_network``: share of images (networks) whose own network (image)
              is the most similar in the batch.
            - ``matched``: share of pairs and hard negatives that the matching tells rightly.
            - ``temperature``.
        """
        s, together = self.settings, self.training and processes() > 1
        size, number = len(batch["person"]), _shared_number(together)
        seeds = _seeds(number, dist.get_rank() * size if together else 0, size)
        first, second, errors = self._encode_chunks(batch, seeds)
        own = Pairs(first, second, batch["has_anat"], batch["has_fc"], batch["person"])
        pairs = self._standardised(own.of_all_processes() if together else own)
        scale = self.head.scale()
        inc = contrast(pairs, scale)
        scalars = {
            "inc": inc["loss"],
            "top1_image": inc["top1_first"],
            "top1_network": inc["top1_second"],
            "temperature": 1 / scale,
        }
        total = inc["loss"]
        if self.head.decoder is not None:
            # Of the mean over processes, the mean over all images.
            share = processes() if together else 1
            scalars["mim"] = errors.sum() * share / pairs.has_first.sum().clamp(min=1)
            total = total + s.mim * scalars["mim"]
        if self.head.matcher is not None:
            drawn = torch.Generator().manual_seed(number)
            inm = match(pairs, self.head.matcher, scale, drawn)
            scalars |= {"inm": inm["loss"], "matched": inm["accuracy"]}
            total = total + s.inm * inm["loss"]
        return {"loss": total, **{name: value.detach() for name, value in scalars.items()}}

    def _standardised(self, raw: Pairs) -> Pairs:
        """Embeddings of what the projections have given for all samples."""
        first = normalise(self.head.standardise[0](raw.first, raw.has_first))
        second = normalise(self.head.standardise[1](raw.second, raw.has_second))
        return replace(raw, first=first, second=second)

    def _known(self, kind: int, projected: Tensor) -> Tensor:
        """The embedding of each sample for itself, by what `settle` has found."""
        return normalise(self.head.standardise[kind](projected))

    def _encode_chunks(self, batch: Batch, seeds: list[int]) -> Encoded:
        """Projections (B, C) of images and networks, and each image's error (B,) of the masked."""
        s, size = self.settings, len(seeds)
        chunk = s.chunk or size
        parts = []
        for start in range(0, size, chunk):
            some = slice(start, start + chunk)
            images, there = batch["anat"][some], batch["has_anat"][some]
            if self.training:
                images = self._changed(images, seeds[some])
            shape = (images.shape[1], images.shape[2], images.shape[3])
            hidden = hide_cubes(shape, s.mask_patch, s.mask_share, seeds[some])
            inputs = (images, there, hidden.to(images.device), batch["fc"][some])
            encode: Callable[..., Encoded] = self._encode
            if torch.is_grad_enabled() and chunk < size:
                parts.append(
                    checkpoint(encode, *inputs, batch["present"][some], use_reentrant=False)
                )
            else:
                parts.append(encode(*inputs, batch["present"][some]))
        first, second, errors = (torch.cat(one) for one in zip(*parts, strict=True))
        return first, second, errors

    def _encode(
        self, images: Tensor, there: Tensor, hidden: Tensor, fc: Tensor, present: Tensor
    ) -> Encoded:
        first = at_least_float32(self.image(images))
        second = at_least_float32(self.head.network(fc, present))
        if self.head.decoder is None:
            return first, second, first.new_zeros(len(first))
        features = self.image.features(images.masked_fill(hidden, 0.0))
        shape = (images.shape[1], images.shape[2], images.shape[3])
        errors = (at_least_float32(self.head.decoder(features, shape)) - images).abs()
        counted = hidden & (images != 0) & there[:, None, None, None]
        each = (errors * counted).sum((1, 2, 3)) / counted.sum((1, 2, 3)).clamp(min=1)
        return first, second, each

    def _networks(self, batch: Batch) -> Tensor:
        return self.head.network(batch["fc"], batch["present"])

    def _changed(self, images: Tensor, seeds: list[int]) -> Tensor:
        if self._change is None:
            self._change = ImageChanges(self.settings.changes)
        return self._change(images, seeds)


def _shared_number(together: bool) -> int:
    """A number of this step that all processes know.

    One is drawn whatever happens then, so that the next step's does not depend on this one's batch.
    """
    drawn = torch.randint(2**62, (1,))
    if together:
        dist.broadcast(drawn, 0)
    return int(drawn)


def _seeds(number: int, first: int, size: int) -> list[int]:
    """A number in 32 bits for each of the samples `first` to `first + size - 1` of a step."""
    every = np.random.SeedSequence(number).generate_state(first + size)
    return [int(one) for one in every[first:]]
