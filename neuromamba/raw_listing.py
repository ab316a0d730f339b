"""Which subjects of a raw dataset are preprocessed, one job each, and what became of them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pandas as pd

from neuromamba.config import Config, Dataset, Preprocess
from neuromamba.files import InputError, digest_json, read_json
from neuromamba.layout import Layout
from neuromamba.raw_bids import RawSubject, find_raw_subjects

FAILED_COLUMNS = ["run", "subject", "fingerprint", "reason"]
SUBJECT_COLUMNS = ["subject", "engine", "generated_by", "runs", "left_out", "minutes", "reason"]


def raw_subjects(config: Config, dataset: str) -> dict[str, RawSubject | None]:
    """The subjects with raw runs that a dataset's settings select, by name; none without `bids`.

    Where the raw scans are not at hand, they are those that have been preprocessed, as `None`.

    Raises
    ------
    InputError
        When the folder is there and holds no such run.
    """
    settings = config.datasets.get(dataset)
    if settings is None or settings.bids is None:
        return {}
    root = Path(settings.bids)
    if root.is_dir() and any(root.iterdir()):
        found = _list(settings.model_dump_json(), root.stat().st_mtime_ns)
        return {subject.name: subject for subject in found}
    folder = Layout.of(config, dataset).preprocess("x").parent
    return {path.stem: None for path in sorted(folder.glob("sub-*.json")) if _is_status(path)}


@lru_cache(maxsize=16)
def _list(settings: str, _date: int) -> list[RawSubject]:
    """Planning asks many times for the same list, which takes a second for 10,000 subjects."""
    return find_raw_subjects(Dataset.model_validate(json.loads(settings)))


def _is_status(path: Path) -> bool:
    return not path.name.endswith(".key.json")


def read_statuses(config: Config, dataset: str) -> list[dict]:
    """What became of each subject that was preprocessed, as its job wrote it."""
    layout = Layout.of(config, dataset)
    paths = [layout.preprocess(name) for name in raw_subjects(config, dataset)]
    return [read_json(path) for path in paths if path.exists()]


def limits_of(settings: Preprocess) -> dict[str, float]:
    """What a subject may fail for want of, as its status keeps it."""
    return {"memory_mb": settings.memory_mb, "time_limit": settings.time_limit}


def got_less(config: Config, dataset: str, subject: str) -> bool:
    """Whether a subject could not be preprocessed under other limits than it would have now."""
    path = Layout.of(config, dataset).preprocess(subject)
    status = read_json(path) if path.exists() else {}
    limits = limits_of(config.preprocess)
    return bool(status.get("left_out")) and status.get("limits", limits) != limits


def failed_runs(config: Config, dataset: str) -> pd.DataFrame:
    """The raw runs that preprocessing could not make: columns `FAILED_COLUMNS`.

    The fingerprint follows the reason. A subject that failed without naming its runs has one row,
    in its own name.
    """
    rows = []
    for status in read_statuses(config, dataset):
        left_out = status["left_out"]
        if status["reason"] and not left_out:
            left_out = {status["subject"]: status["reason"]}
        for run, reason in sorted(left_out.items()):
            text = " ".join(f"preprocessing: {reason}".split())
            rows.append((run, status["subject"], digest_json([run, text])[:16], text))
    return pd.DataFrame(rows, columns=FAILED_COLUMNS, dtype="string")


def subject_table(config: Config, dataset: str, index: pd.DataFrame) -> pd.DataFrame:
    """How each subject of an index was preprocessed: columns `SUBJECT_COLUMNS`.

    `minutes` is missing where this pipeline did not do it; `generated_by` is what the derivatives
    themselves say (`GeneratedBy` of `dataset_description.json`).
    """
    statuses = {status["subject"]: status for status in read_statuses(config, dataset)}
    usable = index[index["reason"].isna()].groupby("subject")["run"].size()
    described = generated_by(Path(config.datasets[dataset].derivatives))
    rows = []
    for name in sorted({*index["subject"], *statuses}):
        status = statuses.get(name, {})
        seconds = status.get("seconds")
        rows.append(
            {
                "subject": name,
                "engine": status.get("engine", "none"),
                "generated_by": status.get("generated_by") or described,
                "runs": int(usable.get(name, 0)),
                "left_out": len(status.get("left_out", {})),
                "minutes": None if seconds is None else round(seconds / 60, 2),
                "reason": status.get("reason"),
            }
        )
    return pd.DataFrame(rows, columns=SUBJECT_COLUMNS)


def generated_by(derivatives: Path) -> str | None:
    """The programs that a derivatives folder says it was made by: `fMRIPrep 25.2.0`."""
    try:
        entries = read_json(derivatives / "dataset_description.json").get("GeneratedBy", [])
    except (InputError, AttributeError):
        return None
    if not isinstance(entries, list):
        return None
    named = [entry for entry in entries if isinstance(entry, dict) and entry.get("Name")]
    words = [f"{entry['Name']} {entry.get('Version') or ''}".strip() for entry in named]
    return ", ".join(words) or None
