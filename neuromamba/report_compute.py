"""What the results took: time, processors, memory and devices, as far as it was recorded.

Snakemake writes a benchmark file of each job; a training records its own speed and memory as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from neuromamba.collect import Training
from neuromamba.config import Config
from neuromamba.stages import STAGES
from neuromamba.tables import read_table
from neuromamba.verdicts import number

SUFFIX = ".benchmark.tsv"


def read_benchmarks(config: Config, logs: Path = Path("logs")) -> pd.DataFrame:
    """A row for each job that has a benchmark file under `logs`, in the form of the rules.

    Returns
    -------
    pandas.DataFrame
        `stage`; `seconds` by the clock and `cpu_seconds` of processor time; `peak_mb`, the most
        memory in MB. Missing where Snakemake could not measure it, as of jobs of milliseconds.
    """
    root = Path(f"{logs}/{config.results}")
    rows = []
    for name in [*config.datasets, *config.mixtures]:
        for path in sorted((root / name).rglob(f"*{SUFFIX}")):
            # A job that was repeated has several rows, of which the last made what is there.
            row = read_table(path, na_values=["-", "NA", "n/a"]).iloc[-1]
            stage = _stage_of(path.relative_to(root / name))
            rows.append((stage, row.get("s"), row.get("cpu_time"), row.get("max_rss")))
    return pd.DataFrame(rows, columns=["stage", "seconds", "cpu_seconds", "peak_mb"])


def _stage_of(path: Path) -> str:
    """The stage of a benchmark file: `tokens/batch-0...`, `{model}/seed-0/finetune/sex...`."""
    parts = [part.removesuffix(SUFFIX) for part in path.parts]
    if len(parts) > 2 and parts[1].startswith("seed-"):
        return parts[2]
    return parts[0]


def describe_jobs(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows of the table of jobs, in the order of the pipeline, and their sum."""
    order = {name: k for k, name in enumerate(STAGES)}
    found = sorted(table["stage"].unique(), key=lambda name: (order.get(name, len(order)), name))
    parts = [(name, table[table["stage"] == name]) for name in found]
    return [_of_jobs(name, part) for name, part in [*parts, ("all", table)]] if parts else []


def _of_jobs(name: str, table: pd.DataFrame) -> dict[str, str]:
    return {
        "stage": name,
        "jobs": number(len(table)),
        "time": duration(table["seconds"].sum()),
        "cpu": duration(table["cpu_seconds"].sum(min_count=1)),
        "memory": memory(table["peak_mb"].max()),
    }


def describe_trainings(trainings: Sequence[Training]) -> list[dict[str, str]]:
    """A row for each dataset, stage and model: its trainings (seeds, folds) together."""
    groups: dict[tuple[str, str, str], list[Training]] = {}
    for training in trainings:
        key = (training.dataset, training.stage, training.model)
        groups.setdefault(key, []).append(training)
    return [_of_trainings(*key, group) for key, group in groups.items()]


def _of_trainings(dataset: str, stage: str, model: str, group: list[Training]) -> dict[str, str]:
    rows = [t.metrics[t.metrics["split"] == "train"] for t in group]
    infos = [training.info for training in group]
    processes = {int(info["processes"]) for info in infos if "processes" in info}
    return {
        "name": f"{dataset}, {stage}, {model}",
        "trainings": number(len(group)),
        "parameters": number(infos[0].get("parameters")),
        "steps": " or ".join(number(step) for step in sorted({int(i["step"]) for i in infos})),
        "time": duration(sum(_values(rows, "seconds", "max"))),
        "speed": f"{_median(_values(rows, 'tokens_per_second', 'median')):,.0f}",
        "memory": memory(max(_values(rows, "peak_memory_mib", "max"), default=float("nan"))),
        "device": ", ".join(sorted({str(info.get("device", "not recorded")) for info in infos})),
        "processes": " or ".join(number(count) for count in sorted(processes)) or "n/a",
    }


def _values(rows: Sequence[pd.DataFrame], column: str, of: str) -> list[float]:
    return [
        float(getattr(t[column], of)()) for t in rows if column in t and t[column].notna().any()
    ]


def _median(values: Sequence[float]) -> float:
    return float(pd.Series(values, dtype=float).median())


def duration(seconds: float) -> str:
    """Seconds in the unit that gives a short number; `n/a` where there is none."""
    if pd.isna(seconds):
        return "n/a"
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{number(seconds / size, 1)} {unit}"
    return f"{number(seconds, 1)} s"


def memory(mib: float) -> str:
    """MiB in words; `n/a` where there is none."""
    if pd.isna(mib):
        return "n/a"
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
