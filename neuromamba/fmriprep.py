"""fMRIPrep for one subject, in a container: by the `fmriprep-docker` package or by Apptainer.

Design choices
--------------
- What is wrong with the machine or the settings (no licence, no Docker) would be wrong for every
  subject, so it stops the job (`NotReadyError`). What goes wrong with a subject is told as the
  reason to leave its runs out.
- fMRIPrep ends with 1 on any crash and on a failure of its report alone, and goes on after a crash
  as far as it can: which runs it has made is told by the files, whatever the exit status.
- fMRIPrep is told by filters of PyBIDS what to work on: for each entity, which values are wanted. A
  run that they cannot tell from the wanted ones is worked on too, as no other depends on it, and
  not published. A T1w image that they cannot leave out would be averaged into the anatomy, so the
  subject is refused.
- `fmriprep-docker` cannot name its container, but can set variables in it: by one of them the
  container is found again, and killed, when the client is gone.

Source: usage, exit statuses and crash files of fMRIPrep 25.2 (https://fmriprep.org, Apache-2.0).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from neuromamba.bids_scan import LONG_NAMES, entities_of
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
from neuromamba.raw_bids import RawSubject, scan_subject
from neuromamba.sidecars import split_name
from neuromamba.supervise import end_earlier, run_program

CLIENT_FAILED = {"docker": 125, "apptainer": 255}
"""Exit statuses of the clients themselves."""
CLIENT_SECONDS = 60.0
"""Patience with a command of the Docker client."""
OF_PYBIDS = {"task": "task", "run": "run"} | {
    short: name for name, short in LONG_NAMES.items() if short != "sub"
}
"""PyBIDS's names of the entities that tell a subject's images apart."""

Filter = dict[str, list[str | None]]
"""Values by the names of entities; `None` is for images without one."""


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
        When no run of the subject is whole, or a T1w image cannot be left out.
    """
    bids, output, work = (path.resolve() for path in (bids, output, work))
    output.mkdir(parents=True, exist_ok=True)  # or Docker makes them, as root
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "bids_filter.json", bids_filter(subject, scan_subject(bids, subject.name)))
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


# --- What it works on ---------------------------------------------------------------------------


def bids_filter(subject: RawSubject, everything: RawSubject) -> dict[str, Filter]:
    """Filters of PyBIDS for the wanted runs and T1w images.

    Parameters
    ----------
    subject
        The subject with what is wanted.
    everything
        The subject with all that is there, which fMRIPrep would otherwise take.

    Raises
    ------
    InputError
        When there is a T1w image that cannot be left out.
    """
    names = {run.name for run in subject.runs}
    others = {run.name: run.entities for run in everything.runs if run.name not in names}
    bold, inseparable = _separate([run.entities for run in subject.runs], others)
    if inseparable:
        print(
            f"preprocess {subject.name}: fMRIPrep's filters cannot leave out "
            f"{', '.join(inseparable)} alone, so it is worked on and not published",
            file=sys.stderr,
        )
    tasks: list[str | None] = [*sorted({run.entities["task"] for run in subject.runs})]
    images = {path.name: entities_of(split_name(path.name)[0]) for path in everything.t1w}
    wanted = [images.pop(path.name) for path in subject.t1w]
    t1w, inseparable = _separate(wanted, images)
    if inseparable:
        raise InputError(
            f"{', '.join(inseparable)}: exclude in the dataset YAML names it, but fMRIPrep's "
            "filters cannot leave it out and keep another T1w image, which is needed; do not "
            "exclude it, or move it out of the dataset's folder"
        )
    return {"bold": {"task": tasks, **bold}, **({"t1w": t1w} if t1w else {})}


def _separate(
    wanted: Sequence[dict[str, str]], others: dict[str, dict[str, str]]
) -> tuple[Filter, list[str]]:
    """What tells wanted images from others by their entities, and which it does not tell."""
    if not wanted:
        return {}, sorted(others)
    values = {key: {entities.get(key) for entities in wanted} for key in OF_PYBIDS}
    apart = {
        name: [key for key in OF_PYBIDS if entities.get(key) not in values[key]]
        for name, entities in others.items()
    }
    used = {key for keys in apart.values() for key in keys}
    chosen = {
        name: sorted(values[key], key=lambda value: value or "")
        for key, name in OF_PYBIDS.items()
        if key in used
    }
    return chosen, sorted(name for name, keys in apart.items() if not keys)


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
