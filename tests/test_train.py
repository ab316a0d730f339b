from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_runs import FakeStore, make_config, write_dataset
from safetensors import SafetensorError
from torch import nn

from neuromamba import checkpoint
from neuromamba.checkpoint import (
    differences,
    finished,
    load_model_info,
    load_weights,
    save_model,
    seen_subjects,
)
from neuromamba.config import Optimiser
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.optimiser import learning_rate, make_optimizer
from neuromamba.pretrain import run_pretrain
from neuromamba.runtime import STOPPED, choose_device
from neuromamba.train import fit

CPU = torch.device("cpu")
SETTINGS = {
    "steps": 20,
    "batch_size": 4,
    "learning_rate": 0.01,
    "warmup_steps": 3,
    "log_every": 3,
    "validate_every": 4,
    "checkpoint_every": 5,
}


class Toy(nn.Module):
    """Learns to add, through dropout, so that its steps depend on the generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.3), nn.LayerNorm(16), nn.Linear(16, 1)
        )

    def loss(self, batch):
        mse = (self.layers(batch["x"])[:, 0] - batch["y"]).square().mean()
        return {"loss": mse, "mse_model": mse, "mse_zero": batch["y"].square().mean()}


def batch_of(number: int, size: int = 4) -> dict:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(number))
    return {"x": x, "y": x.sum(1), "run": [f"run-{number}-{k}" for k in range(size)]}


def validation() -> list[dict]:
    return [batch_of(10_000), batch_of(10_001, 2)]


def train(
    folder: Path, *, model=None, training=batch_of, on_change="refuse", record=None, **change
):
    settings = Optimiser(**{**SETTINGS, **change})
    record = record or {"settings": settings.model_dump(mode="json"), "inputs": {"split": "a"}}
    model = model or Toy()
    best = fit(
        model,
        settings,
        training,
        validation,
        folder,
        record,
        seed=7,
        device=CPU,
        on_change=on_change,
    )
    return model, best


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def timeless(folder: Path) -> list[dict]:
    times = ("seconds", "samples_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in rows(folder)]


def assert_same(one, other):
    (model, best), (model2, best2) = one, other
    for tensors, tensors2 in (
        (model.state_dict(), model2.state_dict()),
        (best.weights, best2.weights),
    ):
        assert tensors.keys() == tensors2.keys()
        assert all(torch.equal(tensors[name], tensors2[name]) for name in tensors)
    assert (best.step, best.validation) == (best2.step, best2.validation)


def failing_at(number: int):
    def training(n):
        if n == number:
            raise KeyboardInterrupt
        return batch_of(n)

    return training


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The training that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


@pytest.mark.parametrize("stop", [2, 5, 11, 12, 19])
def test_a_stopped_training_ends_in_the_same_bits(tmp_path, whole, stop):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(stop))
    again = train(tmp_path)
    assert_same(again, whole[1])
    assert timeless(tmp_path) == timeless(whole[0])


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(13))
    assert rows(tmp_path)[-1]["step"] > 10
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "torn')
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(10))
    found = rows(tmp_path)
    assert max(row["step"] for row in found) <= 10
    assert found


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train import Toy, train

class Stopped(Toy):
    steps = 0

    def loss(self, batch):
        self.steps += self.training
        if self.training and self.steps == {step}:
            {action}
        return super().loss(batch)

train(Path(sys.argv[1]), model=Stopped())
"""
SIGKILL = "os.kill(os.getpid(), signal.SIGKILL)"
SIGTERM = "os.kill(os.getpid(), signal.SIGTERM)"


