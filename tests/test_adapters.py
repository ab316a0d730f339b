"""Low-rank adapters: what learns, what stays, and that a saved model knows nothing of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_runs import FakeStore, make_config, write_dataset
from safetensors.torch import load_file
from torch import nn

from neuromamba import batches
from neuromamba.adapters import LowRank, add_adapters, merge_adapters, remove_adapters
from neuromamba.batches import Windows
from neuromamba.checkpoint import load_model_info
from neuromamba.config import Adapters, Finetune, NeuroMamba
from neuromamba.files import InputError
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.heads import HeadedModel, NumberHead
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.optimiser import make_optimizer
from neuromamba.pretrain import run_pretrain
from neuromamba.stage_settings import relevant_settings

ADAPTERS = Adapters(rank=3, alpha=6.0)
SMALL = {"family": "neuromamba", "width": 16, "depth": 2, "state": 4, "head_dim": 8}


def headed(**change) -> HeadedModel:
    torch.manual_seed(0)
    backbone = build_model(NeuroMamba(**{**SMALL, **change}), 16)
    return HeadedModel(backbone, NumberHead(0.0, 1.0), 0.0, frozen=True)


def adapted(**change) -> HeadedModel:
    """A model whose adapters and head have learnt something."""
    model = headed(**change)
    add_adapters(model.backbone, ADAPTERS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    return model


def batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(7, 3, 16, generator=generator)
    centers = torch.rand(7, 3, generator=generator)
    label = torch.tensor([1.0, -1.0])
    return {"tokens": tokens, "centers": centers, "patches": torch.tensor([3, 4]), "label": label}


class Attention(nn.Module):
    """A family of another kind: a transformer with a decoder's head."""

    needs, width = ("x",), 8

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.Linear(8, 4))

    def embed(self, batch):
        return self.norm(self.encoder(batch["x"]).mean(1))


# --- What learns --------------------------------------------------------------------------------


def test_the_start_is_the_pretrained_model():
    model = headed()
    before = model.features(batch())
    add_adapters(model.backbone, ADAPTERS)
    assert torch.equal(model.features(batch()), before)


def test_adapters_the_pool_and_the_head_learn_and_nothing_else():
    model = headed()
    linear = {
        name: module.weight.shape
        for name, module in model.backbone.named_modules()
        if isinstance(module, nn.Linear) and name not in ("head", "pool")
    }
    add_adapters(model.backbone, ADAPTERS)
    assert len(linear) == 2 + 2 * 2
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {"backbone.pool.weight", "head.1.weight", "head.1.bias"}
    assert set(learning) - own == {
        f"backbone.{name}.parametrizations.weight.0.{part}"
        for name in linear
        for part in ("up", "down")
    }
    count = sum(3 * sum(shape) for shape in linear.values())
    assert sum(p.numel() for p in learning.values()) == count + 8 * 16 + 16 + 1


