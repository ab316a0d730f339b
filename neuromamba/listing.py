"""What a dataset holds, told from names and file ends alone: fast enough for every start.

The workflow compares this list with the index to see which runs are new or have changed.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import pandas as pd

from neuromamba.bids_scan import FoundRun, find_runs, subject_name
from neuromamba.config import Dataset
from neuromamba.files import InputError, digest_json
from neuromamba.series_scan import find_series

LISTING_COLUMNS = ["run", "subject", "fingerprint"]
READERS = 8
"""Threads that read: on a network file system each read waits for the server."""
SAMPLE = 4096
"""Bytes that are read at the end of a file, and in the middle if it is not compressed.

The last eight bytes of a gzip file hold the checksum and the size of its content: any other content
shows."""


def list_runs_of(dataset: Dataset) -> pd.DataFrame:
    """The runs that the dataset's settings select, sorted: columns `LISTING_COLUMNS`.

    Raises
    ------
    InputError
        When the folder does not exist or has no such runs, or `exclude` leaves none.
    """
    groups = group_runs(dataset)
    with ThreadPoolExecutor(READERS) as pool:
        prints = list(pool.map(fingerprint, groups))
    rows = [
        (group[0].name, subject_name(group[0].entities["sub"]), value)
        for group, value in zip(groups, prints, strict=True)
    ]
    return pd.DataFrame(rows, columns=LISTING_COLUMNS, dtype="string")


def group_runs(dataset: Dataset) -> list[list[FoundRun]]:
    """The selected files by run, in the order of their names; a run should have one."""
    runs = _without_excluded(find_files(dataset), dataset)
    return [list(group) for _, group in groupby(runs, key=lambda run: run.name)]


def find_files(dataset: Dataset) -> list[FoundRun]:
    """The images or tables that the dataset's settings select, also those of `exclude`."""
    return find_runs(dataset) if dataset.series is None else find_series(dataset)


def fingerprint(group: Sequence[FoundRun]) -> str:
    """16 hexadecimal digits that change with the names or the content of a run's files.

    Content is told by size and `SAMPLE` bytes in two places: for gzip files that is certain to
    the strength of their checksum; other files may be changed in between without a trace. Of a
    table of series the first bytes, which name its regions, count too. Where the files lie and when
    they were written does not count.
    """
    files = [
        path for run in group for path in (run.bold, run.mask, run.sidecar, run.confounds) if path
    ]
    # What the columns of the confounds are stands in a file beside them, where there is one.
    beside = [Path(run.confounds).with_suffix(".json") for run in group if run.confounds]
    files += [str(path) for path in beside if path.exists()]
    tables = {run.bold for run in group if not run.mask}
    found = [[Path(path).name, *sample_file(path, path in tables)] for path in files]
    return digest_json(found)[:16]


def sample_file(path: str, first: bool = False) -> tuple[int, str]:
    """Size of a file and a digest of its samples; -1 and nothing if it cannot be read.

    With `first` there is a sample at the beginning too.
    """
    # Not a CRC, which is the same for all content that stands beside its own CRC.
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            middle = [] if path.endswith(".gz") else [size // 2]
            for start in (*([0] if first else []), *middle, max(0, size - SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    except OSError:
        return (-1, "")  # the index tells what is wrong with it
    return (size, digest.hexdigest())


def _without_excluded(runs: list[FoundRun], dataset: Dataset) -> list[FoundRun]:
    """Leave out what `exclude` names: a subject, a subject's session, or a run."""
    excluded, useless = find_excluded([run.name for run in runs], dataset)
    kept = [run for run in runs if run.name not in excluded]
    refuse_useless_exclude(dataset.derivatives, useless, not kept)
    return kept


def find_excluded(names: Sequence[str], dataset: Dataset) -> tuple[set[str], list[str]]:
    """Which runs or images `exclude` of the dataset YAML names, and its entries that name none."""
    excluded: set[str] = set()
    useless = []
    for entry in dataset.exclude:
        stem = entry if entry.startswith("sub-") else subject_name(entry)
        part = {name for name in names if name == stem or name.startswith(f"{stem}_")}
        excluded |= part
        useless += [] if part else [entry]
    return excluded, useless


def refuse_useless_exclude(folder: str, useless: Sequence[str], all_excluded: bool) -> None:
    """Warn of entries of `exclude` that name no run; raise `InputError` when no run is left."""
    if useless:
        warnings.warn(
            f"{folder}: exclude names {', '.join(useless)}, which no run belongs to", stacklevel=4
        )
    if all_excluded:
        raise InputError(f"{folder}: exclude in the dataset YAML leaves no run")
