"""The record that a job leaves beside its result: what the result was made with.

`{output}.key.json` holds the job's `settings`, the digests of its `code` and of what lies `outside`
the results, the names of its `files`, its `recipe` and its `key`, and both without code: `plan` and
`origin` (see `neuromamba.keys`). A result without one is not whole.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from neuromamba.config import Config
from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.stages import BATCHED, BY_BATCH, Job, output_of

Record = dict[str, Any]
WHOLE_FOLDERS = (
    "pretrain",
    "cell",
    "finetune",
    "baselines",
    "evaluate",
    "forecast",
    "identify",
    "retrieve",
    "explain",
    "tokenizer",
)
"""Stages whose jobs have a folder of their own, with more files than one."""


def record_path(output: Path) -> Path:
    """Where the record of the job lies that writes `output` last."""
    return output.with_name(f"{output.stem}.key.json")


def read_record(config: Config, job: Job) -> Record:
    """The record of a job's result; empty where there is no whole result."""
    output = output_of(config, job)
    if not output.exists():
        return {}
    record = _read(record_path(output))
    if any(not output.with_name(name).exists() for name in record.get("files", [])):
        return {}
    beside = _beside_data(config, job)
    if record and beside and beside.exists() and _read(beside).get("key") != record.get("key"):
        return {}
    return {} if job.stage == "preprocess" and _is_removed(config, job) else record


def remove_record(config: Config, job: Job) -> None:
    """Tell, before a job starts, that there is no whole result of it."""
    record_path(output_of(config, job)).unlink(missing_ok=True)
    if beside := _beside_data(config, job):
        write_json(beside, {"key": None})


def write_record(config: Config, job: Job, record: Record) -> None:
    """Tell that a job has succeeded."""
    if beside := _beside_data(config, job):
        write_json(beside, {"key": record["key"]})
    output = output_of(config, job)
    write_json(record_path(output), record | {"files": _files_of(job, output)})


def _files_of(job: Job, output: Path) -> list[str]:
    """Names of the files that a job has written in one folder, all of which have to be there."""
    if job.stage not in WHOLE_FOLDERS:
        return []
    optional = {record_path(output).name, "last.safetensors"}
    files = (path for path in output.parent.iterdir() if path.is_file())
    return sorted(path.name for path in files if path.name not in optional)


def _beside_data(config: Config, job: Job) -> Path | None:
    """Where data that lie apart tell whose they are: DVC may bring back another list of them."""
    if job.stage == "preprocess":
        return _derivatives(config, job) / ".neuromamba" / f"{job.subject}.key.json"
    if config.arrays is None or job.stage not in (*BATCHED, "anat", "codes"):
        return None
    stores = Layout.of(config.in_fold(job.fold), job.dataset).array(job.stage, "run").parent
    return stores / f"batch-{job.batch}.key.json"


def _derivatives(config: Config, job: Job) -> Path:
    return Path(config.datasets[job.dataset].derivatives)


def _is_removed(config: Config, job: Job) -> bool:
    """Whether a subject's derivatives are gone, though those of others are there."""
    folder, status = _derivatives(config, job), _read(output_of(config, job))
    return bool(status.get("runs")) and folder.is_dir() and not (folder / job.subject).exists()


def _read(path: Path) -> Record:
    try:
        record = read_json(path)
    except InputError:
        return {}
    return record if isinstance(record, dict) else {}


def explain(old: Record, new: Record) -> list[str]:
    """What differs between two records of a job: its settings, or else its code; in words."""
    changes = _changes("", old.get("settings"), new["settings"])
    before, now = old.get("code", {}), new["code"]
    files = sorted(file for file in {*before, *now} if before.get(file) != now.get(file))
    if not changes and files:
        changes = [f"code changed: {', '.join(files)}"]
    return changes


def _changes(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys([*old, *new])
        below = [_changes(f"{key}.{name}", old.get(name), new.get(name)) for name in names]
        return [line for lines in below for line in lines]
    return [] if old == new else [f"{key.removeprefix('.')} was {old}, is {new}"]


def forget_batches(config: Config, dataset: str) -> None:
    """Remove the lists of batches that are no more, for other jobs change their arrays."""
    jobs = [Job(stage, dataset, batch=0) for stage in ("index", *BY_BATCH)]
    folds = config.splits.names if config.codes.trained else []
    jobs += [Job("codes", dataset, batch=0, fold=fold) for fold in folds if fold]
    for job in jobs:
        folder = Layout.of(config.in_fold(job.fold), dataset).manifest(job.stage, 0).parent
        for manifest in folder.glob("batch-*.tsv"):
            number = int(manifest.stem.removeprefix("batch-"))
            if number >= config.compute.batches:
                record_path(manifest).unlink(missing_ok=True)
                manifest.unlink()
                if beside := _beside_data(config, replace(job, batch=number)):
                    write_json(beside, {"key": None})