def test_frozen_weights_do_not_move_in_training():
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, Finetune(learning_rate=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model.train().loss(batch())["loss"].backward()
        optimizer.step()
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_layer_that_is_narrower_than_the_rank_gets_no_more_than_it_has():
    layer = nn.Linear(2, 5)
    add_adapters(nn.Sequential(layer), Adapters(rank=4, alpha=8.0))
    change = layer.parametrizations["weight"][0]
    assert (change.up.shape, change.down.shape, change.scale) == ((5, 2), (2, 2), 2.0)


def test_alpha_is_over_rank():
    weight = torch.randn(4, 6)
    change = LowRank(weight, Adapters(rank=2, alpha=10.0), 1.0)
    nn.init.normal_(change.up)
    torch.testing.assert_close(change(weight), weight + 5 * change.up @ change.down)


def test_learning_rates_follow_the_width_where_the_layer_s_do():
    model = headed(width=32, base_width=8, parametrization="mup")
    add_adapters(model.backbone, ADAPTERS)
    scales = model.learning_rate_scales()
    names = {name for name, _ in model.named_parameters()}
    assert set(scales) <= names
    layer = "backbone.blocks.1.mixer.{}.parametrizations.weight.0.down"
    assert scales[layer.format("in_proj")] == scales[layer.format("out_proj")] == 0.25
    assert scales["backbone.pool.weight"] == 0.25
    assert scales["backbone.embedding.parametrizations.weight.0.down"] == 1.0
    assert not any(name.endswith(".up") for name in scales)
    groups = make_optimizer(model, Finetune(learning_rate=0.1)).param_groups
    assert {group["scale"] for group in groups} == {0.25, 1.0}


# --- Merged -------------------------------------------------------------------------------------


def test_merged_weights_predict_the_same_to_the_bit():
    model, plain = adapted(), headed()
    plain.load_state_dict(merge_adapters(model.state_dict()))
    assert not torch.equal(plain.features(batch()), headed().features(batch()))
    predicted = [one.predict_features(one.features(batch())) for one in (plain, model)]
    assert torch.equal(*predicted)
    assert merge_adapters(plain.state_dict()).keys() == headed().state_dict().keys()


def test_removed_adapters_leave_the_weights_of_before():
    model = adapted()
    remove_adapters(model)
    fresh = headed().backbone.state_dict()
    after = model.backbone.state_dict()
    assert after.keys() == fresh.keys()
    assert all(torch.equal(after[n], fresh[n]) for n in fresh if n != "pool.weight")


def test_what_is_merged_was_trained_under_autocast_too():
    change = LowRank(torch.randn(8, 8), ADAPTERS, 1.0)
    nn.init.normal_(change.up)
    weight = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = change(weight)
    assert torch.equal(found, change(weight))


def test_any_family_can_be_adapted():
    torch.manual_seed(0)
    model = HeadedModel(Attention(), NumberHead(0.0, 1.0), 0.0, frozen=True)
    add_adapters(model.backbone, ADAPTERS)
    inputs = {"x": torch.randn(6, 5, 8), "label": torch.randn(6)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nn.init.normal_(model.head[1].weight)
    optimizer = make_optimizer(model, Finetune(learning_rate=0.01))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(model.train().loss(inputs)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    # Statistics of normalisation layers, which no gradient moves, stay as well.
    for name, value in model.state_dict().items():
        assert ("parametrizations.weight.0" in name or name.startswith("head.")) or torch.equal(
            value, before[name]
        ), name
    torch.manual_seed(0)
    plain = HeadedModel(Attention(), NumberHead(0.0, 1.0), 0.0, frozen=True).eval()
    plain.load_state_dict(merge_adapters(model.state_dict()))
    with torch.no_grad():
        one, other = (of.predict_features(of.features(inputs)) for of in (plain, model.eval()))
        torch.testing.assert_close(one, other)


# --- What else a block goes through ---------------------------------------------------------------


def gradients(model: HeadedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train().loss(batch())["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_blocks_give_the_same_gradients():
    plain, saving = gradients(adapted()), gradients(adapted(checkpoint_blocks=True))
    assert sum(".0.down" in name for name in plain) == 6
    assert plain.keys() == saving.keys()
    assert all(torch.equal(plain[name], saving[name]) for name in plain)


def test_compiled_blocks_see_the_adapters():
    model = adapted()
    expected = gradients(model)
    torch._dynamo.reset()
    for block in model.backbone.blocks:
        block.compile(dynamic=True, backend="aot_eager")
    found = gradients(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


# --- In the pipeline ------------------------------------------------------------------------------

MODE = {
    "mode": "adapters",
    "adapters": {"rank": 4, "alpha": 8.0},
    "steps": 40,
    "batch_size": 4,
    "learning_rate": 0.02,
    "evaluation_windows": 3,
    "validate_every": 10,
    "validation_windows": 3,
    "log_every": 10,
    "checkpoint_every": 4,
    "ema": 0.9,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two pretrained models, and their fine-tunings."""
    folder = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromamba.batches.TokenStore", FakeStore)
        parts = write_dataset(folder)
        config = make_config(folder, finetune=MODE)
        for seed in (0, 1):
            run_pretrain(config, "fake", "tiny", seed)
            run_finetune(config, "fake", "tiny", seed, "sex")
        yield folder, parts


@pytest.fixture
def tuned(made, monkeypatch):
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    monkeypatch.setattr(FakeStore, "poisoned", set())
    return made


def folder_of(folder: Path, seed: int = 0) -> Path:
    return Layout(folder / "results", "fake").finetune("tiny", seed, "sex")


def weights_of(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder_of(folder, seed) / "model.safetensors")


@pytest.mark.parametrize("seed", [0, 1])
def test_they_learn_an_effect_that_is_there(tuned, seed):
    folder, parts = tuned
    people = parts["test"] + parts["validation"]
    config = make_config(folder, finetune=MODE)
    table = predict_subjects(config, "fake", "tiny", seed, "sex", people)
    odd = np.array([int(name[4:]) % 2 for name in people])
    assert ((table["prob_female"] > 0.5) == odd).all()
    pretrain = Layout(folder / "results", "fake").pretrain("tiny", seed) / "model.safetensors"
    before, after = load_file(pretrain), weights_of(folder, seed)
    changed = {name for name in before if not torch.equal(after[f"backbone.{name}"], before[name])}
    layers = ("embedding", "position", "blocks.0.mixer.in_proj", "blocks.0.mixer.out_proj")
    assert changed == {f"{name}.weight" for name in (*layers, "pool")}
    for name in layers:
        difference = after[f"backbone.{name}.weight"] - before[f"{name}.weight"]
        assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 4


def test_the_saved_model_has_no_adapters(tuned):
    folder, _ = tuned
    last = load_file(folder_of(folder) / "last.safetensors")
    for weights in (weights_of(folder), last):
        assert not any("parametrizations" in name for name in weights)
    info = load_model_info(folder_of(folder))
    assert info["settings"]["finetune"]["adapters"] == {"rank": 4, "alpha": 8.0}
    plain = sum(v.numel() for n, v in last.items() if n not in ("center", "scale", "task.weights"))
    assert info["parameters"] == plain
    assert info["trained_parameters"] < plain


def test_a_stopped_training_ends_in_the_same_bits(tuned, tmp_path, monkeypatch):
    folder, _ = tuned
    write_dataset(tmp_path)
    config = make_config(tmp_path, finetune=MODE)
    run_pretrain(config, "fake", "tiny", 0)
    training_batch = Windows.training_batch

    def stopped(self, seed, first, size):
        if first == 22 * size:
            raise KeyboardInterrupt
        return training_batch(self, seed, first, size)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "training_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(config, "fake", "tiny", 0, "sex")
    assert (folder_of(tmp_path) / "checkpoints" / "step-00000020").is_dir()
    run_finetune(config, "fake", "tiny", 0, "sex")
    for name in ("model.safetensors", "last.safetensors"):
        assert (folder_of(tmp_path) / name).read_bytes() == (folder_of(folder) / name).read_bytes()


def test_a_calibration_that_was_lost_is_made_again(tuned, monkeypatch, capsys):
    folder, _ = tuned
    config = make_config(folder, finetune=MODE)
    before = weights_of(folder, 1)
    path = folder_of(folder, 1)
    info = json.loads((path / "model.json").read_text())
    files = {n: v for n, v in info["files"].items() if not n.startswith("calibration")}
    (path / "model.json").write_text(json.dumps({**info, "files": files}))
    capsys.readouterr()
    run_finetune(config, "fake", "tiny", 1, "sex")
    assert "steps:" not in capsys.readouterr().err
    assert load_model_info(path)["files"] == info["files"]
    assert all(torch.equal(v, before[n]) for n, v in weights_of(folder, 1).items())


def test_other_adapters_are_another_training_and_of_no_concern_to_other_modes(tuned):
    folder, _ = tuned
    config = make_config(folder, finetune={**MODE, "adapters": {"rank": 2}})
    with pytest.raises(InputError, match=r"finetune\.adapters\.rank: 4 -> 2"):
        run_finetune(config, "fake", "tiny", 0, "sex")
    for mode in ("full", "head", "probe"):
        found = [
            relevant_settings(Finetune(mode=mode, adapters=Adapters(rank=rank))) for rank in (2, 4)
        ]
        assert found[0] == found[1]
        assert found[0]["mode"] == mode


# --- Two processes --------------------------------------------------------------------------------


def tune_all(folder: Path) -> None:
    """Pretrain, and fine-tune by adapters and by a probe."""
    batches.TokenStore = FakeStore
    run_pretrain(make_config(folder), "fake", "tiny", 0)
    for mode, target in (("adapters", "sex"), ("probe", "age")):
        config = make_config(folder, finetune={**MODE, "mode": mode, "steps": 6})
        run_finetune(config, "fake", "tiny", 0, target)


def tune_together(rank: int, port: int, folder: Path) -> None:
    """One of two processes that do `tune_all`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tune_all(folder)


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "TokenStore", FakeStore)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_dataset(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pair = [context.Process(target=tune_together, args=(rank, port, two)) for rank in (0, 1)]
    for process in pair:
        process.start()
    tune_all(one)
    for process in pair:
        process.join(120)
        assert process.exitcode == 0
    for target in ("sex", "age"):
        paths = [Layout(f / "results", "fake").finetune("tiny", 0, target) for f in (one, two)]
        assert load_model_info(paths[1])["processes"] == 2
        first, second = (load_file(path / "model.safetensors") for path in paths)
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4, msg=name)
