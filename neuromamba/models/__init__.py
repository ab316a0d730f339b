"""Model families: what they compute, and nothing about where data comes from.

A family is one file with one class, a `torch.nn.Module` that has

- ``needs``: names of the tensors that its batches carry;
- ``width``: the width of its embedding;
- ``loss(batch)``: a dict of scalar tensors, ``"loss"`` among them;
- ``embed(batch)``: a tensor (batch, width);
- ``pool``, if it likes: the part of ``embed`` that pretraining leaves alone, and that is learnt
  together with a head also where the rest of the model is frozen.
"""

from __future__ import annotations

from torch import nn

from neuromamba.config.schema import Model
from neuromamba.config.schema import NeuroMamba as NeuroMambaSettings
from neuromamba.models.neuromamba import NeuroMamba
from neuromamba.models.skill import skills

__all__ = ["NeuroMamba", "build_model", "skills"]


def build_model(model: Model, patch_values: int) -> nn.Module:
    """Build a model with fresh weights, drawn from torch's global generator: seed it before.

    Parameters
    ----------
    model : neuromamba.config.schema.Model
        The model's section of the config.
    patch_values : int
        Values of one patch: ``patch**3 * time_patch``.

    Returns
    -------
    nn.Module
        In float32, on the CPU.
    """
    match model:
        case NeuroMambaSettings():
            return NeuroMamba(model, patch_values)
