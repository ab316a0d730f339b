"""The command starts itself again in the processes that the config asks for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from neuromamba.config import Compute
from neuromamba.files import InputError
from neuromamba.launch import start_processes

# What each process does once it is one of several.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from neuromamba.config import Compute
from neuromamba.launch import start_processes

start_processes(Compute(processes=2, nodes={nodes}))
me = Path(sys.argv[1]) / os.environ["RANK"]
me.write_text(" ".join([os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], *sys.argv[2:]]))
{then}
"""
# Writes a checkpoint, which takes a while, and asks to be started again.
STOPPABLE = """
def stop(number, frame):
    time.sleep(1)
    me.write_text("stopped")
    os._exit(75)

signal.signal(signal.SIGTERM, stop)
me.with_suffix(".ready").touch()
time.sleep(60)
"""
# Runs what it is told to once for each node, as SLURM's does.
SRUN = """#!/bin/sh
echo "$1 $2 $3" > "$SRUN_TOLD"
shift 4
"$@" & "$@"
first=$?
wait $! && exit $first
"""


def start(folder: Path, then: str = "", nodes: int = 1, **environment: str) -> subprocess.Popen:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(nodes=nodes, then=then))
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), "some", "words"],
        env={**os.environ, "OMP_NUM_THREADS": "6", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_process_gets_the_same_words_and_its_share_of_the_threads(tmp_path):
    run = start(tmp_path)
    assert run.wait(60) == 0, run.stderr.read()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 3 some words"] * 2


def test_the_status_is_that_of_the_training(tmp_path):
    assert start(tmp_path, then="sys.exit(2)").wait(60) == 2


def test_a_signal_stops_all_processes_and_lets_them_write(tmp_path):
    run = start(tmp_path, then=STOPPABLE)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 75
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["stopped"] * 2


def test_several_nodes_have_a_torchrun_each(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    told = {"SLURM_JOB_ID": str(os.getpid()), "SRUN_TOLD": str(tmp_path / "told"), "PATH": path}
    run = start(tmp_path, nodes=2, **told)
    assert run.wait(60) == 0, run.stderr.read()
    assert (tmp_path / "told").read_text() == "--nodes=2 --ntasks=2 --ntasks-per-node=1\n"
    assert [(tmp_path / rank).read_text() for rank in "0123"] == ["4 3 some words"] * 4


def test_several_nodes_need_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match=r"compute\.nodes is 2, and this is no job of SLURM"):
        start_processes(Compute(nodes=2))


def test_one_process_and_those_of_another_torchrun_are_left_as_they_are(monkeypatch):
    started = []
    monkeypatch.setattr("neuromamba.launch._run_torchrun", lambda *told: started.append(told) or 0)
    start_processes(Compute())
    monkeypatch.setenv("WORLD_SIZE", "2")
    start_processes(Compute(processes=2))
    assert started == []
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(SystemExit):
        start_processes(Compute(processes=2))
    assert len(started) == 1
