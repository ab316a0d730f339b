"""Which runs the config's rules of quality leave out, told from the tables of the `qc` stage.

The rules are applied here and not where quality is measured, so that a changed limit measures
nothing again. Planning reads this module, so it loads no numerical library but pandas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from neuromamba.config import Config, Qc
from neuromamba.layout import Layout
from neuromamba.tables import read_table

RULES = {
    "max_mean_fd": ("mean_fd", "mean FD", " mm"),
    "max_high_motion": ("high_motion", "share of volumes with high motion", ""),
    "min_minutes": ("minutes_low_motion", "time with low motion", " min"),
    "min_coverage": ("coverage", "coverage of the template's brain", ""),
    "min_correlation": ("correlation", "correlation with the template", ""),
    "min_tsnr": ("tsnr", "median tSNR", ""),
}
"""Key of the config -> the metric that it limits (a column), its name in words, its unit."""
OF_MOTION = ("max_mean_fd", "max_high_motion", "min_minutes")
"""Rules that need framewise displacement, and so the run's confounds."""


def rules_of(qc: Qc) -> dict[str, float]:
    """The rules that apply, with their limits."""
    limits = {name: getattr(qc, name) for name in RULES}
    return {name: limit for name, limit in limits.items() if limit is not None}


def has_rules(config: Config) -> bool:
    """Whether any run may be left out for its quality."""
    return bool(rules_of(config.qc))


def broken_rules(metrics: Mapping[str, Any], qc: Qc) -> dict[str, str]:
    """The rules that a run does not meet, each with the reason in words.

    A run whose motion is unknown meets no rule about motion.
    """
    broken = {}
    for name, limit in rules_of(qc).items():
        metric, words, unit = RULES[name]
        value = metrics.get(metric)
        if value is None or pd.isna(value):
            broken[name] = f"qc.{name} = {limit:g} asks for the {words}, which is unknown"
            if name in OF_MOTION:
                broken[name] += f": {_note(metrics)}"
        elif (value > limit) if name.startswith("max_") else (value < limit):
            side = "over" if name.startswith("max_") else "under"
            broken[name] = f"{words} is {value:.4g}{unit}, {side} qc.{name} = {limit:g}"
    return broken


def _note(metrics: Mapping[str, Any]) -> str:
    note = metrics.get("motion_note")
    return "there are no confounds" if note is None or pd.isna(note) else str(note)


def left_out(config: Config, dataset: str) -> dict[str, str]:
    """The runs of a dataset that the rules leave out, with the reasons; empty without rules.

    A run whose quality could not be measured is left out too, as long as there is any rule.

    Raises
    ------
    InputError
        When there are rules, and the quality of a batch has not been measured yet.
    """
    if not has_rules(config):
        return {}
    table = read_quality(config, dataset)
    reasons = {}
    for row in table.to_dict("records"):
        if isinstance(row["reason"], str):
            reasons[str(row["run"])] = f"its quality could not be measured: {row['reason']}"
        elif broken := broken_rules({str(name): value for name, value in row.items()}, config.qc):
            reasons[str(row["run"])] = "; ".join(broken.values())
    return reasons


def read_quality(config: Config, dataset: str) -> pd.DataFrame:
    """What the `qc` stage measured: a row for each run of all batches, sorted by run.

    Raises
    ------
    InputError
        When the table of a batch is missing.
    """
    layout = Layout.of(config, dataset)
    text = {"run": str, "reason": str, "motion_note": str, "key": str}
    paths = [layout.manifest("qc", batch) for batch in range(config.compute.batches)]
    tables = [read_table(path, dtype=text) for path in paths]
    rows = [table for table in tables if len(table)] or tables[:1]
    return pd.concat(rows, ignore_index=True).sort_values("run", ignore_index=True)
