"""Small Cinp models, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuromamba.config import Cinp as Settings
from neuromamba.models import Cinp, build_model

ROIS, EDGE, WIDTH = 9, 32, 16
SMALL: dict[str, Any] = {
    "width": WIDTH,
    "feature_size": 12,
    "window": 4,
    "network_depth": 1,
    "network_heads": 2,
    "network_hidden": 12,
    "clusters": 3,
    "mask_patch": 8,
}


def cinp(**changes) -> Cinp:
    torch.manual_seed(0)
    model = build_model(Settings(family="cinp", **{**SMALL, **changes}), 0, n_rois=ROIS)
    assert isinstance(model, Cinp)
    return model


def make_batch(samples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    anat = torch.rand(samples, EDGE, EDGE, EDGE, generator=drawn)
    anat[:, :6] = 0  # no brain
    fc = torch.rand(samples, ROIS, ROIS, generator=drawn) * 2 - 1
    return {
        "anat": anat,
        "fc": (fc + fc.mT) / 2,
        "present": torch.ones(samples, ROIS, dtype=torch.bool),
        "has_anat": torch.ones(samples, dtype=torch.bool),
        "has_fc": torch.ones(samples, dtype=torch.bool),
        "person": torch.arange(samples),
    }


def rows(batch: dict[str, Tensor], which: Any) -> dict[str, Tensor]:
    return {name: value[which] for name, value in batch.items()}
