"""Work through the runs of one batch job: progress, resuming, and runs that must be left out."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.tables import read_table, write_table

MANIFEST_COLUMNS = ["run", "reason"]


def batch_of(subject: str, batches: int) -> int:
    """The batch job that works on a subject's runs, whoever else is in the dataset."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8]) % batches


def process_runs(
    stage: str,
    runs: Sequence[str],
    make: Callable[[str], dict[str, Any]],
    manifest: Path,
    max_excluded: float,
) -> pd.DataFrame:
    """Call `make(run)` for each run and write the manifest of what was made and what was not.

    `make` returns facts for the run's row (it skips work that is already whole), or raises
    `InputError` to leave the run out: the message becomes the row's `reason` and the other runs
    go on. Any other error stops the stage.

    Returns
    -------
    pandas.DataFrame
        Columns `run`, `reason` (missing where the run was made), and the facts.

    Raises
    ------
    InputError
        When more than the share `max_excluded` of the runs had to be left out, or when the disk
        is full. No manifest is written then.
    """
    rows: list[dict[str, Any]] = []
    for run in tqdm(runs, desc=stage, unit="run", mininterval=1.0):
        try:
            rows.append({"run": run, "reason": None, **make(run)})
        except InputError as error:
            rows.append({"run": run, "reason": " ".join(str(error).split())})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{manifest.parent}: the disk is full while writing {run}; free some space and "
                "start again: finished runs are kept"
            ) from error
    table = pd.DataFrame(rows, columns=[*MANIFEST_COLUMNS, *_facts(rows)])
    refuse_if_too_many_excluded(stage, table, max_excluded)
    write_table(manifest, table)
    return table


def refuse_if_too_many_excluded(stage: str, table: pd.DataFrame, max_excluded: float) -> None:
    """Raise `InputError` with the reasons when too large a share of the rows has one."""
    bad = table[table["reason"].notna()]
    if len(bad) and (len(bad) > max_excluded * len(table) or len(bad) == len(table)):
        reasons = "\n".join(f"  {run}: {reason}" for run, reason in bad[MANIFEST_COLUMNS].values)
        raise InputError(
            f"{stage}: {len(bad)} of {len(table)} runs cannot be used, more than "
            f"compute.max_excluded = {max_excluded:g} allows:\n{reasons}"
        )


def read_manifest(layout: Layout, stage: str, batch: int) -> pd.DataFrame:
    """The runs that a batch job made or left out: columns `run`, `reason`, and facts."""
    return read_table(layout.manifest(stage, batch), dtype={"run": str, "reason": str})


def usable_runs(manifests: Sequence[Path]) -> list[str]:
    """The runs that the manifests (or the index) list without a reason to leave them out."""
    tables = [read_table(path, dtype={"run": str, "reason": str}) for path in manifests]
    return sorted(run for t in tables for run in t.loc[t["reason"].isna(), "run"])


def _facts(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if key not in MANIFEST_COLUMNS))
