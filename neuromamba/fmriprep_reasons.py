"""Why fMRIPrep failed, in one line: from its exit status, its crash files, and what it printed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neuromamba.raw_bids import RawSubject
from neuromamba.supervise import Ended

STATUS = {
    70: "it made no workflow",
    126: "it could not build its workflow",
    127: "a program that it needs is missing",
    137: "killed, as a rule because memory ran out: raise preprocess.memory_mb",
}
DISK_FULL = ("No space left on device", "Disk quota exceeded")
TIME = re.compile(r"^\d{6}-\d\d:\d\d:\d\d,\d+ ")
"""How lines of Nipype's log begin."""
LONGEST = 300
"""Characters of an error message that are repeated."""
TAIL = 64 * 1024
"""Bytes at the end of a log that are looked through."""


@dataclass(frozen=True)
class Crash:
    """A crash file of Nipype: the node of the workflow, and the last line of the traceback."""

    node: str
    error: str

    def __str__(self) -> str:
        return f"{self.node}: {self.error[:LONGEST]}"


def explain(
    ended: Ended, output: Path, log: Path, subject: RawSubject, time_limit: float
) -> dict[str, str]:
    """Reasons why a subject's runs were not made, in one line each, by run.

    The name "" has that of the subject as a whole. A run's is its own crash where there is one,
    and otherwise the first. They name no folders and times, so that a second attempt that fails
    as the first did gives the same.

    Parameters
    ----------
    ended
        How fMRIPrep ended.
    output
        Its derivatives, with the crash files of this subject.
    log
        What it printed.
    subject
        The subject.
    time_limit
        Minutes that it had.
    """
    how = f"fMRIPrep ended with exit status {ended.code}"
    if ended.timed_out:
        how = (
            f"fMRIPrep was stopped after preprocess.time_limit = {time_limit:g} minutes: raise it "
            "(what is done is kept)"
        )
    elif ended.code in STATUS:
        how += f" ({STATUS[ended.code]})"
    crashes = _read_crashes(output, subject.name)
    last = last_words(log)
    named = {"": crashes, **{run.name: _of_run(run.name, crashes) for run in subject.runs}}
    return {name: f"{how}: {_first(found, last)}" for name, found in named.items()}


def _first(crashes: Sequence[Crash], last: str) -> str:
    more = f" (and {len(crashes) - 1} more crashes)" if len(crashes) > 1 else ""
    return f"{crashes[0]}{more}" if crashes else last


def _read_crashes(output: Path, subject: str) -> list[Crash]:
    """The crash files of a subject, those of a full disk first, which is then all that counts."""
    paths = [*output.glob(f"{subject}/**/crash-*.txt"), *output.glob("logs/**/crash-*.txt")]
    crashes = [_read_crash(path) for path in sorted(paths)]
    return sorted(crashes, key=lambda crash: not any(text in crash.error for text in DISK_FULL))


def _read_crash(path: Path) -> Crash:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    node = next((line.partition(":")[2].strip() for line in lines if line.startswith("Node:")), "")
    full = next((line for line in lines if any(text in line for text in DISK_FULL)), None)
    return Crash(node or path.stem, full or (lines[-1] if lines else "an empty crash file"))


def _of_run(run: str, crashes: Sequence[Crash]) -> list[Crash]:
    """The crashes in the workflow of one run, such as `bold_task_rest_run_1_wf`; else all."""
    stem = run.partition("_")[2].replace("-", "_")
    own = [c for c in crashes if f"_{stem}_wf" in c.node or f"_{stem}_echo_" in c.node]
    return own or list(crashes)


def last_words(log: Path) -> str:
    """The last line of a log that tells of an error, or else the last."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL))
        text = stream.read().decode(errors="replace")
    lines = [" ".join(TIME.sub("", line).split()) for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("fMRIPrep: Please report")]
    full = [line for line in lines if any(text in line for text in DISK_FULL)]
    errors = [line for line in lines if "error" in line.lower()]
    return (full or errors or lines or ["it printed nothing"])[-1][:LONGEST]
