"""The recurrent step of a layer, and forecasts that a model makes of its own forecasts."""

from __future__ import annotations

import pytest
import torch
from test_models import PATCH_VALUES, build, make_window, pack
from torch import Tensor

from neuromamba.files import InputError
from neuromamba.models.rollout import roll_out
from neuromamba.models.ssm import Mamba2


def one_run(n_patches: int = 4, n_time: int = 5, windows: int = 3) -> dict[str, Tensor]:
    """Windows that share their patches, in float64."""
    made = [make_window(n_patches, n_time, seed) for seed in range(windows)]
    for window in made:
        window["centers"] = made[0]["centers"]
    return {name: v.double() if v.is_floating_point() else v for name, v in pack(made).items()}


@pytest.mark.parametrize("conv", [1, 4])
def test_steps_of_a_layer_equal_its_forward_pass(conv: int) -> None:
    torch.manual_seed(0)
    layer = Mamba2(width=8, state=4, head_dim=4, conv=conv, chunk=16).double()
    torch.nn.init.normal_(layer.norm_weight)
    torch.nn.init.normal_(layer.D)
    u_BLC = torch.randn(3, 40, 8, dtype=torch.float64)
    cache = layer.start(3)
    with torch.no_grad():
        steps = torch.stack([layer.step(u_BC, cache) for u_BC in u_BLC.unbind(1)], dim=1)
    torch.testing.assert_close(steps, layer(u_BLC), rtol=1e-12, atol=1e-13)


def test_half_precision_keeps_its_states_in_float32() -> None:
    torch.manual_seed(0)
    layer = Mamba2(width=8, state=4, head_dim=4)
    u_BLC = torch.randn(2, 30, 8)
    expected = layer(u_BLC)
    layer = layer.bfloat16()
    cache = layer.start(2)
    with torch.no_grad():
        found = [layer.step(u_BC, cache) for u_BC in u_BLC.bfloat16().unbind(1)]
    assert {tensor.dtype for tensor in cache} == {torch.float32}
    error = (torch.stack(found, dim=1).float() - expected).abs().max() / expected.abs().max()
    assert error < 0.02


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
@pytest.mark.parametrize("known", [1, 3, 4])
def test_fed_the_truth_the_steps_predict_what_the_model_predicts(order: str, known: int) -> None:
    model, batch = build(order=order).double(), one_run()
    packing = model._packing(batch)
    steps = model.predict_next(batch).split(packing.steps)
    # Row i predicts the position after i.
    before = torch.cat([torch.cat([part[:1], part[:-1]]) for part in steps])
    expected = packing.to_grid(before)[:, known:]
    found = roll_out(model, batch, known, teacher_forcing=True)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
def test_each_forecast_is_the_prediction_after_the_forecasts_before_it(order: str) -> None:
    """Written out with whole forward passes: each forecast takes the place of its token."""
    model, batch, known = build(order=order).double(), one_run(windows=1), 2
    tokens = batch["tokens"].clone()
    tokens[:, known:] = torch.nan  # so that any use of the truth shows
    n_patches, n_time = tokens.shape[:2]
    places = [(p, t) for p in range(n_patches) for t in range(n_time)]
    if order == "space-fastest":
        places = [(p, t) for t in range(n_time) for p in range(n_patches)]
    for step, (p, t) in enumerate(places):
        if t >= known:
            filled = {**batch, "tokens": tokens.nan_to_num()}
            tokens[p, t] = model.predict_next(filled)[step - 1].detach()
    found = model.roll_out(batch, known)
    torch.testing.assert_close(found, tokens[:, known:], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
def test_no_forecast_reads_anything_after_the_known_part(order: str) -> None:
    model, batch = build(order=order), one_run()
    batch = {name: v.float() if v.is_floating_point() else v for name, v in batch.items()}
    before = model.roll_out(batch, 2)
    batch["tokens"][:, 2:] = torch.nan
    assert torch.equal(model.roll_out(batch, 2), before)
    batch["tokens"][0, 1] += 1
    changed = (model.roll_out(batch, 2) - before).abs().amax((1, 2)) > 0
    assert changed[:4].all(), "patch 0 is before all others of its window"
    assert not changed[4:].any(), "and in no other window"


def test_a_forecast_of_patches_in_their_own_units_is_refused() -> None:
    with pytest.raises(InputError, match=r"target: patch.*only one with `target: raw`"):
        build(target="patch").roll_out(one_run(), 2)


@pytest.mark.parametrize("known", [0, 5])
def test_something_is_known_and_something_is_not(known: int) -> None:
    with pytest.raises(ValueError, match="1 to 4 can be"):
        build().double().roll_out(one_run(), known)


def test_windows_of_different_runs_are_refused() -> None:
    batch = pack([make_window(3, 5, 0), make_window(4, 5, 1)])
    with pytest.raises(ValueError, match=r"different numbers of patches: \[3, 4\]"):
        build().roll_out(batch, 2)


def test_a_forecast_has_the_shape_and_units_of_the_tokens() -> None:
    batch = {k: v.float() if v.is_floating_point() else v for k, v in one_run().items()}
    forecast = build().roll_out(batch, 3)
    assert forecast.shape == (12, 2, PATCH_VALUES)
    assert forecast.dtype == torch.float32
    assert not forecast.requires_grad
