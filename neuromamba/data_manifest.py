"""A list of a dataset's scans, by which DVC can watch data that it does not hold."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from neuromamba.atlases import atlas_digest
from neuromamba.config import Dataset
from neuromamba.files import InputError, digest_file, write_json
from neuromamba.listing import list_runs_of
from neuromamba.raw_bids import find_raw_subjects, fingerprint_subject
from neuromamba.tables import write_table


def write_manifest(dataset: Dataset, name: str) -> Path:
    """Write the listing to `data/{name}/manifest.tsv`, which DVC watches in place of the scans.

    It has a row for each run, or for each subject of raw scans. Beside it, `outside.json` has the
    digests of the table of subjects and of the atlas.

    Raises
    ------
    InputError
        When the scans are in `data/{name}` themselves, or cannot be listed.
    """
    path = Path("data") / name / "manifest.tsv"
    scans = Path(dataset.bids or dataset.derivatives)
    if scans.resolve().is_relative_to(path.parent.resolve()):
        raise InputError(
            f"{scans}: DVC can watch these scans themselves, so they need no "
            f"manifest: dvc add {path.parent}"
        )
    table = _list_subjects(dataset) if dataset.bids else list_runs_of(dataset)
    write_table(path, table)
    participants = dataset.participants.file if dataset.participants else None
    digests = {
        "participants": participants and digest_file(participants),
        "atlas": dataset.atlas and atlas_digest(dataset.atlas),
    }
    write_json(path.with_name("outside.json"), digests)
    print(f"{path}: {len(table)} {'subjects' if dataset.bids else 'runs'}")
    return path


def _list_subjects(dataset: Dataset) -> pd.DataFrame:
    root = Path(str(dataset.bids))
    rows = [(one.name, fingerprint_subject(root, one)) for one in find_raw_subjects(dataset)]
    return pd.DataFrame(rows, columns=["subject", "fingerprint"], dtype="string")