def run_script(folder: Path, step: int, action: str) -> subprocess.CompletedProcess:
    script = SCRIPT.format(tests=str(Path(__file__).parent), step=step, action=action)
    command = [sys.executable, "-c", script, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_killed_process_continues_to_the_same_bits(tmp_path, whole):
    done = run_script(tmp_path, 12, SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (tmp_path / "checkpoints" / ".tmp-left-over").mkdir()
    assert [path.name for path in (tmp_path / "checkpoints").glob("step*")] == ["step-00000010"]
    again = train(tmp_path)
    assert_same(again, whole[1])
    assert timeless(tmp_path) == timeless(whole[0])
    assert not (tmp_path / "checkpoints" / ".tmp-left-over").exists()


def test_sigterm_saves_the_step_and_says_so(tmp_path, whole):
    done = run_script(tmp_path, 8, SIGTERM)
    assert done.returncode == STOPPED, done.stderr
    assert "the same command continues" in done.stderr
    # Step 8 has a validation, which is made up for when the training goes on.
    assert [path.name for path in (tmp_path / "checkpoints").glob("step*")] == ["step-00000008"]
    assert_same(train(tmp_path), whole[1])
    assert timeless(tmp_path) == timeless(whole[0])


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8))
    with pytest.raises(InputError) as error:
        train(tmp_path, learning_rate=0.5)
    assert "learning_rate: 0.01 -> 0.5" in str(error.value)
    assert "--on-change restart" in str(error.value)
    assert "warmup_steps" not in str(error.value)


def test_changed_inputs_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8))
    settings = Optimiser(**SETTINGS).model_dump(mode="json")
    with pytest.raises(InputError, match=r"inputs\.split: a -> b"):
        train(tmp_path, record={"settings": settings, "inputs": {"split": "b"}})


def test_restart_trains_from_the_start(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "one", training=failing_at(8))
    again = train(tmp_path / "one", on_change="restart", learning_rate=0.5)
    assert_same(again, train(tmp_path / "two", learning_rate=0.5))
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")


def test_restart_continues_an_unchanged_training(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8))
    train(tmp_path, training=lambda n: batch_of(n) if n >= 5 else 1 / 0, on_change="restart")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        lambda folder: (folder / "best.safetensors").write_bytes(b"1234"),
        lambda folder: os.truncate(folder / "model.safetensors", 200),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_cure(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8))
    damage(tmp_path / "checkpoints" / "step-00000005")
    with pytest.raises(InputError, match="step-00000005: the checkpoint is damaged") as error:
        train(tmp_path)
    assert f"remove {tmp_path / 'checkpoints'} to train from the start" in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(tmp_path, whole, monkeypatch, error):
    write = checkpoint._write_tensors

    def full_after_step_5(path, tensors):
        if "step-00000010" in str(path) and path.stem == "optimizer":
            raise error
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "_write_tensors", full_after_step_5)
    with pytest.raises(InputError, match="the disk is full; free some space"):
        train(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    assert_same(train(tmp_path), whole[1])


def test_a_checkpoint_of_another_model_names_what_is_missing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8))
    wider = Toy()
    wider.layers.append(nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"checkpoints does not fit .* missing layers\.5\.weight"):
        train(tmp_path, model=wider)


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


def test_a_loss_that_is_not_finite_stops_with_step_and_runs(tmp_path):
    def training(n):
        batch = batch_of(n)
        return {**batch, "y": batch["y"] * float("nan")} if n == 8 else batch

    with pytest.raises(InputError) as error:
        train(tmp_path, training=training)
    message = str(error.value)
    assert "loss is nan in step 9" in message
    assert "run-8-0" in message
    assert "the checkpoint of step 5 is kept" in message
    assert (tmp_path / "checkpoints" / "step-00000005" / "state.json").exists()


def test_the_best_weights_are_those_of_the_lowest_validation_loss(tmp_path):
    model, best = train(tmp_path, learning_rate=0.3, steps=40)
    losses = {row["step"]: row["loss"] for row in rows(tmp_path) if row["split"] == "validation"}
    assert list(losses) == list(range(4, 41, 4))
    assert best.step == min(losses, key=losses.get)
    assert best.validation["loss"] == min(losses.values())
    model.load_state_dict(best.weights)
    model.eval()
    with torch.no_grad():
        values = [float(model.loss(batch)["loss"]) for batch in validation()]
    assert (4 * values[0] + 2 * values[1]) / 6 == pytest.approx(best.validation["loss"])


