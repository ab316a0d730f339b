"""Masks of ROI series: where they lie, what is guessed there, and that they hide it."""

from __future__ import annotations

import pytest
import torch
from small_roi_models import (
    PATCH,
    VOLUMES,
    every_model,
    hidden_values,
    make_batch,
    rows,
    transformer,
)
from torch import Tensor, nn

from neuromamba.models.roi_masks import interpolate, local_masks, reference_errors, stretches


@pytest.mark.parametrize(("repetition_time", "length"), [(2.0, 5), (1.0, 10), (3.3, 3), (20.0, 1)])
def test_masks_are_as_long_in_seconds_at_every_repetition_time(repetition_time, length) -> None:
    times = torch.tensor([repetition_time])
    (mask,) = local_masks(500, 200, times, 10.0, 0.3, 0.0, training=False)
    # Stretches may touch, so that some runs of masked volumes are longer, but none is shorter.
    change = torch.diff(nn.functional.pad(mask.int(), (1, 1)))
    runs = (change == -1).nonzero()[:, 1] - (change == 1).nonzero()[:, 1]
    assert runs.min() == length
    assert mask.float().mean(1).sub(0.3).abs().max() <= 0.5 * length / 200 + 1e-6
    # Anywhere in the window, and elsewhere in each ROI.
    assert mask.float().mean(0).min() > 0.02
    assert len(mask.unique(dim=0)) > 400


def test_a_mask_longer_than_the_window_takes_all_of_it() -> None:
    assert stretches(3, 10, 25, 0.3, None).all()


def test_whole_rois_are_masked_besides() -> None:
    mask = local_masks(100, 50, torch.tensor([2.0, 2.0]), 10.0, 0.2, 0.25, training=True)
    assert mask.all(-1).sum(1).tolist() == [25, 25]
    assert not torch.equal(mask[0], mask[1])


def test_masks_of_evaluation_depend_on_the_repetition_time_alone() -> None:
    times = torch.tensor([2.0, 1.0, 2.0])
    one, two, three = local_masks(20, 50, times, 10.0, 0.3, 0.1, training=False)
    assert torch.equal(one, three)
    assert not torch.equal(one, two)


def test_interpolation_by_hand() -> None:
    values = torch.tensor([[[9.0, 1, 9, 9, 4, 9, 6, 9], [9.0] * 8]])
    visible = torch.tensor([[[0, 1, 0, 0, 1, 0, 1, 0], [0] * 8]], dtype=torch.bool)
    expected = [[1.0, 1, 2, 3, 4, 5, 6, 6], [0.0] * 8]
    assert interpolate(values, visible).tolist() == [expected]
    errors = reference_errors(values, visible, ~visible)
    mean = 11 / 3
    by_mean = (5 * (9 - mean) ** 2 + 8 * 81) / 13
    by_line = (sum((9 - one) ** 2 for one in (1, 2, 3, 5, 6)) + 8 * 81) / 13
    assert errors["mse_mean"].item() == pytest.approx(by_mean)
    assert errors["mse_interpolation"].item() == pytest.approx(by_line)


@every_model
def test_only_masked_values_of_present_rois_are_targets(make) -> None:
    batch = make_batch()
    hidden = hidden_values(make(), batch)
    assert not hidden[~batch["present"][:, None].expand_as(hidden)].any()
    share = hidden.float().mean((1, 2)) / batch["present"].float().mean(1)
    assert ((share > 0.15) & (share < 0.85)).all()


@every_model
def test_what_is_predicted_does_not_depend_on_masked_values(make) -> None:
    model, batch = make(), rows(make_batch(), [1])
    hidden = hidden_values(make(), batch)
    model.eval()
    predicted: list[Tensor] = []
    last = model.head if isinstance(model.head, nn.Linear) else model.head.values
    last.register_forward_hook(lambda module, given, output: predicted.append(output))
    others = torch.where(hidden, torch.randn_like(batch["rois"]) * 5, batch["rois"])
    shown = torch.where(hidden, batch["rois"], torch.randn_like(batch["rois"]) * 5)
    for series in (batch["rois"], others, shown):
        model.loss({**batch, "rois": series})
    assert torch.equal(predicted[0], predicted[1])
    assert not torch.allclose(predicted[0], predicted[2])


def test_times_are_masked_in_all_rois() -> None:
    batch = make_batch()
    hidden = hidden_values(transformer(mask="times", mask_share=0.5), batch)
    for sample, present in zip(hidden, batch["present"], strict=True):
        patches = sample[:, present].view(-1, PATCH * int(present.sum()))
        assert sorted(patches.float().mean(1).tolist()) == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_share_of_the_patches_there_are_is_masked(share: float) -> None:
    batch = make_batch()
    hidden = hidden_values(transformer(mask_share=share), batch)
    count = hidden.unflatten(1, (-1, PATCH)).any(2).sum((1, 2))
    tokens = batch["present"].sum(1) * VOLUMES // PATCH
    assert count.tolist() == [round(share * n) for n in tokens.tolist()]
