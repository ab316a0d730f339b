"""Model families: what they compute, and nothing about where data comes from.

A family is one file with one class, a `torch.nn.Module` that has

- ``needs``: names of what its batches carry, those of its section of the config;
- ``width``: the width of its embedding;
- ``loss(batch)``: a dict of scalar tensors, ``"loss"`` among them, each a mean over the samples of
  the batch in which every sample counts the same; one that contrasts samples is of the samples of
  all processes in training, and of the batch alone in evaluation, where processes differ in how
  many batches they have;
- ``embed(batch)``: a tensor (samples, width);

and, if it likes,

- ``pool``: the part of ``embed`` that pretraining leaves alone, and that is learnt together with a
  head also where the rest of the model is frozen;
- ``head``: the part that ``embed`` does without, and that fine-tuning leaves alone;
- ``learning_rate_scales()``: multipliers of the learning rate by parameter name;
- ``flops(batch)``: floating-point operations of the forward pass of ``loss``;
- ``encode(batch)``: hidden states (N, T, width) of ``tokens``;
- ``roll_out(batch, known)``: a forecast (N, T - known, V) of ``tokens`` from their first `known`
  time patches, of windows of one run;
- ``experts(batch)``: weights (B, T, R, experts) of its experts at each time and region;
- ``embed_pairs(batch)``: normalised embeddings (samples, width) of each of the kinds of data that
  it brings together, and which of them there are (see `neuromamba.models.contrastive.Pairs`), and
  `similarity_scale`: what makes logits of their similarities;
- ``settle(batches)``: set what embeddings go by, from training samples as they are, after a
  pretraining;
- ``image_encoder``: the network that the file `image_weights` of its settings is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from neuromamba.config import Cinp as CinpSettings
from neuromamba.config import Compute, Model
from neuromamba.config import Lmae as LmaeSettings
from neuromamba.config import NeuroMamba as NeuroMambaSettings
from neuromamba.config import RoiTransformer as RoiTransformerSettings
from neuromamba.config import Tablet as TabletSettings
from neuromamba.models.cinp import Cinp
from neuromamba.models.lmae import Lmae
from neuromamba.models.neuromamba import NeuroMamba
from neuromamba.models.roi_transformer import RoiTransformer
from neuromamba.models.skill import skills
from neuromamba.models.tablet import Tablet

__all__ = ["Cinp", "Lmae", "NeuroMamba", "RoiTransformer", "Tablet", "build_model", "skills"]


def build_model(
    model: Model,
    patch_values: int,
    compute: Compute | None = None,
    n_rois: int = 0,
    codes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global generator: seed it before.

    Parameters
    ----------
    model : neuromamba.config.Model
        The model's section of the config.
    patch_values : int
        Values of one patch of a scan, ``patch**3 * time_patch``, for families that read tokens.
    compute : neuromamba.config.Compute, optional
        Which kernels to use; no result depends on it but by rounding.
    n_rois : int
        Regions of the atlas, for families that read ROI series or their connectivity.
    codes : mapping, optional
        What the codes are, with `n_tokens` and `code_width`, for families that read those.

    Returns
    -------
    nn.Module
        In float32, on the CPU.
    """
    match model:
        case NeuroMambaSettings():
            return NeuroMamba(model, patch_values, compute or Compute())
        case LmaeSettings():
            return Lmae(model, n_rois, compute or Compute())
        case RoiTransformerSettings():
            return RoiTransformer(model, n_rois, compute or Compute())
        case CinpSettings():
            return Cinp(model, n_rois)
        case TabletSettings():
            if codes is None:
                raise ValueError(f"a model of family {model.family} is built for known codes")
            return Tablet(model, codes, compute or Compute())
