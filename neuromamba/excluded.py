"""Every run that a stage left out, with the reason, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from neuromamba.config import Config
from neuromamba.layout import Layout
from neuromamba.qc_rules import left_out
from neuromamba.stage import read_manifest, refuse_if_too_many_excluded
from neuromamba.stages import BATCHED
from neuromamba.tables import read_table, write_table


def list_excluded(
    index: pd.DataFrame,
    layout: Layout,
    batches: int,
    bad: Mapping[str, str] | None = None,
    stages: Sequence[str] = BATCHED,
) -> pd.DataFrame:
    """Every run that one of `stages` left out, or whose quality is `bad`: `run`, `stage`, `reason`.

    `index` is the first that may leave out a run.
    """
    tables = [index.assign(stage="index")]
    for stage in stages:
        tables += [read_manifest(layout, stage, k).assign(stage=stage) for k in range(batches)]
    quality = pd.DataFrame((bad or {}).items(), columns=["run", "reason"])
    tables.append(quality.assign(stage="qc"))
    rows = pd.concat([table[["run", "stage", "reason"]] for table in tables], ignore_index=True)
    return rows[rows["reason"].notna()].sort_values("run", kind="stable", ignore_index=True)


def run_excluded(config: Config, dataset: str) -> None:
    """Write `excluded.tsv` over all data stages.

    Raises
    ------
    InputError
        When too many runs were left out by all stages together.
    """
    layout, batches = Layout.of(config, dataset), config.compute.batches
    index = read_table(layout.index, dtype={"run": str, "subject": str, "reason": str})
    bad, stages = left_out(config, dataset), config.datasets[dataset].arrays
    excluded = list_excluded(index, layout, batches, bad, stages)
    write_table(layout.excluded, excluded)
    first = excluded.drop_duplicates("run").set_index("run")["reason"]
    union = pd.DataFrame({"run": index["run"], "reason": index["run"].map(first)})
    refuse_if_too_many_excluded("all stages", union, config.compute.max_excluded)
