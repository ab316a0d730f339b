"""Pretraining that starts from the weights of a finished model."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from fake_runs import FakeStore, make_config, rows, write_dataset
from safetensors.torch import load_file, save_file

from neuromamba.checkpoint import load_model_info
from neuromamba.files import InputError, digest_file
from neuromamba.layout import Layout
from neuromamba.pretrain import run_pretrain
from neuromamba.record import seen_subjects

STEPS = {"steps": 8, "batch_size": 4, "validate_every": 4, "checkpoint_every": 4, "log_every": 2}


@pytest.fixture
def first(tmp_path, monkeypatch):
    """The folder of a pretrained model, on the subjects of another split."""
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    write_dataset(tmp_path / "first")
    run_pretrain(make_config(tmp_path / "first"), "fake", "tiny", 0)
    write_dataset(tmp_path)
    return Layout(tmp_path / "first" / "results", "fake").pretrain("tiny", 0)


def pretrain(folder: Path, start: Path | None, on_change: str = "refuse", **change) -> Path:
    settings = {**STEPS, "init_from": str(start) if start else None, **change}
    run_pretrain(make_config(folder, pretrain=settings), "fake", "tiny", 1, on_change)
    return Layout(folder / "results", "fake").pretrain("tiny", 1)


def test_the_first_step_starts_from_the_weights(tmp_path, first):
    trained = pretrain(tmp_path, first, learning_rate=1e-12, weight_decay=0.0)
    given, kept = (load_file(folder / "model.safetensors") for folder in (first, trained))
    for name, value in given.items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=1e-9)


def test_the_origin_is_on_record(tmp_path, first):
    trained = pretrain(tmp_path, first)
    info = load_model_info(trained)
    assert info["inputs"]["init_from"] == digest_file(first / "model.safetensors")
    earlier = load_model_info(first)
    assert info["pretrained_from"]["files"] == earlier["files"]
    info["subjects"] = {}
    seen = {name for part in earlier["subjects"].values() for name in part}
    assert seen_subjects(info, "fake") == seen


def test_a_model_that_moved_is_the_same_and_another_is_not(tmp_path, first):
    trained = pretrain(tmp_path, first)
    before = (trained / "model.safetensors").stat().st_mtime_ns
    shutil.copytree(first, tmp_path / "moved")
    pretrain(tmp_path, tmp_path / "moved")
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"inputs\.init_from: [0-9a-f]{64} -> unset"):
        pretrain(tmp_path, None)


def test_a_checkpoint_outranks_the_weights(tmp_path, first, monkeypatch):
    def stop(self, *arguments):
        if FakeStore.reads == 31:  # after the checkpoint, however far the data are read ahead
            raise KeyboardInterrupt
        FakeStore.reads += 1
        return normalized(self, *arguments)

    normalized = FakeStore.normalized
    write_dataset(tmp_path / "whole")
    whole = pretrain(tmp_path / "whole", first)
    with monkeypatch.context() as patch:
        patch.setattr(FakeStore, "reads", 0, raising=False)
        patch.setattr(FakeStore, "normalized", stop)
        with contextlib.suppress(KeyboardInterrupt):
            pretrain(tmp_path, first)
    stopped = Layout(tmp_path / "results", "fake").pretrain("tiny", 1)
    assert (stopped / "checkpoints" / "step-00000004").exists()
    assert not (stopped / "model.json").exists()
    trained = pretrain(tmp_path, first)
    for name in ("model.safetensors", "last.safetensors"):
        assert (trained / name).read_bytes() == (whole / name).read_bytes()
    assert rows(trained)[-1]["step"] == 8


def test_weights_that_are_not_there_or_do_not_fit_are_refused(tmp_path, first):
    with pytest.raises(InputError, match=r"nowhere/model\.json does not exist"):
        pretrain(tmp_path, tmp_path / "nowhere")
    weights = load_file(first / "model.safetensors")
    weights["head.weight"] = torch.zeros(3, 3)
    save_file(weights, first / "model.safetensors")
    with pytest.raises(InputError, match="differs from the digest"):
        pretrain(tmp_path, first)
