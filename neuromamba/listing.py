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
from neuromamba.files import InputError, digest_file, digest_json, write_json
from neuromamba.tables import write_table

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


def write_manifest(dataset: Dataset, name: str) -> Path:
    """Write the listing to `data/{name}/manifest.tsv`, which DVC watches in place of the scans.

    Beside it, `outside.json` has the digests of the table of subjects and of the atlas.

    Raises
    ------
    InputError
        When the scans are in `data/{name}` themselves, or cannot be listed.
    """
    path = Path("data") / name / "manifest.tsv"
    if Path(dataset.derivatives).resolve().is_relative_to(path.parent.resolve()):
        raise InputError(
            f"{dataset.derivatives}: DVC can watch these scans themselves, so they need no "
            f"manifest: dvc add {path.parent}"
        )
    table = list_runs_of(dataset)
    write_table(path, table)
    participants = dataset.participants.file if dataset.participants else None
    outside = {"participants": participants, "atlas": dataset.atlas}
    digests = {key: file and digest_file(file) for key, file in outside.items()}
    write_json(path.with_name("outside.json"), digests)
    print(f"{path}: {len(table)} runs")
    return path


def group_runs(dataset: Dataset) -> list[list[FoundRun]]:
    """The selected files by run, in the order of their names; a run should have one."""
    runs = _without_excluded(find_runs(dataset), dataset)
    return [list(group) for _, group in groupby(runs, key=lambda run: run.name)]


def fingerprint(group: Sequence[FoundRun]) -> str:
    """16 hexadecimal digits that change with the names or the content of a run's files.

    Content is told by size and `SAMPLE` bytes in two places: for gzip files that is certain to
    the strength of their checksum; other images may be changed in between without a trace. Where
    the files lie and when they were written does not count.
    """
    files = [
        path for run in group for path in (run.bold, run.mask, run.sidecar, run.confounds) if path
    ]
    return digest_json([[Path(path).name, *_sample(path)] for path in files])[:16]


def _sample(path: str) -> tuple[int, str]:
    # Not a CRC, which is the same for all content that stands beside its own CRC.
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            middle = [] if path.endswith(".gz") else [size // 2]
            for start in (*middle, max(0, size - SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    except OSError:
        return (-1, "")  # the index tells what is wrong with it
    return (size, digest.hexdigest())


def _without_excluded(runs: list[FoundRun], dataset: Dataset) -> list[FoundRun]:
    """Leave out what `exclude` names: a subject, a subject's session, or a run."""
    stems = {
        entry: entry if entry.startswith("sub-") else subject_name(entry)
        for entry in dataset.exclude
    }
    kept = [run for run in runs if not any(_is_part(run.name, stem) for stem in stems.values())]
    useless = [
        entry for entry, stem in stems.items() if not any(_is_part(run.name, stem) for run in runs)
    ]
    if useless:
        warnings.warn(
            f"{dataset.derivatives}: exclude names {', '.join(useless)}, which no run belongs to",
            stacklevel=3,
        )
    if not kept:
        raise InputError(f"{dataset.derivatives}: exclude in the dataset YAML leaves no run")
    return kept


def _is_part(run: str, stem: str) -> bool:
    return run == stem or run.startswith(f"{stem}_")
