"""What the events of the runs say of targets that are states, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from neuromamba.config import Dataset, State
from neuromamba.events import NONE, EventFiles, Ints, label_volumes, read_events
from neuromamba.files import InputError
from neuromamba.findings import CheckedRun, Finding
from neuromamba.states import MIN_VOLUMES

LEAST = 5
"""Subjects that each state should be known of."""
COUNTS = ["target", "site", "value", "subjects"]


def check_events(
    dataset: Dataset, runs: Sequence[CheckedRun]
) -> tuple[list[Finding], pd.DataFrame]:
    """Read the events of the runs that will be used.

    Returns
    -------
    findings, counts
        `counts` has the columns `target`, `site` (`all`), `value` (a state, or `n/a` for subjects
        without any) and `subjects`.
    """
    findings: list[Finding] = []
    rows: list[tuple[str, str, str, int]] = []
    for name, target in dataset.state_targets.items():
        seen = pd.DataFrame(0, index=pd.Index(sorted({r.subject for r in runs})), columns=[])
        seen = seen.reindex(columns=target.class_names, fill_value=0)
        more, labels = _read(dataset.events_folder, name, target, runs)
        findings += more
        for subject, of_run in labels:
            counts = np.bincount(of_run[of_run != NONE], minlength=len(target.classes))
            seen.loc[subject] += counts
        known = seen >= MIN_VOLUMES
        rows += [(name, "all", state, int(known[state].sum())) for state in target.class_names]
        rows.append((name, "all", "n/a", int((~known.any(axis=1)).sum())))
        findings += _too_few(name, target, known) if labels else []
    return findings, pd.DataFrame(rows, columns=COUNTS)


def _read(
    folder: str, name: str, target: State, runs: Sequence[CheckedRun]
) -> tuple[list[Finding], list[tuple[str, Ints]]]:
    """Findings, and the state of each volume of the runs that have events, with the subject."""
    files, findings, labels = EventFiles(folder), [], []
    if not Path(folder).is_dir():
        message = f"no events of target {name}: {folder} is not a folder; set `events`"
        return [Finding("blocked", name, message)], []
    for run in runs:
        try:
            path = files.find(run.run)
            if path is None:
                why = f"no events of target {name}: {folder} has none that apply to {run.run}"
                findings.append(Finding("note", run.run, f"{why}; it is not used for the target"))
                continue
            events, step = read_events(path, target), run.repetition_time or np.nan
            times = np.arange(run.n_volumes or 0) * step
            labels.append((run.subject, label_volumes(times, step, events, target.lag)))
        except InputError as error:
            findings.append(Finding("blocked", run.run, str(error)))
    if runs and not labels and not any(one.level == "blocked" for one in findings):
        message = (
            f"no events at all of target {name}: {folder} has no *_events.tsv that applies to any "
            "run; set `events` in the dataset YAML to the folder that has them"
        )
        findings = [Finding("blocked", name, message)]
    return findings, labels


def _too_few(name: str, target: State, known: pd.DataFrame) -> list[Finding]:
    return [
        Finding(
            "warning",
            name,
            f"few subjects in a state: {state} of target {name} lasts {MIN_VOLUMES} volumes in "
            f"{n} of {len(known)} subjects; scores of so few mean little (see the target's classes "
            f"and the events' column {target.column!r})",
        )
        for state, n in known.sum().items()
        if n < LEAST
    ]
