"""What is Lmae's own, and RoiTransformer's."""

from __future__ import annotations

import math

import pytest
import torch
from small_roi_models import (
    LMAE,
    PATCH,
    ROIS,
    VOLUMES,
    lmae,
    make_batch,
    rows,
    transformer,
)
from torch import Tensor, nn

from neuromamba.config import Compute, Lmae
from neuromamba.models.roi_layers import LocalBlock, time_code
from neuromamba.models.roi_predictor import Predictor


def test_values_that_are_masked_are_told_apart_from_zeros() -> None:
    model, batch = lmae().eval(), rows(make_batch(), [0])
    batch["rois"] = torch.zeros_like(batch["rois"])
    visible = torch.ones(1, ROIS, VOLUMES, dtype=torch.bool)
    hidden = visible.clone()
    hidden[0, 3, 10:20] = False
    one, other = model._encode(batch, visible).states, model._encode(batch, hidden).states
    assert not torch.allclose(one[0, 3], other[0, 3])


def test_regions_meet_by_walks_alone() -> None:
    batch = rows(make_batch(), [0])
    moved = {**batch, "rois": batch["rois"].clone()}
    moved["rois"][0, :, 4] = batch["rois"][0].flip(0)[:, 4]
    for experts, meet in ((0, False), (3, True)):
        model = lmae(experts=experts).eval()
        visible = model._visible(batch)
        one, other = model._encode(batch, visible).states, model._encode(moved, visible).states
        assert not torch.allclose(one[0, 4], other[0, 4])
        assert torch.allclose(one[0, :4], other[0, :4]) is not meet


def test_the_encoder_is_local_in_time() -> None:
    block, h = LocalBlock(8), torch.randn(1, 2, 10, 8)
    moved = h.clone()
    moved[0, 1, 6] += 1
    changed = (block(moved) - block(h)).abs().amax(-1) > 0
    assert changed.nonzero().tolist() == [[0, 1, 5], [0, 1, 6], [0, 1, 7]]


def test_time_is_told_in_seconds() -> None:
    slow, fast = time_code(torch.tensor([2.0]), 6, 5), time_code(torch.tensor([1.0]), 12, 5)
    # The centre of a patch of 10 s lies between two of 5 s.
    assert not torch.allclose(slow, fast[:, :6])
    twice = time_code(torch.tensor([1.0]), 6, 10)
    torch.testing.assert_close(slow, twice)
    assert slow[0, 0, 8].item() == pytest.approx(math.cos(2 * math.pi * 5 / 4), abs=1e-5)


def test_experts_of_each_region_and_time() -> None:
    batch = make_batch()
    weights = lmae(experts=3).experts(batch)["weights"]
    assert weights.shape == (4, VOLUMES // PATCH, ROIS, 3)
    there = batch["present"][:, None].expand(weights.shape[:3])
    torch.testing.assert_close(weights.sum(-1), there.float())
    assert (weights[0].std(0) > 0).all()
    assert (weights[0].std(1) > 0).all()
    assert lmae(experts=0).experts(batch) == {}


def test_top_k_experts() -> None:
    batch = make_batch()
    weights = lmae(top_k=1).experts(batch)["weights"]
    assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_balance_is_part_of_the_loss() -> None:
    batch = make_batch()
    scalars = lmae(balance=0.5).eval().loss(batch)
    expected = scalars["mse_model"] + 0.5 * scalars["imbalance"]
    torch.testing.assert_close(scalars["loss"].detach(), expected)
    assert scalars["imbalance"] > 0


@pytest.mark.parametrize("predictor", ["ssm", "mean", "gru", "attention"])
def test_predictors(predictor: str) -> None:
    batch = make_batch()
    model = lmae(predictor=predictor, predictor_depth=2).eval()
    plain = lmae(predictor="mean").eval()
    weights = {**model.state_dict(), **plain.state_dict()}
    model.load_state_dict(weights)
    before, mean = model.embed(batch), plain.embed(batch)
    assert before.shape == (4, model.width) == (4, 8 + 3 * 2 * 6)
    if predictor in ("ssm", "gru", "mean"):
        # Before it has learnt anything, a sequence model changes nothing.
        torch.testing.assert_close(before, mean)
    optimizer = torch.optim.Adam(model.pool.parameters(), lr=0.05)
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (model.embed(batch)[:, :8].mean(1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    model.embed(batch).square().sum().backward()
    for name, parameter in model.pool.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("predictor", "ordered"), [("ssm", True), ("mean", False), ("gru", True), ("attention", True)]
)
def test_the_order_of_time(predictor: str, ordered: bool) -> None:
    torch.manual_seed(0)
    settings = Lmae(family="lmae", **{**LMAE, "predictor": predictor})
    pool = Predictor(settings, ROIS, 16, Compute())
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    h, vectors = torch.randn(2, ROIS, 6, 8), torch.randn(2, ROIS, 16)
    present, time = torch.ones(2, ROIS, dtype=torch.bool), time_code(torch.ones(2), 6, PATCH)
    one, other = pool(h, vectors, present, time), pool(h.flip(2), vectors, present, time)
    assert torch.allclose(one, other, atol=1e-5) is not ordered


def test_the_embedding_tells_where_a_state_occurred_and_how_regions_are_connected() -> None:
    batch = rows(make_batch(), [0])
    swapped = {**batch, "rois": batch["rois"][..., [1, 0, *range(2, ROIS)]]}
    model = lmae(predictor="mean").eval()
    one, other = model.embed(batch)[0], model.embed(swapped)[0]
    assert ((one - other).abs() > 1e-4).all()
    encoded = model._encode(batch, model._visible(batch))
    forms = torch.einsum("rm,rw->mw", model.pool.connections, encoded.vectors[0]) / ROIS**0.5
    torch.testing.assert_close(one[8:], forms.flatten())
    states = torch.einsum("rc,rtc->c", model.pool.regions, encoded.states[0])
    torch.testing.assert_close(one[:8], states / ROIS**0.5 / (VOLUMES // PATCH))


def test_the_embedding_has_a_gradient_in_the_series_through_the_graph() -> None:
    batch = rows(make_batch(), [0])
    leaf = batch["rois"].clone().requires_grad_()
    forms = lmae(neighbors=ROIS, signed=True).embed({**batch, "rois": leaf})[0, 8:]
    assert (torch.autograd.grad(forms.square().sum(), leaf)[0] != 0).all()


def test_before_fine_tuning_the_embedding_is_the_plain_mean() -> None:
    model, batch = transformer().eval(), rows(make_batch(), [2])
    states: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, given, output: states.append(output))
    embedding = model.embed(batch)
    assert states[0].shape == (1, 7 * VOLUMES // PATCH, 8)
    torch.testing.assert_close(embedding, states[0].mean(1))
    nn.init.normal_(model.pool.weight)
    states.clear()
    found = model.embed(batch)[0]
    weights = model.pool(states[0][0]).softmax(0)
    expected = [weights[:, k] @ group for k, group in enumerate(states[0][0].chunk(2, dim=1))]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"head_dim": 5}, "head_dim"),
        ({"predictor": "attention", "head_dim": 16}, "head_dim"),
        ({"experts": 2, "top_k": 3}, "top_k"),
        ({"volumes": 42}, "patch"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Lmae(family="lmae", **{**LMAE, **changes})


def test_head_dim_matters_only_where_there_are_heads() -> None:
    assert Lmae(family="lmae", predictor="gru", head_dim=5).head_dim == 5
