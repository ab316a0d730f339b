"""The NeuroMamba family: its contract, its loss by hand, and that it learns."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from neuromamba.config.schema import Compute, Config, NeuroMamba
from neuromamba.models import build_model, skills
from neuromamba.models.position import fourier_features

PATCH_VALUES = 16
SCALARS = {"loss", "mse_model", "mse_persistence", "mse_mean", "skill_persistence", "skill_mean"}


def settings(**changes) -> NeuroMamba:
    small = {"width": 16, "depth": 2, "state": 4, "head_dim": 8, "chunk": 8, "bands": 4}
    return NeuroMamba(family="neuromamba", **{**small, **changes})


def build(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(settings(**changes), PATCH_VALUES)


def make_window(count: int, n_time: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(count, n_time, PATCH_VALUES, generator=generator),
        "patches": torch.tensor([count]),
        "centers": torch.rand(count, 3, generator=generator),
        "mean": torch.randn(count, PATCH_VALUES, generator=generator),
    }


def pack(windows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([window[name] for window in windows]) for name in windows[0]}


def make_windows(counts: list[int], n_time: int = 5) -> list[dict[str, Tensor]]:
    """Windows of `counts` patches; one's values depend on its place in the list only."""
    return [make_window(count, n_time, seed) for seed, count in enumerate(counts)]


def make_batch(counts: list[int], n_time: int = 5) -> dict[str, Tensor]:
    return pack(make_windows(counts, n_time))


@pytest.mark.parametrize(
    ("width", "state", "published"),
    [
        (128, 32, 1.42),
        (192, 48, 3.09),
        (256, 64, 5.4),
        (384, 96, 12),
        (512, 128, 21),
        (768, 192, 47),
    ],
)
def test_published_parameter_counts(width: int, state: int, published: float) -> None:
    with torch.device("meta"):
        model = build_model(NeuroMamba(family="neuromamba", width=width, state=state), 432)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    # To the last published digit if the position code's projection is left out of the count, and
    # the weights of the pooling, which are ours.
    added = [*model.position.parameters(), *model.pool.parameters()]
    without = millions - sum(p.numel() for p in added) / 1e6
    assert millions == pytest.approx(published, rel=0.01)
    decimals = len(str(published).partition(".")[2])
    assert round(without, decimals) == published


def test_contract() -> None:
    model, batch = build(), make_batch([3, 5])
    assert set(model.needs) <= set(batch)
    assert model.encode(batch).shape == (8, 5, 16)
    assert model.predict_next(batch).shape == (40, PATCH_VALUES)
    assert model.embed(batch).shape == (2, model.width)
    scalars = model.loss(batch)
    assert set(scalars) == SCALARS
    assert all(value.shape == () for value in scalars.values())
    assert {name for name, value in scalars.items() if value.requires_grad} == {"loss"}


