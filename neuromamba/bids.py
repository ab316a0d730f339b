"""Index the runs of an fMRIPrep-like derivatives folder.

Only names, sidecars and NIfTI headers are read here. What can be told from them about a run that
cannot be used stands in its row's `reason`; the image data itself is checked where it is read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import pandas as pd
from tqdm import tqdm

from neuromamba.bids_scan import FoundRun, entities_of, subject_name
from neuromamba.config import Config, Dataset
from neuromamba.files import InputError, read_json
from neuromamba.layout import Layout
from neuromamba.listing import READERS, fingerprint, group_runs
from neuromamba.records import forget_batches
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
HEADER_BYTES = 544
LONGEST_REPETITION_TIME = 30.0
SECONDS_PER_UNIT = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}


def run_index(config: Config, dataset: str) -> list[str]:
    """Write `index.tsv` of one dataset, and beside it the part of it that each batch works on.

    Returns
    -------
    list of str
        The subjects.
    """
    layout, batches = Layout.of(config, dataset), config.compute.batches
    table = index_runs(config.datasets[dataset])
    refuse_if_too_many_excluded("index", table, config.compute.max_excluded)
    batch = table["subject"].map(lambda subject: batch_of(subject, batches))
    for k in range(batches):
        write_table(layout.manifest("index", k), table[batch == k])
    forget_batches(config, dataset)
    write_table(layout.index, table)
    return [str(subject) for subject in table["subject"].unique()]


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
    text = {column: "string" for column in INDEX_COLUMNS}
    return table.astype({**text, "repetition_time": "Float64", "n_volumes": "Int64"})


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
        row["n_volumes"], in_header = _read_header(run.bold)
        row["repetition_time"] = _repetition_time(run, dataset, in_header)
    except InputError as error:
        row["reason"] = " ".join(str(error).split())
    return row


def _refuse_duplicates(group: list[FoundRun]) -> None:
    if len(group) > 1:
        raise InputError(
            f"duplicate run: {len(group)} files ({', '.join(run.bold for run in group)}); keep "
            "one, or choose by resolution, entities or exclude in the dataset YAML"
        )


# --- NIfTI header -------------------------------------------------------------------------------


def _read_header(path: str) -> tuple[int, float | None]:
    """Number of volumes, and the repetition time in seconds where the header has one.

    Decompresses a few hundred bytes only; opening each file by `nibabel.load` takes ten times as
    long.
    """
    header = _parse_header(path, _first_bytes(path))
    shape = header.get_data_shape()
    if len(shape) < 4 or shape[3] == 1:
        raise InputError(
            f"{path} is 3D (shape {shape}), not a series of volumes; remove or replace it"
        )
    if len(shape) > 4:
        raise InputError(f"{path} has {len(shape)} dimensions (shape {shape}) where BOLD has 4")
    unit = SECONDS_PER_UNIT.get(header.get_xyzt_units()[1], 1.0)
    step = float(header["pixdim"][4]) * unit
    return int(shape[3]), step if step > 0 else None


def _first_bytes(path: str) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            raw = stream.read(4096)
        if not path.endswith(".gz"):
            return raw[:HEADER_BYTES]
        return zlib.decompressobj(wbits=31).decompress(raw, HEADER_BYTES)
    except FileNotFoundError:
        raise InputError(
            f"{path} is a link to content that is not here; fetch it (with DataLad: datalad get)"
        ) from None
    except (OSError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({error}): it is damaged or not gzip; copy or generate it again"
        ) from None


def _parse_header(path: str, block: bytes) -> Any:
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(block) >= size and kind.may_contain_header(block):
            return kind(block[:size], check=False)
    raise InputError(
        f"{path} has no readable NIfTI header ({len(block)} bytes could be read: truncated, or "
        "not NIfTI); copy or generate it again"
    )


# --- Repetition time ----------------------------------------------------------------------------


def _repetition_time(run: FoundRun, dataset: Dataset, in_header: float | None) -> float:
    """From the sidecars, nearest first; else from the dataset YAML; never from the header.

    Tools that rewrite an image often leave 1 s in its header, so that it cannot be trusted.
    """
    for sidecar in _sidecars(run, dataset):
        metadata = read_json(sidecar)
        if isinstance(metadata, dict) and "RepetitionTime" in metadata:
            return _checked(metadata["RepetitionTime"], sidecar)
    if dataset.repetition_time is not None:
        return dataset.repetition_time
    header = "has none" if in_header is None else f"says {in_header:g} s"
    raise InputError(
        f"missing TR: no sidecar of {run.bold} has RepetitionTime; set repetition_time in the "
        f"dataset YAML (the NIfTI header {header})"
    )


def _checked(value: Any, sidecar: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= LONGEST_REPETITION_TIME:
        raise InputError(
            f"RepetitionTime {value!r} in {sidecar} must be seconds, above 0 and at most "
            f"{LONGEST_REPETITION_TIME:g}; correct the sidecar"
        )
    return float(value)


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
