"""Index the runs of an fMRIPrep-like derivatives folder.

Only names, sidecars and NIfTI headers are read here. What can be told from them about a run that
cannot be used stands in its row's `reason`; the image data itself is checked where it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from neuromamba.bids_scan import FoundRun, entities_of, subject_name
from neuromamba.config import Config, Dataset
from neuromamba.files import InputError, read_json
from neuromamba.headers import glimpse_series
from neuromamba.layout import Layout
from neuromamba.listing import READERS, fingerprint, group_runs
from neuromamba.raw_listing import failed_runs, raw_subjects, subject_table
from neuromamba.records import forget_batches
from neuromamba.sidecars import check_repetition_time
from neuromamba.stage import batch_of, refuse_if_too_many_excluded
from neuromamba.tables import write_table

INDEX_COLUMNS = [
    "run",
    "subject",
    "session",
    "task",
    "bold",
    "mask",
    "confounds",
    "fingerprint",
    "repetition_time",
    "n_volumes",
    "reason",
]
INDEX_TYPES = {
    **dict.fromkeys(INDEX_COLUMNS, "string"),
    "repetition_time": "Float64",
    "n_volumes": "Int64",
}


def run_index(config: Config, dataset: str) -> list[str]:
    """Write `index.tsv` of one dataset, and the part of it that each batch works on.

    `preprocess/subjects.tsv` tells how each subject was preprocessed.

    Returns
    -------
    list of str
        The subjects.
    """
    layout, batches = Layout.of(config, dataset), config.compute.batches
    table = _with_failed(config, dataset)
    refuse_if_too_many_excluded("index", table, config.compute.max_excluded)
    batch = table["subject"].map(lambda subject: batch_of(subject, batches))
    for k in range(batches):
        write_table(layout.manifest("index", k), table[batch == k])
    forget_batches(config, dataset)
    how = subject_table(config, dataset, table)
    write_table(layout.preprocess("subjects").with_suffix(".tsv"), how)
    write_table(layout.index, table)
    return [str(subject) for subject in table["subject"].unique()]


def _with_failed(config: Config, dataset: str) -> pd.DataFrame:
    """The runs of a dataset, and those that could not be preprocessed, with the reasons."""
    settings = config.datasets[dataset]
    failed = failed_runs(config, dataset)
    if not len(failed):
        return index_runs(settings)
    rows = failed.reindex(columns=INDEX_COLUMNS).astype(INDEX_TYPES)
    try:
        made = index_runs(settings)
    except InputError:
        if not {*raw_subjects(config, dataset)} <= {*failed["subject"]}:
            raise
        return rows  # whose reasons say more than that there is nothing
    # What is broken may lie among the derivatives nevertheless.
    made = made[~made["run"].isin(rows["run"])]
    table = pd.concat([made, rows], ignore_index=True)
    return table.sort_values("run", kind="stable", ignore_index=True)


def index_runs(dataset: Dataset) -> pd.DataFrame:
    """One row for each run that the dataset's settings select.

    Returns
    -------
    pandas.DataFrame
        Sorted by run, with the columns `INDEX_COLUMNS`: the run's name (its BIDS entities), the
        subject (`sub-01`), labels of session and task, paths, a fingerprint of the files, the
        repetition time in seconds, the number of volumes, and the reason why the run cannot be
        used (missing if it can).

    Raises
    ------
    InputError
        When the folder does not exist or has no such runs, or `exclude` leaves none.
    """
    _bold_sidecars.cache_clear()
    groups = group_runs(dataset)
    with ThreadPoolExecutor(READERS) as pool:
        rows = pool.map(lambda group: _row(group, dataset), groups)
        shown = tqdm(rows, total=len(groups), desc="index", unit="run", mininterval=1.0)
        table = pd.DataFrame(list(shown), columns=INDEX_COLUMNS)
    return table.astype(INDEX_TYPES)


def _row(group: list[FoundRun], dataset: Dataset) -> dict[str, Any]:
    run = group[0]
    row: dict[str, Any] = {
        "run": run.name,
        "subject": subject_name(run.entities["sub"]),
        "session": run.entities.get("ses"),
        "task": run.entities.get("task"),
        "bold": run.bold,
        "mask": run.mask if run.has_mask else None,
        "confounds": run.confounds,
        "fingerprint": fingerprint(group),
    }
    try:
        _refuse_duplicates(group)
        if not run.has_mask:
            raise InputError(
                f"no brain mask: {run.mask} does not exist; add it, or repeat the preprocessing"
            )
        header = glimpse_series(run.bold)
        row["n_volumes"] = header.shape[3]
        row["repetition_time"] = _repetition_time(run, dataset, header.repetition_time)
    except InputError as error:
        row["reason"] = " ".join(str(error).split())
    return row


def _refuse_duplicates(group: list[FoundRun]) -> None:
    if len(group) > 1:
        raise InputError(
            f"duplicate run: {len(group)} files ({', '.join(run.bold for run in group)}); keep "
            "one, or choose by resolution, entities or exclude in the dataset YAML"
        )


# --- Repetition time ----------------------------------------------------------------------------


def _repetition_time(run: FoundRun, dataset: Dataset, in_header: float | None) -> float:
    """From the sidecars, nearest first; else from the dataset YAML; never from the header.

    Tools that rewrite an image often leave 1 s in its header, so that it cannot be trusted.
    """
    for sidecar in _sidecars(run, dataset):
        metadata = read_json(sidecar)
        if isinstance(metadata, dict) and "RepetitionTime" in metadata:
            return check_repetition_time(metadata["RepetitionTime"], sidecar)
    if dataset.repetition_time is not None:
        return dataset.repetition_time
    header = "has none" if in_header is None else f"says {in_header:g} s"
    raise InputError(
        f"missing TR: no sidecar of {run.bold} has RepetitionTime; set repetition_time in the "
        f"dataset YAML (the NIfTI header {header})"
    )


def _sidecars(run: FoundRun, dataset: Dataset) -> Iterable[str]:
    """JSON files that apply to the run by the BIDS inheritance principle, most specific first."""
    if run.sidecar:
        yield run.sidecar
    if dataset.files is not None:
        return
    of_run = set(run.entities.items()) | {("desc", "preproc")}
    root = Path(dataset.derivatives)
    for folder in Path(run.bold).parents:
        applicable = [
            (len(entities), path)
            for path, entities in _bold_sidecars(str(folder))
            if entities <= of_run and path != run.sidecar
        ]
        yield from (path for _, path in sorted(applicable, reverse=True))
        if folder == root:
            return


@lru_cache(maxsize=1024)
def _bold_sidecars(folder: str) -> list[tuple[str, frozenset[tuple[str, str]]]]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name == "bold.json" or e.name.endswith("_bold.json")]
    return [
        (f"{folder}/{name}", frozenset(entities_of(name.removesuffix("_bold.json")).items()))
        for name in names
    ]