def test_rows_hold_scalars_skill_rate_and_speed(whole):
    found = rows(whole[0])
    trained = [row for row in found if row["split"] == "train"]
    assert [row["step"] for row in trained] == [3, 6, 9, 12, 15, 18, 20]
    for row in found:
        assert row["skill_zero"] == pytest.approx(1 - row["mse_model"] / row["mse_zero"])
    assert {"lr", "grad_norm", "seconds", "samples_per_second"} <= trained[0].keys()
    assert trained[0]["lr"] == pytest.approx(0.01)


def test_skill_is_of_averages_and_not_an_average(tmp_path):
    train(tmp_path, steps=2, log_every=2, batch_size=1, training=lambda n: batch_of(n, 1))
    (row,) = [row for row in rows(tmp_path) if row["split"] == "train"]
    targets = [float(batch_of(n, 1)["y"].square()) for n in range(2)]
    assert row["mse_zero"] == pytest.approx(sum(targets) / 2)
    assert row["skill_zero"] == pytest.approx(1 - row["mse_model"] / (sum(targets) / 2))


def test_bfloat16_trains(tmp_path):
    _, best = train(tmp_path, precision="bfloat16")
    assert all(value.dtype == torch.float32 for value in best.weights.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(InputError, match=r"compute.device is cuda"):
        choose_device("cuda")


# --- Finished models ----------------------------------------------------------------------------

RECORD = {"settings": {"a": {"b": 1, "c": [1, 2]}}, "inputs": {"split": "x"}}


def test_a_model_is_whole_only_with_its_own_weights(tmp_path):
    with pytest.raises(InputError, match="has not finished"):
        load_model_info(tmp_path)
    model = Toy()
    save_model(tmp_path, model.state_dict(), RECORD)
    info = load_model_info(tmp_path)
    assert info["settings"] == RECORD["settings"]
    assert info["versions"]["torch"] == torch.__version__
    other = Toy()
    nn.init.ones_(model.layers[0].weight)
    load_weights(other, tmp_path)
    assert torch.equal(other.layers[0].weight, Toy().layers[0].weight)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    with pytest.raises(InputError, match="differs from the digest"):
        load_model_info(tmp_path)


def test_weights_that_do_not_fit_are_reported_by_name(tmp_path):
    weights = Toy().state_dict()
    weights["layers.9.weight"] = weights.pop("layers.4.bias")
    weights["layers.0.weight"] = torch.zeros(2, 2)
    save_model(tmp_path, weights, RECORD)
    with pytest.raises(InputError) as error:
        load_weights(Toy(), tmp_path)
    for part in (
        "missing layers.4.bias",
        "unexpected layers.9.weight",
        "layers.0.weight is (2, 2), not (16, 6)",
    ):
        assert part in str(error.value)


def test_a_finished_model_of_other_settings_is_refused_or_removed(tmp_path):
    save_model(tmp_path, Toy().state_dict(), RECORD)
    assert finished(tmp_path, RECORD, "refuse")
    changed = {**RECORD, "settings": {"a": {"b": 2, "c": [1, 2]}}}
    with pytest.raises(InputError, match=r"a\.b: 1 -> 2"):
        finished(tmp_path, changed, "refuse")
    assert not finished(tmp_path, changed, "restart")
    assert not (tmp_path / "model.json").exists()


def test_differences_name_keys_that_came_and_went():
    new = {"settings": {"a": {"c": [1, 2]}, "d": None}, "inputs": {"split": "x"}}
    assert differences(RECORD, new) == ["a.b: 1 -> unset", "d: unset -> None"]


def test_seen_subjects_include_those_of_the_model_before():
    earlier = {"subjects": {"train": ["sub-1"], "validation": ["sub-2"]}}
    info = {"subjects": {"train": ["sub-3"], "validation": []}, "pretrained_from": earlier}
    assert seen_subjects(info) == {"sub-1", "sub-2", "sub-3"}


# --- Pretraining --------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    return write_dataset(tmp_path)


def test_pretraining_writes_a_model_and_never_opens_a_test_subject(tmp_path, fake):
    config = make_config(tmp_path)
    run_pretrain(config, "fake", "tiny", 0)
    opened = {run.split("_")[0] for run in FakeStore.opened}
    assert opened == {*fake["train"], *fake["validation"]}
    folder = Layout(tmp_path / "results", "fake").pretrain("tiny", 0)
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
    ]
    info = load_model_info(folder)
    assert info["subjects"] == {part: fake[part] for part in ("train", "validation")}
    assert info["step"] == 8
    assert info["best"]["loss"] == min(
        row["loss"] for row in rows(folder) if row["split"] == "validation"
    )
    assert {"skill_persistence", "skill_mean"} <= rows(folder)[0].keys()


