"""Steps of the optimiser: accumulation, clipping, the learning rate, and what decays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_runs import Toy, assert_same, failing_at, rows, train, validation
from safetensors.torch import load_file
from torch import nn

from neuromamba.config import Optimiser
from neuromamba.distributed import World
from neuromamba.optimiser import learning_rate, make_optimizer, set_learning_rate
from neuromamba.scalars import mean_scalars


def test_accumulation_equals_a_big_batch(tmp_path):
    def model():
        toy = Toy()
        toy.layers[2].p = 0.0
        return toy

    # One step, because AdamW's quotient blows rounding errors up where a gradient is near zero.
    common = {"validate_every": 1, "steps": 1, "warmup_steps": 0}
    big, _ = train(tmp_path / "big", model=model(), batch_size=8, **common)
    small, _ = train(tmp_path / "two", model=model(), accumulate=2, **common)
    for name, parameter in big.named_parameters():
        other = small.get_parameter(name)
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6)
    one, two = (rows(tmp_path / name)[0] for name in ("big", "two"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_gradients_are_clipped_by_their_joint_norm(tmp_path):
    free, _ = train(tmp_path / "free", steps=1, clip_norm=1e9)
    clipped, _ = train(tmp_path / "clipped", steps=1, clip_norm=0.25)
    norm = {name: _grad_norm(model) for name, model in (("free", free), ("clipped", clipped))}
    assert norm["free"] > 0.5
    assert norm["clipped"] == pytest.approx(0.25, rel=1e-4)
    told = [rows(tmp_path / name)[0]["grad_norm"] for name in ("free", "clipped")]
    assert told == pytest.approx([norm["free"]] * 2)


def _grad_norm(model: nn.Module) -> float:
    return float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    settings = Optimiser(steps=110, learning_rate=1.0, final_learning_rate=0.2, warmup_steps=10)
    rates = [learning_rate(settings, step) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.6)
    assert rates[35] == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert 0.2 < rates[-1] < 0.202
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_only_matrices_decay():
    groups = make_optimizer(Toy(), Optimiser(steps=1, weight_decay=0.3)).param_groups
    assert {g["weight_decay"]: sorted(p.ndim for p in g["params"]) for g in groups} == {
        0.3: [2, 2],
        0.0: [1, 1, 1, 1],
    }


def test_frozen_parameters_stay(tmp_path):
    model = Toy()
    model.layers[0].requires_grad_(False)
    before = model.layers[0].weight.clone()
    model, _ = train(tmp_path, model=model)
    assert torch.equal(model.layers[0].weight, before)


# --- Learning rates by parameter ------------------------------------------------------------------


class Scaled(Toy):
    def learning_rate_scales(self):
        return {"layers.0.weight": 0.25, "layers.4.bias": 2.0}


def test_a_model_scales_its_learning_rates_but_not_how_much_decays(tmp_path):
    settings = Optimiser(steps=1, weight_decay=0.3)
    model = Scaled()
    optimizer = make_optimizer(model, settings)
    set_learning_rate(optimizer, 0.1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates == pytest.approx(
        {**dict.fromkeys(names.values(), 0.1), "layers.0.weight": 0.025, "layers.4.bias": 0.2}
    )
    shrinks = {
        names[p]: g["lr"] * g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
    }
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    expected = {**dict.fromkeys(shrinks, 0.0), **dict.fromkeys(matrices, 0.03)}
    assert shrinks == pytest.approx(expected)


def test_the_scale_is_that_of_the_steps_taken(tmp_path):
    common = {"steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "validate_every": 1}
    plain, _ = train(tmp_path / "plain", **common)
    scaled, _ = train(tmp_path / "scaled", model=Scaled(), **common)
    start = Toy()
    for name, factor in (("layers.0.weight", 0.25), ("layers.4.bias", 2.0), ("layers.0.bias", 1)):
        before = start.get_parameter(name)
        torch.testing.assert_close(
            scaled.get_parameter(name) - before,
            factor * (plain.get_parameter(name) - before),
            rtol=1e-3,
            atol=1e-7,
        )


# --- The running average --------------------------------------------------------------------------


def test_the_average_follows_the_weights_by_its_rule(tmp_path):
    """From the snapshots of a training without an average the rule gives those with one."""
    common = {"keep_every": 1, "steps": 12, "validate_every": 12}
    train(tmp_path / "plain", **common)
    _, fitted = train(tmp_path / "average", ema=0.6, **common)
    expected = Toy().state_dict()
    for step in range(12):
        now, own = snapshot(tmp_path / "plain", step + 1), snapshot(tmp_path / "average", step + 1)
        kept = min(0.6, (1 + step) / (10 + step))
        for name, value in expected.items():
            expected[name] = kept * value + (1 - kept) * now[name]
            torch.testing.assert_close(own[name], expected[name])
    for name, value in expected.items():
        torch.testing.assert_close(fitted.last[name], value)


def test_the_average_is_what_is_validated_and_kept(tmp_path):
    model, fitted = train(tmp_path, ema=0.9, keep_every=20)
    last = [row for row in rows(tmp_path) if row["split"] == "validation"][-1]
    averaged, plain = Toy(), Toy()
    averaged.load_state_dict(snapshot(tmp_path, 20))
    plain.load_state_dict(model.state_dict())
    world, cpu = World(), torch.device("cpu")
    of_average = mean_scalars(averaged, validation(), cpu, "float32", world)["loss"]
    assert last["loss"] == pytest.approx(of_average)
    assert last["loss"] != pytest.approx(
        mean_scalars(plain, validation(), cpu, "float32", world)["loss"], rel=1e-3
    )
    assert all(torch.equal(fitted.last[name], v) for name, v in averaged.state_dict().items())


def test_a_stopped_training_with_an_average_ends_in_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", ema=0.9, training=failing_at(13))
    assert_same(train(tmp_path / "stopped", ema=0.9), whole)


def snapshot(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "snapshots" / f"step-{step:08d}" / "model.safetensors")
