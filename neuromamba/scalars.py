"""The scalars that a model returns for a batch, their averages, and ratios of averages.

Scalars are averaged as they are. Ratios are computed from averages, here and nowhere else:
`mse_model` beside `mse_<predictor>` gives `skill_<predictor>` = 1 - mse_model / mse_<predictor>,
which is 0 for a model as good as that predictor and 1 for a perfect one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from neuromamba.batches import Batch
from neuromamba.models import skills


def with_skills(scalars: Mapping[str, float]) -> dict[str, float]:
    """Add `skill_<predictor>` for each `mse_<predictor>` beside `mse_model`."""
    return {**scalars, **skills(scalars)}


def mean_scalars(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, precision: str = "float32"
) -> dict[str, float]:
    """A model's scalars without training it, averaged over all samples, with their skills."""
    model.eval()
    sums: dict[str, float] = {}
    samples = 0
    with torch.no_grad():
        for batch in batches:
            size = len(batch["run"])
            samples += size
            for name, value in scalars_of(model, batch, device, precision)[1].items():
                sums[name] = sums.get(name, 0.0) + value * size
    return with_skills({name: value / samples for name, value in sums.items()})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def scalars_of(
    model: nn.Module, batch: Batch, device: torch.device, precision: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss, with its graph, and the values of all scalars that `model.loss` gives."""
    bfloat16 = precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        scalars = model.loss(to_device(batch, device))  # type: ignore[operator]
    # One transfer from the device for all scalars.
    values = torch.stack([value.detach().double() for value in scalars.values()]).tolist()
    return scalars["loss"], dict(zip(scalars, values, strict=True))
