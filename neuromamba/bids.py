"""Index the runs of an fMRIPrep-like derivatives folder, or of one with tables of ROI series.

Only names, sidecars and NIfTI headers are read here, and of tables the first line and the number of
the others. What can be told from them about a run that cannot be used stands in its row's `reason`;
the data itself is checked where it is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
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
from neuromamba.series_table import glimpse_table
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
        used (missing if it can). Of ROI series, `bold` is the table.

    Raises
    ------
    InputError
        When the folder does not exist or has no such runs, or `exclude` leaves none.
    """
    _sidecars_in.cache_clear()
    groups = group_runs(dataset)
    with ThreadPoolExecutor(READERS) as pool:
        rows = pool.map(lambda group: _row(group, dataset), groups)
        shown = tqdm(rows, total=len(groups), desc="index", unit="run", mininterval=1.0)
        found = list(shown)
    _leave_out_other_regions(found)
    return pd.DataFrame(found, columns=INDEX_COLUMNS).astype(INDEX_TYPES)


def _leave_out_other_regions(rows: Sequence[dict[str, Any]]) -> None:
    """Give a reason to the tables that have not the regions that most tables have."""
    named = [row for row in rows if "regions" in row and "reason" not in row]
    if not named:
        return
    # Of kinds that are equally many, the one that comes first.
    common = Counter(row["regions"] for row in named).most_common(1)[0][0]
    for row in named:
        if row["regions"] != common:
            row["reason"] = (
                f"other regions: {row['bold']} {_differ(row['regions'], common)} as most tables of "
                "the dataset; make it anew by the same segmentation, or leave out the others by "
                "entities or exclude in the dataset YAML"
            )


@lru_cache(maxsize=64)
def _one_copy(regions: tuple[str, ...]) -> tuple[str, ...]:
    """The same object for equal names, which thousands of tables have."""
    return regions


def _differ(regions: Sequence[str], common: Sequence[str]) -> str:
    if len(regions) != len(common):
        return f"has {len(regions)} columns, not {len(common)}"
    if set(regions) == set(common):
        return "has not its columns in the same order"
    first = next(name for name in regions if name not in set(common))
    return f"has a column {first!r} and not the same columns"


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
        if dataset.series is not None:
            regions, row["n_volumes"] = glimpse_table(run.bold)
            row["regions"] = _one_copy(tuple(regions))
            row["repetition_time"] = _repetition_time(run, dataset)
            return row
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


def _repetition_time(run: FoundRun, dataset: Dataset, in_header: float | None = None) -> float:
    """From the sidecars, nearest first; else from the dataset YAML; never from the header.

    Tools that rewrite an image often leave 1 s in its header, so that it cannot be trusted.
    """
    for sidecar in _sidecars(run, dataset):
        metadata = read_json(sidecar)
        if not isinstance(metadata, dict):
            continue
        if "RepetitionTime" in metadata:
            return check_repetition_time(metadata["RepetitionTime"], sidecar)
        if dataset.series is not None and "SamplingFrequency" in metadata:
            return check_repetition_time(_period(metadata["SamplingFrequency"]), sidecar)
    if dataset.repetition_time is not None:
        return dataset.repetition_time
    if dataset.series is not None:
        asked, told = "RepetitionTime or SamplingFrequency", ""
    else:
        header = "has none" if in_header is None else f"says {in_header:g} s"
        asked, told = "RepetitionTime", f" (the NIfTI header {header})"
    raise InputError(
        f"missing TR: no sidecar of {run.bold} has {asked}; set repetition_time in the dataset "
        f"YAML{told}"
    )


def _period(frequency: Any) -> Any:
    """Seconds for a frequency in Hz; what is no frequency stays, and is no repetition time."""
    number = isinstance(frequency, (int, float)) and not isinstance(frequency, bool)
    return 1 / frequency if number and frequency > 0 else f"SamplingFrequency {frequency!r}"


def _sidecars(run: FoundRun, dataset: Dataset) -> Iterable[str]:
    """JSON files that apply to the run by the BIDS inheritance principle, most specific first."""
    if run.sidecar:
        yield run.sidecar
    if dataset.files is not None:
        return
    suffix = "_bold.json" if dataset.series is None else "_timeseries.json"
    of_run = set(run.entities.items())
    if dataset.series is None:
        of_run.add(("desc", "preproc"))
    root = Path(dataset.derivatives)
    for folder in Path(run.bold).parents:
        applicable = [
            (len(entities), path)
            for path, entities in _sidecars_in(str(folder), suffix)
            if entities <= of_run and path != run.sidecar
        ]
        yield from (path for _, path in sorted(applicable, reverse=True))
        if folder == root:
            return


@lru_cache(maxsize=1024)
def _sidecars_in(folder: str, suffix: str) -> list[tuple[str, frozenset[tuple[str, str]]]]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name == suffix[1:] or e.name.endswith(suffix)]
    return [
        (f"{folder}/{name}", frozenset(entities_of(name.removesuffix(suffix)).items()))
        for name in names
    ]
