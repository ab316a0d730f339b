"""Preprocess one subject of a raw dataset by whichever engine, and put it where the index looks.

Design choices
--------------
- A subject that cannot be preprocessed does not stop the others: its status file says why. What
  does stop the job is an interrupt, a full disk, and what would be wrong for every subject.
- What is published has the key of the settings and scans that it was made from, so that a restart
  repeats nothing that is whole. Threads, memory, time and places are not part of the key: a failed
  subject gets more of them without a repetition of the others.
- What failed leaves its work folder, named by the same key, from which fMRIPrep goes on.
"""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neuromamba.config import Config, Preprocess
from neuromamba.files import InputError, digest_json, write_json
from neuromamba.fmriprep_command import NotReadyError
from neuromamba.fmriprep_reasons import DISK_FULL
from neuromamba.layout import Layout
from neuromamba.preprocess_key import engine_settings
from neuromamba.publish import HIDDEN, publish, read_record, recover, verify_subject, withdraw
from neuromamba.raw_bids import RawSubject, fingerprint_subject
from neuromamba.raw_listing import generated_by, limits_of, raw_subjects

Engine = Callable[[Path, RawSubject, Path, Path, str, Preprocess], dict[str, str]]
KEPT = "sourcedata"
"""Of an earlier attempt's derivatives: FreeSurfer's surfaces, which take hours and are resumed."""


@dataclass(frozen=True)
class _Task:
    """One subject, and where everything of it lies.

    `subject` has the runs that can be worked on, `problems` why others cannot.
    """

    config: Preprocess
    bids: Path
    derivatives: Path
    space: str
    subject: RawSubject
    problems: dict[str, str]
    fingerprint: str
    key: str
    scratch: Path


@dataclass
class _Outcome:
    """What became of a subject; `reason` is why the engine failed as a whole."""

    runs: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    generated_by: str | None = None
    seconds: float | None = None


def run_preprocess(config: Config, dataset: str, subject: str) -> None:
    """Preprocess a subject and write its status, `preprocess/{subject}.json`.

    Raises
    ------
    InputError
        When the raw scans are not there, the disk is full, the engine cannot run on this machine
        with these settings, or the derivatives have a subject that this pipeline did not make.
    """
    task = _plan(config, dataset, subject)
    with _telling_of_a_full_disk(task):
        outcome = _verify_only(task) if task.config.engine == "none" else _preprocess(task)
    status = _status(task, outcome)
    write_json(Layout.of(config, dataset).preprocess(subject), status)
    total = len(task.subject.runs) + len(task.problems)
    reasons = [outcome.reason] if outcome.reason else list(dict.fromkeys(outcome.left_out.values()))
    _tell(subject, "; ".join([f"{len(outcome.runs)} of {total} runs are whole", *reasons]))


def _plan(config: Config, dataset: str, subject: str) -> _Task:
    settings, own = config.datasets[dataset], config.preprocess
    raw = raw_subjects(config, dataset).get(subject)
    if raw is None or settings.bids is None:
        raise InputError(
            f"{settings.bids}: has no scans of {subject} that the dataset's settings select; check "
            "bids, entities and exclude in the dataset YAML"
        )
    bids, derivatives = Path(settings.bids), Path(settings.derivatives)
    fingerprint = fingerprint_subject(bids, raw)
    key = digest_json([engine_settings(own), settings.space, fingerprint])[:16]
    scratch = Path(own.scratch, dataset) if own.scratch else derivatives / HIDDEN / "work"
    return _Task(
        config=own,
        bids=bids,
        derivatives=derivatives,
        space=settings.space,
        subject=replace(raw, runs=tuple(run for run in raw.runs if run.problem is None)),
        problems={run.name: run.problem for run in raw.runs if run.problem is not None},
        fingerprint=fingerprint,
        key=key,
        scratch=scratch / f"{subject}-{key}",
    )


def _engine(task: _Task) -> Engine:
    """The engine, if the settings let it work on any subject; `InputError` if not."""
    if task.config.engine == "ants":
        from neuromamba.ants_engine import preprocess_subject
        from neuromamba.ants_registration import require_ants
        from neuromamba.ants_template import load_template

        require_ants()
        load_template(task.config.ants, task.space)
        return preprocess_subject
    from neuromamba.fmriprep import preprocess_subject

    return preprocess_subject


# --- Work ---------------------------------------------------------------------------------------


def _verify_only(task: _Task) -> _Outcome:
    """Tell which runs the derivatives hold, whoever made them."""
    broken = verify_subject(task.derivatives, task.subject, task.space)
    return _outcome(task, broken, generated_by(task.derivatives))


