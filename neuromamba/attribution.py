"""Integrated gradients: how much each value that a model reads adds to what it says.

Source: Sundararajan, Taly and Yan (2017, arXiv 1703.01365). The attribution of a value is its
change from a baseline times the gradient of the output with respect to it, averaged on the straight
line from the baseline to the input. Attributions of a window sum to what the output changes by
(completeness), which tells how well the average was taken.

Design choices
--------------
- The baseline is a brain whose signal does not vary. Of tokens it is each voxel's own mean over the
  run (0 with `normalization: voxel`); of volumes and of regions' series, which come without it, the
  mean over the window. Other inputs have the baseline 0.
- The average is a Gauss-Legendre sum: exact for a model that is linear in its input with one step,
  and for a polynomial of degree 2 * steps - 1 along the line.
- The windows of a batch do not mix, so the gradient of the sum of their outputs holds that of each.
- The code is ours because captum's repeats tensors along their first axis as samples; in a packed
  batch that axis is the patches of all windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuromamba.batches import Batch
from neuromamba.files import InputError
from neuromamba.heads import ClassHead, HeadedModel


@dataclass(frozen=True)
class Attributed:
    """Attributions of a batch.

    Attributes
    ----------
    values
        For each input, by its name: float64 of the input's shape, in units of the output.
    change
        (window,) float64 output minus that of the baseline.
    total
        (window,) float64 sum of a window's attributions; `change`, but for the error of the sum.
    seen
        For each input, by its name: where it differs from its baseline, bool of its shape.
    """

    values: dict[str, Tensor]
    change: Tensor
    total: Tensor
    seen: dict[str, Tensor]


def attribute(network: HeadedModel, batch: Batch, positive: int, steps: int) -> Attributed:
    """Attribute what a fine-tuned model says of windows to the values it reads.

    Parameters
    ----------
    network
        In evaluation mode.
    batch
        On the network's device; each of `network.needs` that is a float tensor is attributed to.
    positive
        Number of the class that is explained; see `explained_output`.
    steps
        Points on the line from the baseline: forward and backward passes.

    Raises
    ------
    InputError
        When the model passes no gradient to its input, or one that is not finite.
    """
    baselines = baselines_of(network, batch)

    def output(at: Batch) -> Tensor:
        return explained_output(network, at, positive)

    with torch.no_grad():
        change = output(batch).double() - output({**batch, **baselines}).double()
    values = integrated_gradients(output, batch, baselines, steps)
    total = torch.stack([_sum_of_windows(value, batch) for value in values.values()]).sum(0)
    if not (torch.isfinite(total).all() and torch.isfinite(change).all()):
        raise InputError(
            f"{', '.join(dict.fromkeys(batch['run']))}: what the model says of it, or the gradient "
            "of that, is not finite; leave the run out"
        )
    seen = {name: ~torch.isclose(batch[name], base) for name, base in baselines.items()}
    return Attributed(values, change, total, seen)


def explained_output(network: HeadedModel, batch: Batch, positive: int) -> Tensor:
    """What is explained: (window,).

    Of classes, the logit of class `positive` minus the mean of the others': of two, the log of the
    odds that the model sees. Of a number, the value in the target's units.
    """
    features = network.features(batch)
    if not isinstance(network.task, ClassHead):
        return network.predict_features(features)[:, 0]
    logits = network.head(features)
    own = logits[:, positive]
    return own - (logits.sum(1) - own) / (logits.shape[1] - 1)


def baselines_of(network: HeadedModel, batch: Batch) -> dict[str, Tensor]:
    """The baseline of each input that can have a gradient, of its shape."""
    baselines = {}
    for name in network.needs:
        value = batch[name]
        if not value.is_floating_point():
            continue
        match name:
            case "tokens":
                base = batch["mean"][:, None]
            case "volumes" | "rois":
                base = value.mean(1, keepdim=True)
            case _:
                base = torch.zeros_like(value)
        baselines[name] = base.expand_as(value)
    return baselines


def integrated_gradients(
    output: Callable[[Batch], Tensor],
    batch: Batch,
    baselines: Mapping[str, Tensor],
    steps: int,
) -> dict[str, Tensor]:
    """Integrated gradients of `output`, (window,), with respect to the inputs in `baselines`.

    Returns
    -------
    dict of Tensor
        Of each input's shape, float64.

    Raises
    ------
    InputError
        When the output has no gradient.
    """
    places, weights = np.polynomial.legendre.leggauss(steps)
    change = {name: batch[name] - base for name, base in baselines.items()}
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in change.items()}
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        point = {
            name: (base + place * change[name]).detach().requires_grad_()
            for name, base in baselines.items()
        }
        with torch.enable_grad():
            value = output({**batch, **point}).sum()
        if not value.requires_grad:
            raise InputError(
                f"the model passes no gradient to {', '.join(baselines)}: what it says cannot be "
                "attributed to them"
            )
        gradients = torch.autograd.grad(value, list(point.values()), materialize_grads=True)
        for name, gradient in zip(point, gradients, strict=True):
            total[name] += weight * gradient
    return {name: value * change[name] for name, value in total.items()}


def _sum_of_windows(values: Tensor, batch: Batch) -> Tensor:
    """Sum of the values of each window: (window,); its rows are one, or those of its patches."""
    windows = len(batch["run"])
    counts = [1] * windows if len(values) == windows else batch["patches"].tolist()
    return torch.stack([part.sum() for part in values.split(counts)])
