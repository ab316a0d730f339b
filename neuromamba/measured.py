"""Measurements of what the data stages make and take, from which `estimate` computes.

Those that come with the package are of one machine (`measured.yaml`, which
`benchmarks/stage_sizes.py` writes). Better are those of the user's own machine: a few finished
batches suffice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.config.load import read_yaml
from neuromamba.files import InputError
from neuromamba.stages import BATCHED
from neuromamba.tables import read_table

MEASURED = Path(__file__).with_name("measured.yaml")


@dataclass(frozen=True)
class Point:
    """What one stage made of a run of `volumes` volumes, and took for it.

    `folders` are those of its store, which quotas count too. `seconds` by the clock and
    `cpu_seconds` of processor time are for a run without the start of a job, which takes
    `start_seconds`; NaN where they were not measured.
    """

    stage: str
    volumes: float
    files: float
    folders: float
    bytes: float
    seconds: float = math.nan
    cpu_seconds: float = math.nan
    start_seconds: float = 0.0
    peak_mb: float = math.nan


@dataclass(frozen=True)
class Speed:
    """The speed of a training: which model, on what; of a model without tokens, in windows."""

    model: str
    device: str
    tokens_per_second: float = math.nan
    windows_per_second: float = math.nan


@dataclass(frozen=True)
class Measured:
    """A set of measurements: where and when they were taken, and with which settings if known."""

    where: str
    points: list[Point]
    tokens_per_time_patch: float = math.nan
    training: list[Speed] = field(default_factory=list)
    settings: dict[str, Any] | None = None


def read_measured(path: Path = MEASURED) -> Measured:
    """The measurements that come with the package."""
    raw = read_yaml(path)
    return Measured(
        where=f"{raw['where']}, {raw['date']}",
        points=[Point(**row) for row in raw["stages"]],
        tokens_per_time_patch=raw["tokens_per_time_patch"],
        training=[Speed(**row) for row in raw.get("training", [])],
        settings=raw["settings"],
    )


def read_own(folder: Path, logs: Path = Path("logs")) -> Measured:
    """Measurements from a dataset's own results.

    Parameters
    ----------
    folder
        `{results}/{dataset}`, where some batches of the data stages have finished.
    logs
        Where the workflow's benchmark files lie: `{logs}/{folder}/{stage}/batch-*.benchmark.tsv`.

    Raises
    ------
    InputError
        When a stage has no manifest with digests there. Of a dataset of ROI series (one that has
        no `volumes`) `rois` is the only one.
    """
    folders = {point.stage: point.folders for point in read_measured().points}  # always the same
    of_images = (folder / "volumes").exists() or not (folder / "rois").exists()
    stages = BATCHED if of_images else ("rois",)
    lengths = _usable(folder, stages[0]).set_index("run")["n_volumes"].astype(float)
    points = []
    for stage in stages:
        table = _usable(folder, stage)
        sizes = {name: float(table[name].mean()) for name in ("files", "bytes")}
        times = _times(logs / folder / stage, folder / stage)
        volumes = float(lengths.reindex(table["run"]).mean())
        points.append(Point(stage, volumes, folders=folders[stage], **sizes, **times))
    tokens = math.nan
    if of_images:
        tokens = float(_usable(folder, "tokens")["n_tokens"].astype(float).mean())
    return Measured(f"{folder} itself", points, tokens, _own_speeds(folder))


def _usable(folder: Path, stage: str) -> pd.DataFrame:
    """The runs that the manifests of a stage list, with their sizes."""
    tables = [read_table(path, dtype={"run": str}) for path in (folder / stage).glob("batch-*.tsv")]
    tables = [table[table["reason"].isna()] for table in tables if "bytes" in table]
    if not sum(map(len, tables)):
        raise InputError(
            f"{folder / stage} has no batch-*.tsv with digests; finish a batch of the stage "
            f"`{stage}` first, or leave out --measured"
        )
    return pd.concat(tables, ignore_index=True)


def _times(benchmarks: Path, manifests: Path) -> dict[str, float]:
    """Seconds a run and most memory, by Snakemake's benchmark files of batches that have one."""
    rows = []
    for path in benchmarks.glob("batch-*.benchmark.tsv"):
        manifest = manifests / path.name.replace(".benchmark", "")
        if manifest.exists():
            numbers = read_table(path, na_values=["-", "NA", "n/a"]).iloc[-1]
            rows.append({**numbers, "runs": len(read_table(manifest))})
    if not rows:
        return {}
    table = pd.DataFrame(rows)
    runs = table["runs"].sum()
    return {
        "seconds": float(table["s"].sum() / runs),
        "cpu_seconds": float(table["cpu_time"].sum() / runs),
        "peak_mb": float(table["max_rss"].max()),
    }


def _own_speeds(folder: Path) -> list[Speed]:
    """Speeds of the pretrainings in a dataset's results, from their logs."""
    speeds: dict[str, Speed] = {}
    for path in sorted(folder.glob("*/seed-*/pretrain/**/metrics.jsonl")):
        rows = pd.read_json(path, lines=True)
        model = path.relative_to(folder).parts[0]
        for column, what in (("tokens", "tokens"), ("samples", "windows")):
            found = rows.get(f"{column}_per_second", pd.Series(dtype=float)).median()
            if model not in speeds and not math.isnan(found):
                speeds[model] = Speed(model, str(path), **{f"{what}_per_second": float(found)})
    return list(speeds.values())
