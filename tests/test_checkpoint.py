"""Checkpoints: a stopped or killed training ends in the same bits, and damage is told."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_runs import SETTINGS, Toy, batch_of, rows, train
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
from neuromamba.runtime import STOPPED


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
from fake_runs import Toy, train

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


# --- Finished models ------------------------------------------------------------------------------


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
