"""The NeuroMamba family: its contract, its loss by hand, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from neuromamba.config.schema import Config, NeuroMamba
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


def make_batch(counts: list[int], n_time: int = 5, padding: int = 0) -> dict[str, Tensor]:
    """Runs of `counts` patches each; a run's values depend on its place in the list only."""
    patches = max(counts) + padding
    batch = {
        "tokens": torch.zeros(len(counts), patches, n_time, PATCH_VALUES),
        "patch_mask": torch.zeros(len(counts), patches, dtype=torch.bool),
        "centers": torch.zeros(len(counts), patches, 3),
        "mean": torch.zeros(len(counts), patches, PATCH_VALUES),
    }
    for index, count in enumerate(counts):
        generator = torch.Generator().manual_seed(index)
        batch["tokens"][index, :count] = torch.randn(
            count, n_time, PATCH_VALUES, generator=generator
        )
        batch["patch_mask"][index, :count] = True
        batch["centers"][index, :count] = torch.rand(count, 3, generator=generator)
        batch["mean"][index, :count] = torch.randn(count, PATCH_VALUES, generator=generator)
    return batch


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
    assert model.encode(batch).shape == (2, 25, 16)
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
    torch.testing.assert_close(model.embed(batch), model.encode(batch).mean(1))


def test_pooling_weights_belong_to_positions_and_groups_of_channels() -> None:
    model, batch = build(), make_batch([3, 5])
    torch.nn.init.normal_(model.pool.weight)
    hidden, embedding = model.encode(batch), model.embed(batch)
    heads, n_time = model.pool.out_features, batch["tokens"].shape[2]
    for row, count in enumerate([3, 5]):
        h = hidden[row, : count * n_time]
        weights = model.pool(h).softmax(0)
        groups = h.chunk(heads, dim=1)
        expected = [weights[:, k] @ group for k, group in enumerate(groups)]
        torch.testing.assert_close(embedding[row], torch.cat(expected))


def test_loss_by_hand() -> None:
    """The definitions, one position at a time, in numpy."""
    model, counts, n_time = build(), [3, 5], 4
    batch = make_batch(counts, n_time)
    prediction = model.head(model.encode(batch)).detach().double().numpy()
    tokens, mean = batch["tokens"].double().numpy(), batch["mean"].double().numpy()
    every, by_model, by_last, by_mean = [], [], [], []
    for run, count in enumerate(counts):
        sequence = [(p, t) for p in range(count) for t in range(n_time)]
        for position, (p, t) in enumerate(sequence):
            if position == 0:
                continue
            target = tokens[run, p, t]
            error = np.mean((prediction[run, position - 1] - target) ** 2)
            every.append(error)
            if t >= 1:
                by_model.append(error)
                by_last.append(np.mean((tokens[run, p, t - 1] - target) ** 2))
                by_mean.append(np.mean((mean[run, p] - target) ** 2))
    expected = {
        "loss": np.mean(every),
        "mse_model": np.mean(by_model),
        "mse_persistence": np.mean(by_last),
        "mse_mean": np.mean(by_mean),
        "skill_persistence": 1 - np.mean(by_model) / np.mean(by_last),
        "skill_mean": 1 - np.mean(by_model) / np.mean(by_mean),
    }
    found = {name: value.item() for name, value in model.loss(batch).items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_does_not_depend_on_batch_mates_or_padding() -> None:
    model, counts = build().double(), [3, 7, 5]
    together = model.embed({k: _double(v) for k, v in make_batch(counts, padding=4).items()})
    batch = make_batch(counts)
    for index, count in enumerate(counts):
        one = {k: _double(v[index : index + 1, :count]) for k, v in batch.items()}
        torch.testing.assert_close(model.embed(one)[0], together[index], rtol=1e-12, atol=1e-12)


def test_padding_is_not_in_the_loss() -> None:
    model, batch = build(), make_batch([3, 5])
    plain = model.loss(batch)
    padded = make_batch([3, 5], padding=6)
    padded["tokens"][~padded["patch_mask"]] = 1e3
    padded["mean"][~padded["patch_mask"]] = -1e3
    for name, value in model.loss(padded).items():
        torch.testing.assert_close(value, plain[name], msg=name)


def test_sequence_is_causal_with_time_fastest() -> None:
    model, batch = build(), make_batch([4], n_time=5)
    before = model.encode(batch)
    batch["tokens"][0, 2, 3] += 1
    changed = (model.encode(batch) - before)[0].abs().amax(-1) > 0
    first = 2 * 5 + 3
    assert not changed[:first].any()
    assert changed[first:].all()


def test_hidden_states_know_place_and_time() -> None:
    model, batch = build(), make_batch([4])
    before = model.encode(batch)
    batch["centers"][0, 0, 0] += 0.1
    assert (model.encode(batch) - before)[0, 0].abs().max() > 1e-3
    code = model._position(batch["centers"], 5)
    assert (code[0, :, 1:] - code[0, :, :-1]).abs().amax(-1).min() > 1e-3


def test_position_code_is_linear_in_the_features_of_all_four_coordinates() -> None:
    model, centers = build(), make_batch([4])["centers"]
    t = ((torch.arange(5) + 0.5) / 5)[None, None, :, None].expand(1, 4, 5, 1)
    space = fourier_features(centers, 4)[:, :, None].expand(-1, -1, 5, -1)
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
    phase = 2 * math.pi * torch.rand(4, 6, 1, 1, generator=generator)
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
        results[device] = [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]
    for found, expected in zip(results["cuda"], results["cpu"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
