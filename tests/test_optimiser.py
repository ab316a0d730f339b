"""Steps of the optimiser: accumulation, clipping, the learning rate, and what decays."""

from __future__ import annotations

import pytest
import torch
from fake_runs import Toy, batch_of, rows, train
from torch import nn

from neuromamba.config import Optimiser
from neuromamba.optimiser import learning_rate, make_optimizer


def test_accumulation_equals_a_big_batch(tmp_path):
    def halves(n):
        whole = batch_of(n // 2, 8)
        return {name: value[4 * (n % 2) :][:4] for name, value in whole.items()}

    def model():
        toy = Toy()
        toy.layers[2].p = 0.0
        return toy

    # One step, because AdamW's quotient blows rounding errors up where a gradient is near zero.
    common = {"validate_every": 1, "steps": 1, "warmup_steps": 0}
    big, _ = train(
        tmp_path / "big", model=model(), training=lambda n: batch_of(n, 8), batch_size=8, **common
    )
    small, _ = train(tmp_path / "two", model=model(), training=halves, accumulate=2, **common)
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
