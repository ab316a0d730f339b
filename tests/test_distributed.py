"""Several processes train as one does, stop together, and do not wait for one that is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from fake_runs import rows, write_dataset
from safetensors.torch import load_file

from neuromamba.checkpoint import load_model_info
from neuromamba.distributed import World
from neuromamba.files import InputError
from neuromamba.layout import Layout

pytestmark = pytest.mark.usefixtures("forkserver")
PRELOAD = "processes"
CONTEXT = multiprocessing.get_context("forkserver")


def run(folder: Path, scenario: str) -> list[dict]:
    """What two processes have to tell of a scenario."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        CONTEXT.Process(target=processes.run, args=(rank, port, folder, scenario))
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


# --- As one process does --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """The folders of the same trainings in one process and in two."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "two")}
    for folder in folders.values():
        write_dataset(folder)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *torchrun, processes.__file__, str(folders["two"])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    alone = CONTEXT.Process(target=processes.train_all, args=(folders["one"],))
    alone.start()
    alone.join()
    assert alone.exitcode == 0
    return folders["one"], folders["two"]


def assert_same_course(one: Path, two: Path) -> None:
    first, second = rows(one), rows(two)
    assert [(row["step"], row["split"]) for row in first] == [
        (row["step"], row["split"]) for row in second
    ]
    for row, other in zip(first, second, strict=True):
        for name in ("loss", "mse_model", "mse_mean", "mse_zero", "grad_norm"):
            if name in row:
                assert other[name] == pytest.approx(row[name], rel=1e-5), (name, row["step"])


def assert_close_weights(one: Path, two: Path) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)


def test_two_processes_share_each_batch(one_and_two):
    reads = [json.loads((one_and_two[1] / f"reads-{rank}.json").read_text()) for rank in range(2)]
    assert reads[0] == [[4 * n, 2] for n in range(24)]
    assert reads[1] == [[4 * n + 2, 2] for n in range(24)]
    assert json.loads((one_and_two[0] / "reads-0.json").read_text()) == [
        [4 * n, 4] for n in range(24)
    ]


def test_a_toy_takes_the_same_course(one_and_two):
    one, two = one_and_two
    assert_same_course(one / "toy", two / "toy")
    assert_close_weights(one / "toy.safetensors", two / "toy.safetensors")
    snapshot = Path("toy/snapshots/step-00000012/model.safetensors")
    assert_close_weights(one / snapshot, two / snapshot)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_model_takes_the_same_course(one_and_two, stage):
    folders = []
    for folder in one_and_two:
        layout = Layout(folder / "results", "fake")
        parts = {
            "pretrain": layout.pretrain("tiny", 0),
            "finetune": layout.finetune("tiny", 0, "sex"),
        }
        folders.append(parts[stage])
    one, two = folders
    assert_same_course(one, two)
    for name in ("model.safetensors", "last.safetensors"):
        assert_close_weights(one / name, two / name)
    assert load_model_info(one)["best"]["step"] == load_model_info(two)["best"]["step"]


# --- Together -------------------------------------------------------------------------------------


def test_a_fault_in_one_process_is_a_fault_in_all(tmp_path):
    told = run(tmp_path, "fault")
    assert told[0]["weights"] == told[1]["weights"]
    events = [row for row in rows(tmp_path / "training") if row["split"] == "event"]
    assert [(row["step"], row["what"]) for row in events] == [
        (6, "loss is nan"),
        (8, "loss is nan"),
        (9, "loss is nan"),
        (9, "rollback"),
    ]
    # All windows of the step are named, whichever process has read them.
    assert sorted(events[0]["runs"]) == sorted(f"run-{n}" for n in range(40, 48))


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    whole, stopped = run(tmp_path / "whole", "whole"), run(tmp_path / "stopped", "signal")
    assert [one["status"] for one in stopped] == [75, 75]
    # Each went on from the checkpoint, to the bits of the training that was not stopped.
    for one in stopped:
        assert one["weights"] == whole[0]["weights"] == whole[1]["weights"]


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    told = run(tmp_path, "unequal")
    assert "batch_size is 3, which 2 processes cannot share equally" in told[0]["error"]
    assert told[1]["status"] == 2
    with pytest.raises(InputError, match="use a multiple of 4"):
        World(0, 4).share(6)
    assert World(3, 4).share(8) == 2


def test_a_problem_of_rank_0_ends_all(tmp_path):
    told = run(tmp_path, "damaged")
    assert "none is whole: remove" in told[0]["error"]
    assert told[1]["status"] == 2
    assert max(one["seconds"] for one in told) < 10


@pytest.mark.parametrize(("scenario", "most"), [("unreadable", 8), ("hanging", 5)])
def test_a_lost_process_is_told_and_not_waited_for(tmp_path, scenario, most):
    told = run(tmp_path, scenario)
    assert "process 0 of 2 has lost another one" in told[0]["error"]
    assert "continues from the last checkpoint" in told[0]["error"]
    assert told[0]["seconds"] < most
    if scenario == "unreadable":
        assert told[1]["error"] == "run-40 cannot be read"