def test_every_parameter_gets_a_gradient() -> None:
    model, batch = build(), make_batch([3, 5])
    (model.loss(batch)["loss"] + model.embed(batch).square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_before_fine_tuning_the_embedding_is_the_plain_mean() -> None:
    model, batch = build(), make_batch([4])
    torch.testing.assert_close(model.embed(batch)[0], model.encode(batch).mean((0, 1)))


def test_pooling_weights_belong_to_positions_and_groups_of_channels() -> None:
    model, batch = build(), make_batch([3, 5])
    torch.nn.init.normal_(model.pool.weight)
    hidden, embedding = model.encode(batch).split([3, 5]), model.embed(batch)
    heads = model.pool.out_features
    for row in range(2):
        h = hidden[row].flatten(0, 1)
        weights = model.pool(h).softmax(0)
        groups = h.chunk(heads, dim=1)
        expected = [weights[:, k] @ group for k, group in enumerate(groups)]
        torch.testing.assert_close(embedding[row], torch.cat(expected))


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
@pytest.mark.parametrize("target", ["raw", "patch"])
@pytest.mark.parametrize("objective", ["mse", "mae", "huber"])
def test_loss_by_hand(order: str, target: str, objective: str) -> None:
    """The definitions, one window and one position at a time, in numpy."""
    model, counts, n_time = build(order=order, target=target, objective=objective), [3, 5], 4
    found = model.loss(make_batch(counts, n_time))
    distances = {
        "mse": np.square,
        "mae": np.abs,
        "huber": lambda d: np.where(np.abs(d) < 1, d * d / 2, np.abs(d) - 0.5),
    }
    distance = distances[objective]
    rows = []
    for window, count in zip(make_windows(counts, n_time), counts, strict=True):
        prediction = model.predict_next(window).detach().double().numpy()
        tokens, mean = window["tokens"].double().numpy(), window["mean"].double().numpy()
        if target == "patch":
            tokens = (tokens - tokens.mean(-1, keepdims=True)) / tokens.std(-1, keepdims=True)
            mean = (mean - mean.mean(-1, keepdims=True)) / mean.std(-1, keepdims=True)
        if order == "t-fastest":
            sequence = [(p, t) for p in range(count) for t in range(n_time)]
        else:
            sequence = [(p, t) for t in range(n_time) for p in range(count)]
        every, by_model, by_last, by_mean = [], [], [], []
        for position, (p, t) in enumerate(sequence[1:]):
            difference = prediction[position] - tokens[p, t]
            every.append(distance(difference).mean())
            if t >= 1:
                by_model.append(np.mean(difference**2))
                by_last.append(np.mean((tokens[p, t - 1] - tokens[p, t]) ** 2))
                by_mean.append(np.mean((mean[p] - tokens[p, t]) ** 2))
        rows.append([np.mean(errors) for errors in (every, by_model, by_last, by_mean)])
    loss, by_model, by_last, by_mean = np.mean(rows, axis=0)
    expected = {
        "loss": loss,
        "mse_model": by_model,
        "mse_persistence": by_last,
        "mse_mean": by_mean,
        "skill_persistence": 1 - by_model / by_last,
        "skill_mean": 1 - by_model / by_mean,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
def test_packed_windows_give_what_each_gives_alone(order: str) -> None:
    """Loss, gradients, embeddings and hidden states: nothing leaks from one into another."""
    model, counts = build(order=order).double(), [3, 7, 1, 5]
    torch.nn.init.normal_(model.pool.weight)
    windows = [{k: _double(v) for k, v in window.items()} for window in make_windows(counts)]
    together = pack(windows)

    def gradients(loss: Tensor) -> list[Tensor]:
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for n, p in model.named_parameters() if n != "pool.weight"]

    alone = [model.loss(window) for window in windows]
    packed = model.loss(together)
    for name in ("loss", "mse_model", "mse_persistence", "mse_mean"):
        mean = torch.stack([scalars[name] for scalars in alone]).mean()
        torch.testing.assert_close(packed[name], mean, rtol=1e-12, atol=1e-14)
    expected = gradients(torch.stack([scalars["loss"] for scalars in alone]).mean())
    for found, value in zip(gradients(packed["loss"]), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)
    for function in (model.embed, model.encode, model.predict_next):
        one_by_one = torch.cat([function(window) for window in windows])
        torch.testing.assert_close(function(together), one_by_one, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
def test_sequence_is_causal_in_its_order(order: str) -> None:
    model, windows = build(order=order), make_windows([4, 3])
    before = model.encode(pack(windows))
    windows[0]["tokens"][2, 3] += 1
    changed = (model.encode(pack(windows)) - before).abs().amax(-1) > 0
    assert not changed[4:].any()
    p, t = torch.arange(4)[:, None], torch.arange(5)
    index = 5 * p + t if order == "t-fastest" else 4 * t + p
    assert torch.equal(changed[:4], index >= index[2, 3])


def test_hidden_states_know_place_and_time() -> None:
    model, batch = build(), make_batch([4])
    before = model.encode(batch)
    batch["centers"][0, 0] += 0.1
    assert (model.encode(batch) - before)[0, 0].abs().max() > 1e-3
    code = model._position(batch["centers"], 5)
    assert (code[:, 1:] - code[:, :-1]).abs().amax(-1).min() > 1e-3


def test_position_code_is_linear_in_the_features_of_all_four_coordinates() -> None:
    model, centers = build(), make_batch([4])["centers"]
    t = ((torch.arange(5) + 0.5) / 5)[None, :, None].expand(4, 5, 1)
    space = fourier_features(centers, 4)[:, None].expand(-1, 5, -1)
    expected = model.position(torch.cat([space, fourier_features(t, 4)], dim=-1))
    torch.testing.assert_close(model._position(centers, 5), expected)


def test_fourier_features() -> None:
    features = fourier_features(torch.tensor([[0.1, 0.7]]), bands=3)
    x, y = 0.1, 0.7
    angles = [x, 2 * x, 4 * x, y, 2 * y, 4 * y]
    expected = [x, y, *map(math.sin, angles), *map(math.cos, angles)]
    torch.testing.assert_close(features, torch.tensor([expected]))
    assert fourier_features(torch.zeros(2, 4), 10).shape == (2, 84)


def test_same_seed_same_weights_and_same_loss() -> None:
    batch = make_batch([3, 5])
    first, second, other = build(1), build(1), build(2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.loss(batch)["loss"].item() == second.loss(batch)["loss"].item()
    assert first.loss(batch)["loss"].item() != other.loss(batch)["loss"].item()


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    batch, gradients = make_batch([3, 5]), []
    for checkpoint_blocks in (False, True):
        model = build(checkpoint_blocks=checkpoint_blocks)
        model.loss(batch)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_compiled_blocks_give_the_same_gradients(monkeypatch) -> None:
    """Between the scan and the chains, which stay as they are; only the kernels are not made."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(settings(), PATCH_VALUES, Compute(compile=compiled))
        for counts in ([3, 5], [4, 2]):  # a second length, for which nothing is compiled again
            model.loss(make_batch(counts))["loss"].backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_learning_rates_and_head_follow_the_width() -> None:
    scales = build(width=32, base_width=8).learning_rate_scales()
    assert set(scales.values()) == {0.25}
    names = {name.rsplit(".", 2)[-2] for name in scales}
    assert names == {"in_proj", "out_proj", "head", "pool"}
    standard = build(width=32, base_width=8, parametrization="standard")
    assert set(standard.learning_rate_scales().values()) == {1.0}
    wide = build(width=32, base_width=8)
    torch.testing.assert_close(wide.head.weight, standard.head.weight / 2)


def test_flops_are_those_of_the_products() -> None:
    # One chunk holds all steps, or the counter would see the products between chunks too.
    model, batch = build(depth=1, chunk=40), make_batch([8])
    with FlopCounterMode(display=False) as counter:
        model.predict_next(batch)
    position, convolution = 2 * (8 * 27 + 5 * 9) * 16, 2 * 40 * 4 * (32 + 8)
    assert model.flops(batch) == counter.get_total_flops() - position + convolution


def test_one_time_patch_cannot_be_forecast() -> None:
    with pytest.raises(ValueError, match=r"1 time patch.*raise the model's `volumes`"):
        build().loss(make_batch([3], n_time=1))


def test_config_refuses_a_window_of_one_time_patch() -> None:
    sections = {
        "datasets": {"d": {"derivatives": "d"}},
        "models": {"m": {"family": "neuromamba", "volumes": 2}},
        "tokens": {"time_patch": 2},
    }
    with pytest.raises(ValueError, match=r"models\.m\.volumes \(2\).*two time patches"):
        Config.model_validate(sections)


def test_skill_is_computed_from_mean_errors() -> None:
    errors = {"loss": 9.0, "mse_model": 1.0, "mse_persistence": 4.0, "mse_mean": 0.5}
    assert skills(errors) == {"skill_persistence": 0.75, "skill_mean": -1.0}
    assert skills({"loss": 1.0}) == {}
    assert math.isfinite(skills({"mse_model": 0.0, "mse_mean": 0.0})["skill_mean"])


def sines(seed: int) -> dict[str, Tensor]:
    """Each voxel a sine of its own phase: predictable, and copying the last patch is poor."""
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch([6, 6, 6, 6], n_time=8)
    t = torch.arange(8)[:, None]
    phase = 2 * math.pi * torch.rand(24, 1, 1, generator=generator)
    spread = torch.linspace(0, 2 * math.pi, PATCH_VALUES)
    batch["tokens"] = torch.sin(1.2 * t + phase + spread)
    batch["mean"] = torch.zeros_like(batch["mean"])
    return batch


def test_learns_to_forecast_sines_better_than_persistence_on_new_ones() -> None:
    model = build(width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    before = model.loss(sines(10_000))["skill_persistence"].item()
    for step in range(150):
        optimizer.zero_grad()
        model.loss(sines(step))["loss"].backward()
        optimizer.step()
    after = model.loss(sines(10_000))
    assert before < 0.5
    assert after["skill_persistence"] > 0.8
    assert after["skill_mean"] > 0.8


def test_bfloat16_autocast_on_cpu() -> None:
    model, batch = build(), make_batch([3, 5])
    expected = model.loss(batch)["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalars, embedding = model.loss(batch), model.embed(batch)
    (scalars["loss"] + embedding.sum()).backward()
    assert scalars["loss"].dtype == torch.float32
    assert scalars["loss"].item() == pytest.approx(expected, rel=0.02)
    assert embedding.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_cuda_equals_cpu() -> None:
    batch = make_batch([30, 50])
    results = {}
    for device in ("cpu", "cuda"):
        model = build().to(device)
        moved = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device, dtype=torch.bfloat16):
            model.loss(moved)["loss"].backward()
        model.zero_grad()
        loss = model.loss(moved)["loss"]
        loss.backward()
        grads = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        results[device] = [loss.detach().cpu(), *grads]
    for found, expected in zip(results["cuda"], results["cpu"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
