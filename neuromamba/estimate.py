"""What a dataset needs: files, bytes, jobs and hours, computed from what was measured.

Nothing here is a guess: every figure is a measured one, carried to another number of runs in
proportion, and to another length of a run by a straight line through the measured lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from neuromamba.config import Config
from neuromamba.files import InputError
from neuromamba.measured import Measured, Point, read_measured, read_own

FORMATS = ("table", "tsv", "json")
IMMATERIAL = ("min_volumes", "cube")
"""Settings that change little of what a run needs."""


@dataclass(frozen=True)
class Plan:
    """A dataset to come: its subjects, runs of each, volumes of each run, and subjects of a job."""

    subjects: int
    runs: int
    volumes: int
    subjects_per_job: int

    @property
    def all_runs(self) -> int:
        return self.subjects * self.runs

    @property
    def jobs(self) -> int:
        """Jobs of one data stage."""
        return math.ceil(self.subjects / self.subjects_per_job)


def estimate_stages(plan: Plan, measured: Measured) -> pd.DataFrame:
    """One row a data stage, and their sum.

    Returns
    -------
    pandas.DataFrame
        `stage`; `files_per_run`, `bytes_per_run`; of the whole dataset `files`, `inodes` (files
        and folders), `bytes`, `jobs`, `core_hours` (processor time); of a job `hours_per_job`, by
        the clock, and `peak_mb`.
    """
    rows = []
    for stage in dict.fromkeys(point.stage for point in measured.points):
        points = [point for point in measured.points if point.stage == stage]
        files = math.ceil(_at(points, "files", plan.volumes) - 1e-9)
        size = round(_at(points, "bytes", plan.volumes))
        start = max(point.start_seconds for point in points)
        cpu = plan.all_runs * _at(points, "cpu_seconds", plan.volumes) + plan.jobs * start
        in_job = min(plan.subjects, plan.subjects_per_job) * plan.runs
        clock = in_job * _at(points, "seconds", plan.volumes) + start
        rows.append(
            {
                "stage": stage,
                "files_per_run": files,
                "bytes_per_run": size,
                "files": plan.all_runs * files,
                "inodes": plan.all_runs * (files + round(points[0].folders)),
                "bytes": plan.all_runs * size,
                "jobs": plan.jobs,
                "core_hours": cpu / 3600,
                "hours_per_job": clock / 3600,
                "peak_mb": max(point.peak_mb for point in points),
            }
        )
    table = pd.DataFrame(rows)
    sums = {name: table[name].sum(skipna=False) for name in table.columns[1:-2]}
    most = {name: table[name].max(skipna=False) for name in table.columns[-2:]}
    return pd.concat([table, pd.DataFrame([{"stage": "all", **sums, **most}])], ignore_index=True)


def _at(points: Sequence[Point], name: str, volumes: int) -> float:
    """A figure at some length of a run: measured, or by a straight line, or in proportion.

    Lengths that hardly differ say nothing of the slope, so that they count as one.
    """
    lengths = np.array([point.volumes for point in points])
    values = np.array([getattr(point, name) for point in points])
    if volumes in lengths:
        return float(values[lengths == volumes].mean())
    if lengths.max() >= 1.5 * lengths.min():
        slope, start = np.polyfit(lengths, values, 1)
        return float(start + slope * volumes)
    return float(values.mean() * volumes / lengths.mean())


def estimate_training(config: Config, plan: Plan, measured: Measured) -> list[dict[str, Any]]:
    """Hours of one pretraining of each of the config's models, at each speed that was measured.

    Returns
    -------
    list of dict
        `model`, `device`, `windows` of the whole training, `passes` over all runs (as if all
        subjects were for training), and `hours`; none for a model without a speed.
    """
    rows = []
    for speed in measured.training:
        if speed.model not in config.models:
            continue
        model = config.models[speed.model]
        steps = model.pretrain
        windows = steps.steps * steps.batch_size * steps.accumulate
        tokens = measured.tokens_per_time_patch * model.volumes / config.tokens.time_patch
        rate = speed.windows_per_second
        if math.isnan(rate):
            rate = speed.tokens_per_second / tokens
        rows.append(
            {
                "model": speed.model,
                "device": speed.device,
                "windows": windows,
                "passes": windows * model.volumes / (plan.all_runs * plan.volumes),
                "hours": windows / rate / 3600,
            }
        )
    return rows


def refuse_other_settings(config: Config, measured: Measured) -> None:
    """Raise `InputError` when the measurements are of another grid or of other patches."""
    for name, section in (measured.settings or {}).items():
        ours = getattr(config, name).model_dump(mode="json")
        other = [key for key in section if key not in IMMATERIAL and ours[key] != section[key]]
        if other:
            raise InputError(
                f"the measurements that come with the package are of "
                f"{', '.join(f'{name}.{key} = {section[key]}' for key in other)}; with other "
                "settings finish one batch, and give its results by --measured RESULTS/DATASET"
            )


# --- The command ----------------------------------------------------------------------------------


def run_estimate(
    config: Config,
    plan: Plan,
    own: Path | None = None,
    form: str = "table",
) -> str:
    """What a dataset needs, as text in one of `FORMATS`.

    Parameters
    ----------
    config
        For its settings of grid and patches, and its models, whose pretraining is estimated.
    plan
        The dataset.
    own
        A dataset's results whose measurements take the place of those that come with the package.
    form
        `table` for people; `tsv` has the data stages alone, `json` everything.

    Raises
    ------
    InputError
        When a count is below 1, or the measurements are of other settings, or there are none.
    """
    wrong = [name for name, count in asdict(plan).items() if count < 1]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: must be at least 1")
    measured = read_measured() if own is None else read_own(own)
    refuse_other_settings(config, measured)
    stages = estimate_stages(plan, measured)
    training = estimate_training(config, plan, measured)
    if form == "tsv":
        return stages.to_csv(sep="\t", index=False, na_rep="n/a").rstrip()
    notes = _notes(plan, measured, list(config.models), training)
    if form == "json":
        rows = json.loads(stages.to_json(orient="records"))
        facts = {"plan": asdict(plan), "measured": measured.where, "notes": notes}
        return json.dumps({**facts, "stages": rows, "training": training}, indent=2)
    return "\n".join([_head(plan), "", *_as_table(stages), "", *notes])


def _head(plan: Plan) -> str:
    return (
        f"{plan.subjects:,} subjects x {plan.runs} runs x {plan.volumes} volumes, "
        f"{plan.subjects_per_job} subjects a job (compute.batches: {plan.jobs})"
    )


def _as_table(stages: pd.DataFrame) -> list[str]:
    head = ["stage", "files/run", "MB/run", "files", "with folders", "TB", "jobs"]
    head += ["core hours", "hours/job", "MB memory"]
    rows = [head]
    for row in stages.to_dict("records"):
        cells = [row["files_per_run"], row["bytes_per_run"] / 1e6, row["files"], row["inodes"]]
        cells += [row["bytes"] / 1e12, row["jobs"], row["core_hours"], row["hours_per_job"]]
        rows.append([row["stage"], *(_number(cell) for cell in [*cells, row["peak_mb"]])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def _number(value: float) -> str:
    if math.isnan(value):
        return "n/a"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _notes(
    plan: Plan, measured: Measured, models: Sequence[str], training: Sequence[dict[str, Any]]
) -> list[str]:
    """What is extrapolated, and the training."""
    lengths = sorted({point.volumes for point in measured.points})
    shown = ", ".join(f"{length:g}" for length in lengths)
    notes = [
        f"Measured were runs of {shown} volumes ({measured.where}); {plan.all_runs:,} runs are in "
        "proportion. A file system that many share may take longer."
    ]
    if plan.volumes not in lengths:
        how = "lies between them" if lengths[0] < plan.volumes < lengths[-1] else "is extrapolated"
        notes.append(f"A run of {plan.volumes} volumes {how}.")
    notes += [
        f"Pretraining {row['model']}: {row['windows']:,} windows ({row['passes']:.2g} passes over "
        f"all runs) take {_number(row['hours'])} hours on {row['device']}."
        for row in training
    ]
    without = [name for name in models if name not in {row["model"] for row in training}]
    if without:
        notes.append(
            f"Pretraining {', '.join(without)}: not measured. Train a few hundred steps, and give "
            "the results by --measured."
        )
    return notes
