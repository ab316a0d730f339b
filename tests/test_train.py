"""Training: what is logged, which weights are kept, and pretraining from end to end."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from fake_runs import (
    FakeStore,
    Toy,
    assert_same,
    failing_at,
    make_config,
    rows,
    samples,
    train,
    validation,
    write_dataset,
)

from neuromamba import pretrain
from neuromamba.checkpoint import load_model_info
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.pretrain import run_pretrain
from neuromamba.runtime import choose_device


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
    assert {"lr", "grad_norm", "seconds"} <= trained[0].keys()
    assert trained[0]["lr"] == pytest.approx(0.01)


def test_skill_is_of_averages_and_not_an_average(tmp_path):
    train(tmp_path, steps=2, log_every=2, batch_size=1)
    (row,) = [row for row in rows(tmp_path) if row["split"] == "train"]
    targets = [float(samples(n, 1)["y"].square()) for n in range(2)]
    assert row["mse_zero"] == pytest.approx(sum(targets) / 2)
    assert row["skill_zero"] == pytest.approx(1 - row["mse_model"] / (sum(targets) / 2))


def test_bfloat16_trains(tmp_path):
    class Watched(Toy):
        def loss(self, batch):
            seen.append(self.layers(batch["x"]).dtype)
            return super().loss(batch)

    seen = []
    _, best = train(tmp_path, model=Watched(), precision="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in best.weights.values())
    assert rows(tmp_path)[-1]["loss"] < 0.8 * rows(tmp_path)[0]["loss"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_continues_to_the_same_bits(tmp_path, precision):
    common = {"device": choose_device("cuda"), "precision": precision, "ema": 0.9}
    whole = train(tmp_path / "whole", **common)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", training=failing_at(13), **common)
    assert_same(train(tmp_path / "stopped", **common), whole)
    assert rows(tmp_path / "whole")[-2]["peak_memory_mib"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert choose_device("auto").type == "cpu"
    with pytest.raises(InputError, match=r"compute.device is cuda"):
        choose_device("cuda")


# --- Pretraining ----------------------------------------------------------------------------------


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
        "last.safetensors",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
    ]
    info = load_model_info(folder)
    assert info["subjects"] == {part: fake[part] for part in ("train", "validation")}
    assert info["step"] == 8
    assert info["events"] == {"skipped_steps": 0, "rollbacks": 0}
    assert info["files"].keys() == {"model.safetensors", "last.safetensors"}
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
    # The 32nd read is after the checkpoint of step 4, however far the data are read ahead.
    for folder, reads in (("whole", 10**9), ("stopped", 31)):
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


def test_a_pretraining_that_has_just_been_finished_by_another_process(
    tmp_path, fake, monkeypatch, capsys
):
    config = make_config(tmp_path)
    run_pretrain(config, "fake", "tiny", 0)
    folder = Layout(tmp_path / "results", "fake").pretrain("tiny", 0)
    before = (folder / "model.json").stat().st_mtime_ns
    looks = iter([False])  # the model was not there yet at the first look
    there = pretrain.already_there
    monkeypatch.setattr(pretrain, "already_there", lambda *told: next(looks, True) and there(*told))
    run_pretrain(config, "fake", "tiny", 0)
    assert (folder / "model.json").stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().err
    assert not list(folder.glob(".tmp-*"))


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
