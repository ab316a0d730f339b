"""Checkpoints: a stopped or killed training ends in the same bits, and damage is told."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import fake_runs
import pytest
import torch
from fake_runs import SETTINGS, Toy, assert_same, failing_at, rows, samples, timeless, train
from safetensors import SafetensorError
from torch import nn

from neuromamba import checkpoint
from neuromamba.checkpoint import (
    load_model_info,
    load_weights,
)
from neuromamba.config import Optimiser
from neuromamba.files import InputError
from neuromamba.owned import OwnedFolder
from neuromamba.runtime import TRY_AGAIN


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


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints; `last` is told to be the newest."""
    names = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert (folder / "checkpoints" / "last").readlink() == Path(names[-1])
    return [int(name.removeprefix("step-")) for name in names]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(12))
    OwnedFolder(tmp_path)
    (left,) = tmp_path.glob(".tmp-*")
    (left / "1234-step-00000015").mkdir()
    (left / "1234-last").symlink_to("step-00000010")
    assert_same(train(tmp_path), whole[1])
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_signal_in_a_validation_does_not_wait_for_its_end(tmp_path, whole):
    def validation():
        for number, batch in enumerate(fake_runs.validation()):
            assert number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(SystemExit):
        train(tmp_path, validation=validation)
    assert steps_in(tmp_path) == [0, 4]
    assert not [row for row in rows(tmp_path) if row["split"] == "validation"]
    assert_same(train(tmp_path), whole[1])
    assert timeless(tmp_path) == timeless(whole[0])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_the_step_and_says_so(tmp_path, whole, name, capsys):
    class Signalled(Toy):
        steps = 0

        def loss(self, batch):
            self.steps += self.training
            if self.training and self.steps == 8:
                os.kill(os.getpid(), signal.Signals[name])
            return super().loss(batch)

    with pytest.raises(SystemExit) as stopped:
        train(tmp_path, model=Signalled())
    assert stopped.value.code == TRY_AGAIN == 75
    assert "told to stop after step 8 of 20" in capsys.readouterr().err
    # Step 8 has a validation, which is made up for when the training goes on.
    assert steps_in(tmp_path) == [5, 8]
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


def test_mended_code_goes_on_with_the_training_that_it_was_mended_for(tmp_path, whole, capsys):
    settings = Optimiser(**SETTINGS).model_dump(mode="json")
    record = {"settings": settings, "inputs": {"split": "a"}}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8), record=record | {"code": {"train.py": "a"}})
    again = train(tmp_path, record=record | {"code": {"train.py": "b"}}, on_change="restart")
    assert_same(again, whole[1])
    assert "going on with other code (train.py)" in capsys.readouterr().err


def test_restart_continues_an_unchanged_training(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8))

    def from_step_5(first, size):
        return samples(first, size) if first >= 5 * size else 1 / 0

    train(tmp_path, training=from_step_5, on_change="restart")


DAMAGE = [
    lambda folder: (folder / "state.json").write_text("{"),
    lambda folder: (folder / "state.json").unlink(),
    lambda folder: (folder / "optimizer.safetensors").unlink(),
    lambda folder: (folder / "best.safetensors").write_bytes(b"1234"),
    lambda folder: os.truncate(folder / "model.safetensors", 200),
    lambda folder: flip_bit(folder / "model.safetensors"),
    lambda folder: (folder / "metrics.jsonl").write_text(""),
]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, whole, damage, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(13))
    damage(tmp_path / "checkpoints" / "step-00000010")
    capsys.readouterr()
    read = []

    def training(first, size):
        read.append(first)
        return samples(first, size)

    again = train(tmp_path, training=training)
    assert min(read) == 4 * 5
    told = capsys.readouterr().err
    assert "step-00000010: the checkpoint is damaged (" in told
    assert "going on from the one before, step-00000005" in told
    assert_same(again, whole[1])
    assert timeless(tmp_path) == timeless(whole[0])


def test_without_a_whole_checkpoint_the_cure_is_told(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(13))
    for path, damage in zip((tmp_path / "checkpoints").glob("step-*"), DAMAGE, strict=False):
        damage(path)
    with pytest.raises(InputError) as error:
        train(tmp_path)
    for step in (5, 10):
        assert f"step-{step:08d}: the checkpoint is damaged (" in str(error.value)
    assert f"remove {tmp_path / 'checkpoints'} to train from the start" in str(error.value)


@pytest.mark.parametrize(("keep", "kept"), [(1, [15]), (2, [10, 15]), (9, [0, 5, 10, 15])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, kept):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(18), keep_checkpoints=keep)
    assert steps_in(tmp_path) == kept


def test_snapshots_are_models_of_their_own_and_stay(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(13), keep_every=5)
    snapshots = tmp_path / "snapshots"
    for step in (5, 10):
        snapshot = (snapshots / f"step-{step:08d}" / "model.safetensors").read_bytes()
        checkpoint = tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
        assert snapshot == checkpoint.read_bytes()
    model, fitted = train(tmp_path, keep_every=5)
    assert_same((model, fitted), whole[1])
    names = [f"step-{step:08d}" for step in (5, 10, 15, 20)]
    assert sorted(path.name for path in snapshots.iterdir()) == names
    assert load_model_info(snapshots / names[1])["step"] == 10
    load_weights(model, snapshots / names[3])
    assert all(torch.equal(model.state_dict()[name], fitted.last[name]) for name in fitted.last)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(5), keep_every=6, on_change="restart")
    assert not snapshots.exists()


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
    assert steps_in(tmp_path) == [0, 5]
    monkeypatch.undo()
    assert_same(train(tmp_path), whole[1])


def test_a_checkpoint_of_another_model_names_what_is_missing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, training=failing_at(8))
    wider = Toy()
    wider.layers.append(nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"checkpoints does not fit .* missing layers\.5\.weight"):
        train(tmp_path, model=wider)
