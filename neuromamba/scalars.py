"""The scalars that a model returns for a batch, their averages, and ratios of averages.

Scalars are averaged as they are. Ratios are computed from averages, here and nowhere else:
`mse_model` beside `mse_<predictor>` gives `skill_<predictor>` = 1 - mse_model / mse_<predictor>,
which is 0 for a model as good as that predictor and 1 for a perfect one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from neuromamba.batches import Batch
from neuromamba.distributed import World
from neuromamba.models import skills


def with_skills(scalars: Mapping[str, float]) -> dict[str, float]:
    """Add `skill_<predictor>` for each `mse_<predictor>` beside `mse_model`."""
    return {**scalars, **skills(scalars)}


def mean_scalars(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    precision: str,
    world: World,
) -> dict[str, float]:
    """A model's scalars without training it, averaged over all samples, with their skills.

    Each process of `world` gives its own batches, of which there may be none. Empty when there are
    no batches at all.
    """
    model.eval()
    sums: dict[str, float] = {}
    samples = 0
    with torch.no_grad():
        for batch in batches:
            size = len(batch["run"])
            samples += size
            scalars = scalars_of(model.loss, batch, device, precision)  # type: ignore[arg-type]
            # One transfer from the device for all scalars.
            values = torch.stack([value.double() for value in scalars.values()]).tolist()
            for name, value in zip(scalars, values, strict=True):
                sums[name] = sums.get(name, 0.0) + value * size
    everyone = world.gather([samples, sums])
    total = sum(samples for samples, _ in everyone)
    names = dict.fromkeys(name for _, sums in everyone for name in sums)
    return with_skills(
        {name: sum(sums.get(name, 0.0) for _, sums in everyone) / total for name in names}
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; the copy of `pinned` ones is not waited for."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def pinned(batch: Batch) -> Batch:
    """The batch with its tensors in memory that a GPU can read by itself."""
    return {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def scalars_of(
    loss: Callable[[Batch], dict[str, torch.Tensor]],
    batch: Batch,
    device: torch.device,
    precision: str,
) -> dict[str, torch.Tensor]:
    """The scalars that `loss` gives for a batch, with the graph of their gradients."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return loss(to_device(batch, device))
