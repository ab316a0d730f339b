"""A training that is killed again and again, at any moment, ends in the same bits.

The processes are forked from one that has loaded torch, which takes longer than the training.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import kills
import numpy as np
import pytest
from fake_runs import rows, timeless

pytestmark = pytest.mark.usefixtures("forkserver")
PRELOAD = "kills"
CONTEXT = multiprocessing.get_context("forkserver")


def run(folder: Path, file_event: int | None = None, kill_after: float = 60.0) -> tuple[int, float]:
    """Train, with a kill at that file event or after so many seconds: exit code, and seconds."""
    hear, ready = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=kills.run, args=(folder, ready, file_event))
    process.start()
    ready.close()
    assert hear.recv()
    started = time.perf_counter()
    process.join(kill_after)
    process.kill()
    process.join()
    return process.exitcode, time.perf_counter() - started


def assert_same_files(one: Path, other: Path) -> None:
    files = ["model.safetensors", "last.safetensors"]
    files += [f"snapshots/step-{step:08d}/model.safetensors" for step in (40, 80, 120)]
    for name in files:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert timeless(one) == timeless(other)


def test_twenty_kills(tmp_path):
    code, seconds = run(tmp_path / "whole")
    assert code == 0
    events = [row["what"] for row in rows(tmp_path / "whole") if row["split"] == "event"]
    assert events == ["loss is nan"] * 4 + ["rollback"]
    rng = np.random.default_rng(0)
    folder = tmp_path / "killed"
    for number in range(20):
        if number % 2:
            code, _ = run(folder, file_event=int(rng.integers(1, 120)))
        else:
            code, _ = run(folder, kill_after=float(rng.uniform(0, seconds / 15)))
        assert code == -signal.SIGKILL
    assert run(folder)[0] == 0
    assert_same_files(folder, tmp_path / "whole")
    assert list(folder.rglob(".tmp-*")) == []