def test_pretraining_is_a_function_of_its_seed(tmp_path, fake):
    digests = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(tmp_path / folder)
        run_pretrain(make_config(tmp_path / folder), "fake", "tiny", seed)
        model = Layout(tmp_path / folder / "results", "fake").pretrain("tiny", seed)
        digests.append(load_model_info(model)["files"]["model.safetensors"])
    assert digests[0] == digests[1] != digests[2]


def test_a_stopped_pretraining_ends_in_the_same_bits(tmp_path, fake, monkeypatch):
    weights = []
    for folder, reads in (("whole", 10**9), ("stopped", 25)):
        write_dataset(tmp_path / folder)
        config = make_config(tmp_path / folder)
        with monkeypatch.context() as patch:
            patch.setattr(FakeStore, "normalized", _failing_after(reads))
            with contextlib.suppress(KeyboardInterrupt):
                run_pretrain(config, "fake", "tiny", 0)
        model = Layout(tmp_path / folder / "results", "fake").pretrain("tiny", 0)
        if folder == "stopped":
            assert (model / "checkpoints" / "step-00000004").exists()
            assert not (model / "model.json").exists()
            run_pretrain(config, "fake", "tiny", 0)
        weights.append((model / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def _failing_after(reads: int):
    original, counts = FakeStore.normalized, itertools.count()

    def normalized(self, *arguments):
        if next(counts) == reads:
            raise KeyboardInterrupt
        return original(self, *arguments)

    return normalized


def test_a_finished_pretraining_is_left_as_it_is(tmp_path, fake, capsys):
    config = make_config(tmp_path)
    run_pretrain(config, "fake", "tiny", 0)
    weights = Layout(tmp_path / "results", "fake").pretrain("tiny", 0) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run_pretrain(config, "fake", "tiny", 0)
    assert weights.stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().err


def test_a_finished_pretraining_of_other_settings(tmp_path, fake):
    run_pretrain(make_config(tmp_path), "fake", "tiny", 0)
    changed = make_config(tmp_path, depth=2)
    with pytest.raises(InputError, match=r"model\.depth: 1 -> 2"):
        run_pretrain(changed, "fake", "tiny", 0)
    run_pretrain(changed, "fake", "tiny", 0, on_change="restart")
    folder = Layout(tmp_path / "results", "fake").pretrain("tiny", 0)
    assert load_model_info(folder)["settings"]["model"]["depth"] == 2


def test_validation_subjects_without_runs_are_refused(tmp_path, fake):
    for batch in range(2):
        path = Layout(tmp_path / "results", "fake").manifest("tokens", batch)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(x for x in lines if not x.startswith(("sub-01", "sub-02"))))
    with pytest.raises(InputError, match="part 'validation' has a usable run"):
        run_pretrain(make_config(tmp_path), "fake", "tiny", 0)
