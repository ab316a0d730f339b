"""fMRIPrep for one subject, in a container: by the `fmriprep-docker` package or by Apptainer.

Design choices
--------------
- What is wrong with the machine or the settings (no licence, no Docker) would be wrong for every
  subject, so it stops the job (`NotReadyError`). What goes wrong with a subject is told as the
  reason to leave its runs out.
- fMRIPrep ends with 1 on any crash and on a failure of its report alone, and goes on after a crash
  as far as it can: which runs it has made is told by the files, whatever the exit status.
- `fmriprep-docker` cannot name its container, but can set variables in it: by one of them the
  container is found again, and killed, when the client is gone.

Source: usage, exit statuses and crash files of fMRIPrep 25.2 (https://fmriprep.org, Apache-2.0).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from neuromamba.config import Preprocess
from neuromamba.files import InputError, digest_json, write_json
from neuromamba.fmriprep_command import (
    VARIABLE,
    NotReadyError,
    apptainer_command,
    docker_command,
)
from neuromamba.fmriprep_reasons import explain, last_words
from neuromamba.publish import verify_subject
from neuromamba.raw_bids import RawSubject
from neuromamba.supervise import end_earlier, run_program

CLIENT_FAILED = {"docker": 125, "apptainer": 255}
"""Exit statuses of the clients themselves."""
CLIENT_SECONDS = 60.0
"""Patience with a command of the Docker client."""


def preprocess_subject(
    bids: Path, subject: RawSubject, output: Path, work: Path, space: str, settings: Preprocess
) -> dict[str, str]:
    """Run fMRIPrep for one subject.

    Parameters
    ----------
    bids
        The raw dataset.
    subject
        The subject and the runs that are wanted.
    output
        A private folder, where the derivatives go.
    work
        Intermediate results. fMRIPrep goes on from those that are there.
    space
        Standard space of the runs.
    settings
        Engine (`docker` or `apptainer`), means, and what fMRIPrep is asked for.

    Returns
    -------
    dict
        Where fMRIPrep did not end well: why runs are not whole, by name.

    Raises
    ------
    NotReadyError
        When fMRIPrep cannot be started on this machine with these settings.
    InputError
        When no run of the subject is whole.
    """
    bids, output, work = (path.resolve() for path in (bids, output, work))
    output.mkdir(parents=True, exist_ok=True)  # or Docker makes them, as root
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "bids_filter.json", bids_filter(subject))
    token = digest_json(str(work))[:16]
    build = docker_command if settings.engine == "docker" else apptainer_command
    command = build(bids, subject, output, work, space, settings, token)
    stop = _container_killer(token) if settings.engine == "docker" else _nothing_more
    stop()
    end_earlier(VARIABLE, token)
    log = work / "fmriprep.log"
    environment = {VARIABLE: token, "PYTHONUNBUFFERED": "1"}
    ended = run_program(command, log, settings.time_limit * 60, environment, stop)
    if ended.code == 0 and not ended.timed_out:
        return {}
    if not ended.timed_out:
        _refuse_if_not_started(ended.code, log, settings.engine)
    broken = verify_subject(output, subject, space)
    reasons = explain(ended, output, log, subject, settings.time_limit)
    if broken and len(broken) == len(subject.runs):
        raise InputError(reasons[""])
    return {run: reasons[run] for run in broken}


def bids_filter(subject: RawSubject) -> dict[str, dict[str, list[str]]]:
    """Which scans fMRIPrep works on: the tasks, and sessions, of the runs that are wanted."""
    chosen = {"task": sorted({run.entities["task"] for run in subject.runs})}
    sessions = {run.entities.get("ses") for run in subject.runs}
    if None not in sessions:
        chosen["session"] = sorted(filter(None, sessions))
    return {"bold": chosen}


# --- Containers ---------------------------------------------------------------------------------


def _nothing_more() -> None:
    """Apptainer's processes are children like others."""


def _container_killer(token: str) -> Callable[[], None]:
    """What kills the containers that were started with a token, if any run."""

    def kill() -> None:
        running = _docker("ps", "--quiet", "--no-trunc").split()
        if not running:
            return
        form = "{{.Id}} {{json .Config.Env}}"
        for line in _docker("inspect", "--format", form, *running).splitlines():
            name, _, variables = line.partition(" ")
            if f"{VARIABLE}={token}" in (json.loads(variables) or []):
                print(f"preprocess: stopping the container {name[:12]}", file=sys.stderr)
                _docker("kill", name)

    return kill


def _docker(*arguments: str) -> str:
    """What a command of the Docker client prints; nothing if it fails, as on ended containers."""
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, timeout=CLIENT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout


def _refuse_if_not_started(code: int, log: Path, engine: str) -> None:
    """Raise `NotReadyError` when the client ended before there was a container."""
    with log.open(errors="replace") as lines:
        started = engine != "docker" or any("RUNNING: docker" in line for line in lines)
    if code == CLIENT_FAILED[engine] or not started:
        raise NotReadyError(f"{engine} could not start fMRIPrep: {last_words(log)} ({log})")
