"""How long a dataset will take, and how large what is made of it will be.

The data stages are computed from measurements (`neuromamba.estimate`); so is the engine `ants`. Of
fMRIPrep it is the rule of thumb that its makers publish.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuromamba.config import Config
from neuromamba.estimate import Plan, estimate_stages, refuse_other_settings
from neuromamba.files import InputError
from neuromamba.findings import CheckedRun, Finding
from neuromamba.measured import read_measured

BYTES_PER_VOLUME = 500_000
BYTES_PER_SUBJECT = 22_000_000
"""Of what `ants` makes at 2 mm of the scan below; fMRIPrep's are much the same."""
ANTS_SECONDS_PER_SUBJECT = 43.0
ANTS_SECONDS_PER_VOLUME = 0.2
ANTS_SOURCE = (
    "ants: 43 s a subject and 0.2 s a volume of processor time, as measured of a real scan (80 x "
    "80 x 35 x 156, with a T1w image) on an AMD EPYC core, 2026-11-29"
)
FMRIPREP_CORE_HOURS = 8.0
FMRIPREP_SOURCE = (
    "fMRIPrep: 8 core hours a subject, the rule of thumb of its documentation (about 2 hours with "
    "4 CPUs, without surfaces)"
)


@dataclass(frozen=True)
class Effort:
    """Rows of `stage`, `core_hours`, `hours_per_job` and `bytes`; notes say where they are from."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def estimate_effort(config: Config, runs: Sequence[CheckedRun], raw: bool) -> Effort:
    """What the used runs will take.

    Parameters
    ----------
    config
        Its settings of the engine, the grid and the jobs.
    runs
        Those that are used, with their numbers of volumes.
    raw
        Whether they have to be preprocessed first.
    """
    if not runs:
        return Effort()
    effort = Effort()
    if raw:
        _add_preprocessing(effort, config, runs)
    _add_data_stages(effort, config, runs)
    needed = sum(row["bytes"] for row in effort.rows)
    place, free = _free(Path(config.results))
    if needed > free:
        message = (
            f"disk: about {needed / 1e9:,.0f} GB are needed, and {place} has {free / 1e9:,.0f} GB "
            "left; set results to a larger disk"
        )
        effort.findings.append(Finding("warning", "", message))
    return effort


def _add_preprocessing(effort: Effort, config: Config, runs: Sequence[CheckedRun]) -> None:
    subjects = len({run.subject for run in runs})
    volumes = sum(run.n_volumes or 0 for run in runs)
    threads = config.preprocess.threads
    size: float = subjects * BYTES_PER_SUBJECT + volumes * BYTES_PER_VOLUME
    if config.preprocess.engine == "ants":
        seconds = subjects * ANTS_SECONDS_PER_SUBJECT + volumes * ANTS_SECONDS_PER_VOLUME
        core_hours, source = seconds / 3600, ANTS_SOURCE
        size *= (2 / config.preprocess.ants.voxel_size) ** 3
    else:
        core_hours, source = subjects * FMRIPREP_CORE_HOURS, FMRIPREP_SOURCE
        if config.preprocess.fmriprep.freesurfer:
            source += "; surfaces (freesurfer: true) take several hours more"
    effort.rows.append(
        {
            "stage": f"preprocess ({config.preprocess.engine})",
            "core_hours": core_hours,
            "hours_per_job": core_hours / subjects / threads,
            "bytes": round(size),
        }
    )
    effort.notes.append(
        f"{source}. A job is a subject; its hours are the least, if its {threads} thread(s) shared "
        "all work evenly."
    )


def _add_data_stages(effort: Effort, config: Config, runs: Sequence[CheckedRun]) -> None:
    measured = read_measured()
    try:
        refuse_other_settings(config, measured)
    except InputError as error:
        effort.notes.append(f"The data stages cannot be estimated: {error}.")
        return
    mean = round(sum(run.n_volumes or 0 for run in runs) / len(runs))
    per_job = math.ceil(len(runs) / config.compute.batches)
    # By runs, as subjects may have different numbers of them.
    table = estimate_stages(Plan(len(runs), 1, max(1, mean), per_job), measured)
    for row in table.to_dict("records"):
        if row["stage"] != "all":
            kept = ("stage", "core_hours", "hours_per_job", "bytes")
            effort.rows.append({key: row[key] for key in kept})
    effort.notes.append(
        f"The data stages are in proportion to runs measured on {measured.where}; see "
        "`neuromamba estimate`."
    )


def _free(path: Path) -> tuple[Path, int]:
    """The nearest folder that exists, and the free bytes of its file system."""
    place = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    return place, shutil.disk_usage(place).free


def as_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows and their sum as lines of text."""
    if not rows:
        return []
    whole = {
        "stage": "all",
        "core_hours": sum(row["core_hours"] for row in rows),
        "hours_per_job": max(row["hours_per_job"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
    }
    cells = [["stage", "core hours", "hours/job", "GB"]]
    cells += [
        [
            row["stage"],
            _number(row["core_hours"]),
            _number(row["hours_per_job"]),
            _number(row["bytes"] / 1e9),
        ]
        for row in [*rows, whole]
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  "
        + "  ".join(
            [first.ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        )
        for first, *rest in cells
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
