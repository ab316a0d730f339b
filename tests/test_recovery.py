"""Steps that go wrong: they make no update, are recorded, and lead back where they go on."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_runs import Toy, assert_same, failing_at, rows, samples, timeless, train
from safetensors.torch import load_file

from neuromamba.files import InputError
from neuromamba.recovery import WARM_UP, UsualLoss, find_fault


def spoilt(steps, factor: float = math.nan, seen: list[int] | None = None):
    """A `training` whose targets are multiplied in the samples that these steps would read."""

    def training(first: int, size: int) -> dict:
        if seen is not None:
            seen.append(first // size)
        batch = samples(first, size)
        return {**batch, "y": batch["y"] * factor} if first // size in steps else batch

    return training


def events(folder: Path) -> list[dict]:
    return [row for row in rows(folder) if row["split"] == "event"]


def snapshot(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "snapshots" / f"step-{step:08d}" / "model.safetensors")


def changed(folder: Path, step: int) -> bool:
    """Whether a step changed the weights."""
    before, after = snapshot(folder, step - 1), snapshot(folder, step)
    return any(not torch.equal(before[name], after[name]) for name in before)


# --- One faulty step ------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_makes_no_update_and_is_recorded(tmp_path, capsys):
    model, fitted = train(tmp_path, training=spoilt([8]), keep_every=1, log_every=1)
    assert [step for step in range(2, 21) if not changed(tmp_path, step)] == [9]
    assert events(tmp_path) == [
        {
            "step": 9,
            "split": "event",
            "what": "loss is nan",
            "value": "nan",
            "runs": [f"run-{n}" for n in range(32, 36)],
        }
    ]
    assert [row["step"] for row in rows(tmp_path) if row["split"] == "train"] == [
        step for step in range(1, 21) if step != 9
    ]
    assert fitted.events == {"skipped_steps": 1, "rollbacks": 0}
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert "loss is nan in step 9 (run-32, run-33, run-34, run-35): no update" in (
        capsys.readouterr().err
    )


def test_the_journal_is_valid_json(tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    train(tmp_path, training=spoilt([8], math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [row["value"] for row in found if row["split"] == "event"] == ["inf"]


def test_a_gradient_that_is_not_finite_makes_no_update(tmp_path):
    class Cusp(Toy):
        def loss(self, batch):
            scalars = super().loss(batch)
            if "run-32" in batch["run"]:
                # 0 with the gradient inf * 0.
                scalars["loss"] = scalars["loss"] + (self.layers[0].weight * 0).abs().sqrt().sum()
            return scalars

    train(tmp_path, model=Cusp(), keep_every=1)
    assert not changed(tmp_path, 9)
    assert [(row["what"], row["value"]) for row in events(tmp_path)] == [
        ("grad_norm is nan", "nan")
    ]


def test_one_bad_batch_of_several_spoils_the_step(tmp_path):
    train(tmp_path, training=spoilt([17]), accumulate=2, keep_every=1)
    (event,) = events(tmp_path)
    assert event["step"] == 9
    assert event["runs"] == [f"run-{n}" for n in range(64, 72)]
    assert not changed(tmp_path, 9)


@pytest.mark.parametrize(("step", "expected"), [(WARM_UP - 1, []), (WARM_UP, [WARM_UP + 1])])
def test_a_spike_after_the_warm_up_makes_no_update(tmp_path, step, expected):
    train(tmp_path, steps=30, training=spoilt([step], 100.0), keep_every=1)
    found = events(tmp_path)
    assert [row["step"] for row in found] == expected
    assert changed(tmp_path, step + 1) == (not expected)
    for row in found:
        assert row["what"] == "loss spike"
        assert row["value"] > 1000


def test_the_usual_loss_is_an_exponential_mean_and_spread():
    losses = np.random.default_rng(0).normal(5.0, 2.0, 400)
    usual = UsualLoss()
    for loss in losses:
        usual.add(float(loss))
    weights = np.array([0.98 ** (len(losses) - 1 - n) for n in range(len(losses))])
    mean = np.average(losses, weights=weights)
    spread = np.sqrt(np.average((losses - mean) ** 2, weights=weights))
    assert usual.mean == pytest.approx(mean, rel=0.01)
    assert usual.limit(4.0) == pytest.approx(mean + 4 * spread, rel=0.01)


def test_a_loss_that_hardly_varies_may_rise_a_little():
    usual = UsualLoss()
    for _ in range(100):
        usual.add(2.0)
    assert find_fault({"loss": 2.1}, usual, 10.0) is None
    fault = find_fault({"loss": 2.3}, usual, 10.0)
    assert fault is not None
    assert fault.what == "loss spike"


# --- Rollbacks ------------------------------------------------------------------------------------


def test_after_faults_in_a_row_it_goes_on_from_a_checkpoint_with_later_samples(tmp_path, capsys):
    seen: list[int] = []
    settings = {"max_bad_steps": 3, "keep_every": 1}
    _, fitted = train(tmp_path, training=spoilt([11, 12, 13], seen=seen), **settings)
    # Steps 0 to 13 read ahead by some, then again from step 10 with the samples from 14 on.
    again = seen.index(14, seen.index(14) + 1)
    assert seen[again:] == list(range(14, 24))
    assert fitted.events == {"skipped_steps": 3, "rollbacks": 1}
    assert [(row["step"], row["what"]) for row in events(tmp_path)] == [
        *((step, "loss is nan") for step in (12, 13, 14)),
        (14, "rollback"),
    ]
    assert events(tmp_path)[-1]["to"] == 10
    for split in ("train", "validation"):
        steps = [row["step"] for row in rows(tmp_path) if row["split"] == split]
        assert steps == sorted(set(steps))
    assert "back to step 10, and on with other samples" in capsys.readouterr().err


def test_a_rollback_goes_back_to_before_the_first_fault(tmp_path):
    """A checkpoint was due among the faulty steps, and one was written because of a signal."""

    def training(first, size):
        if first // size == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return spoilt([8, 9, 10, 11])(first, size)

    with pytest.raises(SystemExit):
        train(tmp_path, training=training, max_bad_steps=4)
    stopped = train(tmp_path, training=spoilt([8, 9, 10, 11]), max_bad_steps=4)
    assert [row["to"] for row in events(tmp_path) if row["what"] == "rollback"] == [5]
    whole = train(tmp_path / "whole", training=spoilt([8, 9, 10, 11]), max_bad_steps=4)
    assert_same(stopped, whole)
    assert timeless(tmp_path) == timeless(tmp_path / "whole")


def test_a_rollback_before_the_first_checkpoint_goes_to_the_start(tmp_path):
    seen: list[int] = []
    training = spoilt([1, 2, 3], seen=seen)
    model, _ = train(tmp_path, training=training, max_bad_steps=3, keep_checkpoints=1)
    assert seen[seen.index(4, seen.index(4) + 1) :] == list(range(4, 24))
    shifted = {"training": lambda first, size: samples(first + 4 * size, size)}
    expected, _ = train(tmp_path / "shifted", **shifted)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("stop", [14, 16, 19, 22])
def test_a_stopped_training_with_a_rollback_ends_in_the_same_bits(tmp_path, stop):
    bad = [11, 12, 13]
    whole = train(tmp_path / "whole", training=spoilt(bad), max_bad_steps=3)

    def training(first, size):
        return failing_at(stop)(first, size) and spoilt(bad)(first, size)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", training=training, max_bad_steps=3)
    assert_same(train(tmp_path / "stopped", training=spoilt(bad), max_bad_steps=3), whole)
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")


def test_it_gives_up_after_so_many_rollbacks(tmp_path):
    settings = {"max_bad_steps": 2, "max_rollbacks": 2, "steps": 30}
    training = spoilt(range(7, 100))
    for _ in range(2):
        with pytest.raises(InputError) as error:
            train(tmp_path, training=training, **settings)
        message = str(error.value)
        assert "loss is nan in step 7 (run-48, run-49, run-50, run-51)" in message
        assert "2 faulty steps in a row after 2 rollbacks" in message
        assert "the checkpoint of step 5 is kept" in message
        assert "lower learning_rate" in message
        assert "`exclude`" in message
    assert [row["what"] for row in events(tmp_path)].count("rollback") == 2


def test_a_validation_loss_that_is_not_finite_ends_the_training(tmp_path):
    bad = {**samples(10_000, 4), "y": torch.full((4,), math.inf)}
    with pytest.raises(InputError, match="loss is inf for the validation runs after step 4"):
        train(tmp_path, validation=lambda: [bad])