def _preprocess(task: _Task) -> _Outcome:
    name = task.subject.name
    recover(task.derivatives, name)
    published = read_record(task.derivatives, name)
    if published is None and (task.derivatives / name).exists():
        raise NotReadyError(
            f"{task.derivatives / name}: was not made by this pipeline, so it is not replaced; use "
            "it by preprocess.engine: none, or set derivatives in the dataset YAML to another place"
        )
    kept = published if published and published["key"] == task.key else None
    if kept and not {*kept["left_out"]} - {*task.problems}:
        if not verify_subject(task.derivatives, task.subject, task.space):
            _tell(name, f"is whole already, made by {kept['generated_by']} of the same scans")
            return _Outcome(**{key: kept[key] for key in _Outcome.__dataclass_fields__})
        _tell(name, "is damaged, and made again")
    outcome = _make(task) if task.subject.runs else _outcome(task, {}, None)
    _refuse_full_disk(outcome)
    if outcome.runs:
        output = task.scratch / "out"
        record = _status(task, outcome)
        publish(output, task.derivatives, task.subject, outcome.runs, record)
    elif kept:
        outcome = _keep(task, outcome, kept)
    else:
        withdraw(task.derivatives, name)
    _clear(task, whole=not {*outcome.left_out} - {*task.problems})
    return outcome


def _make(task: _Task) -> _Outcome:
    """Let the engine work in a private folder; its failure becomes the reason."""
    output, work = task.scratch / "out", task.scratch / "work"
    if output.is_dir():
        for entry in output.iterdir():
            if entry.name != KEPT:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in (output, work):
        folder.mkdir(parents=True, exist_ok=True)
    preprocess_subject = _engine(task)
    started, reason = time.monotonic(), None
    try:
        arguments = (task.bids, task.subject, output, work, task.space, task.config)
        told = preprocess_subject(*arguments)
        left_out = {run: " ".join(text.split()) for run, text in told.items()}
    except NotReadyError:
        raise
    except InputError as error:
        reason = " ".join(str(error).split())
        left_out = {run.name: reason for run in task.subject.runs}
    rest = [run for run in task.subject.runs if run.name not in left_out]
    broken = verify_subject(output, replace(task.subject, runs=tuple(rest)), task.space)
    outcome = _outcome(task, {**left_out, **broken}, generated_by(output))
    outcome.reason = reason or outcome.reason
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def _keep(task: _Task, failed: _Outcome, published: dict[str, Any]) -> _Outcome:
    """A failed repetition, with the runs that an earlier one had published from the same."""
    broken = verify_subject(task.derivatives, task.subject, task.space)
    left_out = {run: failed.left_out.get(run, reason) for run, reason in broken.items()}
    outcome = _outcome(task, left_out, published["generated_by"])
    outcome.reason, outcome.seconds = failed.reason, failed.seconds
    return outcome


def _clear(task: _Task, whole: bool) -> None:
    """Remove the work folder of what is whole."""
    if whole:
        shutil.rmtree(task.scratch, ignore_errors=True)
    elif task.scratch.exists():
        _tell(
            task.subject.name, f"logs, and work that the next attempt goes on from: {task.scratch}"
        )


# --- Outcome ------------------------------------------------------------------------------------


def _outcome(task: _Task, broken: dict[str, str], made_by: str | None) -> _Outcome:
    runs = [run.name for run in task.subject.runs if run.name not in broken]
    left_out = dict(sorted({**broken, **task.problems}.items()))
    reason = None if runs else "no run is whole"
    return _Outcome(runs=runs, left_out=left_out, reason=reason, generated_by=made_by)


def _status(task: _Task, outcome: _Outcome) -> dict[str, Any]:
    return {
        "subject": task.subject.name,
        "engine": task.config.engine,
        "generated_by": outcome.generated_by,
        "seconds": outcome.seconds,
        "runs": outcome.runs,
        "left_out": outcome.left_out,
        "reason": outcome.reason,
        "limits": limits_of(task.config),
        "fingerprint": task.fingerprint,
        "key": task.key,
    }


def _refuse_full_disk(outcome: _Outcome) -> None:
    for reason in (outcome.reason or "", *outcome.left_out.values()):
        if any(text in reason for text in DISK_FULL):
            raise OSError(errno.ENOSPC, reason)


@contextmanager
def _telling_of_a_full_disk(task: _Task) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"the disk is full while {task.subject.name} is preprocessed in {task.scratch} or "
            f"published in {task.derivatives} ({error.strerror}); free some space and start again: "
            "finished subjects are kept"
        ) from error


def _tell(subject: str, text: str) -> None:
    print(f"preprocess {subject}: {text}", file=sys.stderr)
