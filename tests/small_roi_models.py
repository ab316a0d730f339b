"""Small models of ROI series, and batches for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuromamba.config import Compute, Lmae, RoiTransformer
from neuromamba.models import build_model

ROIS, VOLUMES, PATCH = 9, 40, 5
SCALARS = {
    "loss",
    "mse_model",
    "mse_mean",
    "mse_interpolation",
    "skill_mean",
    "skill_interpolation",
}
Batch = dict[str, Tensor]
SMALL = {"volumes": VOLUMES, "patch": PATCH, "width": 8}
LMAE = {**SMALL, "head_dim": 4, "state": 4, "neighbors": 3, "mask_seconds": 8.0, "walk_steps": 2}
LMAE |= {"region_width": 6, "maps": 3, "read_steps": 2}


def lmae(**changes) -> nn.Module:
    torch.manual_seed(0)
    return build_model(Lmae(family="lmae", **{**LMAE, **changes}), 0, Compute(), ROIS)


def transformer(**changes) -> nn.Module:
    torch.manual_seed(0)
    small = {**SMALL, "depth": 2, "heads": 2, "mlp_ratio": 2, **changes}
    return build_model(RoiTransformer(family="roi_transformer", **small), 0, Compute(), ROIS)


MODELS = {
    "lmae": lmae,
    "lmae-signed": lambda: lmae(signed=True, top_k=2, mask_rois=0.2),
    "lmae-without-experts": lambda: lmae(experts=0),
    "patches": transformer,
    "times": lambda: transformer(mask="times", mask_share=0.5),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def make_batch(samples: int = 4) -> Batch:
    """Each sample's values depend on its place alone; ROIs are missing in all but the first."""
    batch: Batch = {
        "rois": torch.zeros(samples, VOLUMES, ROIS),
        "present": torch.ones(samples, ROIS, dtype=torch.bool),
        "repetition_time": torch.tensor([2.0, 1.0, 2.0, 0.7])[:samples],
    }
    for k in range(samples):
        generator = torch.Generator().manual_seed(k)
        shared = torch.randn(VOLUMES, 3, generator=generator)
        mixed = shared @ torch.randn(3, ROIS, generator=generator)
        batch["rois"][k] = mixed + 0.5 * torch.randn(VOLUMES, ROIS, generator=generator)
        batch["present"][k, ROIS - k :] = False
    batch["rois"] *= batch["present"][:, None]
    return batch


def rows(batch: Batch, which: slice | list[int]) -> Batch:
    return {name: value[which] for name, value in batch.items()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def hidden_values(model: nn.Module, batch: Batch) -> Tensor:
    """Where the loss takes its targets, from the gradient of the error of a mute model."""
    model.eval()
    model.settings = model.settings.model_copy(update={"balance": 0.0})
    last = model.head if isinstance(model.head, nn.Linear) else model.head.values
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    leaf = batch["rois"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss({**batch, "rois": leaf})["loss"], leaf)
    return gradient != 0
