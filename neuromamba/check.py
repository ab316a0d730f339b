"""What of a dataset will be used, what not and why, before anything is computed.

Names, headers, sidecars and the table of subjects are read, and no image data.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.bids import index_runs
from neuromamba.check_effort import Effort, estimate_effort
from neuromamba.check_effort import as_table as effort_table
from neuromamba.check_engine import check_engine
from neuromamba.check_events import check_events
from neuromamba.check_labels import Labels, check_labels
from neuromamba.check_labels import as_table as labels_table
from neuromamba.check_raw import check_raw_runs
from neuromamba.config import Config, Dataset
from neuromamba.files import InputError
from neuromamba.findings import CheckedRun, Finding, explain, group_findings, plural
from neuromamba.headers import glimpse
from neuromamba.listing import READERS, find_files

FORMATS = ("table", "tsv", "json")
STATUSES = ("used", "left out", "not selected")
RUN_COLUMNS = ["run", "subject", "status", "reason", "n_volumes", "repetition_time", "notes"]


@dataclass(frozen=True)
class Check:
    """All that is known of a dataset beforehand."""

    dataset: str
    folder: str
    how: str
    runs: list[CheckedRun]
    findings: list[Finding]
    labels: Labels
    effort: Effort

    @property
    def ok(self) -> bool:
        """Whether there is something to use, and nothing that stops the whole dataset."""
        blocked = any(finding.level == "blocked" for finding in self.findings)
        return not blocked and any(run.status == "used" for run in self.runs)

    def subjects(self, status: str) -> list[str]:
        return sorted({run.subject for run in self.runs if run.status == status})


@dataclass(frozen=True)
class Checked:
    """The text of a check, and whether the dataset can be worked on."""

    text: str
    ok: bool


def run_check(config: Config, dataset: str, form: str = "table") -> Checked:
    """Check one dataset of the config.

    Parameters
    ----------
    config, dataset
        The run, and which of its datasets.
    form
        Of `FORMATS`: `table` for people; `tsv` has a row a run, `json` everything.
    """
    check = check_dataset(config, dataset)
    match form:
        case "table":
            text = as_text(check)
        case "tsv":
            text = as_frame(check).to_csv(sep="\t", index=False, na_rep="n/a").rstrip()
        case "json":
            text = json.dumps(as_dict(check), indent=2)
        case _:
            raise InputError(f"--format {form!r} must be one of {', '.join(FORMATS)}")
    return Checked(text, check.ok)


def check_dataset(config: Config, name: str) -> Check:
    """Judge the runs of a dataset, its table of subjects, and what the engine needs."""
    dataset = config.datasets[name]
    raw = _has_to_be_preprocessed(config, dataset)
    folder = str(dataset.bids) if raw else dataset.derivatives
    runs: list[CheckedRun] = []
    findings = check_engine(config, dataset) if raw else []
    try:
        runs, more = check_raw_runs(config, dataset) if raw else _check_derivatives(config, dataset)
        findings += more
    except InputError as error:
        findings.append(Finding("blocked", "", str(error)))
    used = [run for run in runs if run.status == "used"]
    if runs and not used:
        findings.append(Finding("blocked", "", "no usable run: see why they are left out"))
    chosen = [run.subject for run in runs if run.status != "not selected"]
    labels = check_labels(config, dataset, sorted({run.subject for run in used}), chosen)
    of_states, counts = check_events(dataset, used)
    labels = Labels(
        [*labels.findings, *of_states], pd.concat([labels.counts, counts], ignore_index=True)
    )
    effort = estimate_effort(config, used, raw) if dataset.series is None else Effort()
    findings += [*labels.findings, *effort.findings]
    findings += [finding for run in runs for finding in run.findings]
    return Check(name, folder, _how(config, dataset, raw), runs, findings, labels, effort)


def _how(config: Config, dataset: Dataset, raw: bool) -> str:
    if dataset.series is not None:
        return f"ROI series, {dataset.series.segmentation or 'the only segmentation'}"
    how = f"raw BIDS, engine {config.preprocess.engine}" if raw else "derivatives"
    return f"{how}, {dataset.space}"


def _has_to_be_preprocessed(config: Config, dataset: Dataset) -> bool:
    """Whether the raw scans count: they may have been preprocessed, and be elsewhere."""
    if dataset.bids is None or config.preprocess.engine == "none":
        return False
    return Path(dataset.bids).is_dir() or not Path(dataset.derivatives).is_dir()


# --- Derivatives --------------------------------------------------------------------------------


def _check_derivatives(config: Config, dataset: Dataset) -> tuple[list[CheckedRun], list[Finding]]:
    """The runs of a derivatives folder, as the index will take them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = index_runs(dataset)
    findings = [Finding("warning", "", str(warning.message)) for warning in caught]
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    with ThreadPoolExecutor(READERS) as pool:
        runs = list(pool.map(lambda row: _judge(row, config), rows))
    # Another segmentation of the same runs is no run that was not selected.
    kept = {key: dataset.entities[key] for key in ("seg", "atlas") if key in dataset.entities}
    everything = dataset.model_copy(update={"entities": kept, "exclude": []})
    every = {run.name: run.entities["sub"] for run in find_files(everything)}
    selected = {run.run for run in runs}
    reason = "not selected by entities or exclude of the dataset YAML"
    runs += [
        CheckedRun(name, f"sub-{label}", "not selected", reason)
        for name, label in every.items()
        if name not in selected
    ]
    return sorted(runs, key=lambda run: run.run), findings


def _judge(row: dict[str, Any], config: Config) -> CheckedRun:
    reason, findings = row["reason"], []
    is_image = row["mask"] is not None
    n_volumes, least = row["n_volumes"], config.volumes.min_volumes
    if reason is None and n_volumes < least:
        reason = f"too few volumes: {row['bold']} has {n_volumes}, volumes.min_volumes is {least}"
    if reason is None and row["confounds"] is None:
        message = f"no confounds table: nothing tells of the motion in {row['bold']}"
        if not is_image:
            message = (
                f"no motion table: none lies beside {row['bold']}; a column mean_fd of the table "
                "of subjects serves in its place"
            )
        if config.volumes.denoise.strategy:
            reason = f"{message}, and volumes.denoise.strategy needs it"
        else:
            findings.append(Finding("note", row["run"], message))
    if reason is None and is_image and not glimpse(row["bold"]).complete:
        message = f"{row['bold']} may be truncated: its length does not fit its header"
        findings.append(Finding("warning", row["run"], f"{message}; try gzip -t"))
    if reason is not None:
        findings = [Finding("left out", row["run"], reason)]
    return CheckedRun(
        row["run"],
        row["subject"],
        "used" if reason is None else "left out",
        reason,
        n_volumes,
        row["repetition_time"],
        tuple(findings),
    )


# --- Formats ------------------------------------------------------------------------------------


def as_frame(check: Check) -> pd.DataFrame:
    """One row a run: columns `RUN_COLUMNS`."""
    rows = [
        (
            run.run,
            run.subject,
            run.status,
            run.reason,
            run.n_volumes,
            run.repetition_time,
            "; ".join(one.kind for one in run.findings if one.level != "left out") or None,
        )
        for run in check.runs
    ]
    return pd.DataFrame(rows, columns=RUN_COLUMNS).astype({"n_volumes": "Int64"})


def as_dict(check: Check) -> dict[str, Any]:
    """Everything, in the types of JSON."""
    runs = as_frame(check).astype(object)
    return {
        "dataset": check.dataset,
        "folder": check.folder,
        "how": check.how,
        "ok": check.ok,
        "summary": _counts(check),
        "findings": [asdict(group) for group in group_findings(check.findings)],
        "targets": check.labels.counts.to_dict("records"),
        "effort": check.effort.rows,
        "notes": check.effort.notes,
        "runs": runs.where(runs.notna(), None).to_dict("records"),
    }


def _counts(check: Check) -> dict[str, Any]:
    statuses: Counter[str] = Counter(run.status for run in check.runs)
    levels = Counter(finding.level for finding in check.findings)
    used = [run for run in check.runs if run.status == "used"]
    seconds = sum((run.n_volumes or 0) * (run.repetition_time or 0) for run in used)
    return {
        "runs": {status: statuses[status] for status in STATUSES},
        "subjects_used": len(check.subjects("used")),
        "hours_of_scans": round(seconds / 3600, 3),
        "warnings": levels["warning"],
        "notes": levels["note"],
    }


def as_text(check: Check) -> str:
    """The summary, the findings by level and kind, the labels, and the effort."""
    counts = _counts(check)
    runs = counts["runs"]
    lines = [
        f"{check.dataset}: {check.folder} ({check.how})",
        f"used: {plural(runs['used'], 'run')} of {plural(counts['subjects_used'], 'subject')} "
        f"({counts['hours_of_scans']:,.1f} hours of scans); left out: {runs['left out']:,}; "
        f"not selected: {runs['not selected']:,}; warnings: {counts['warnings']:,}; notes: "
        f"{counts['notes']:,}",
        *explain(group_findings(check.findings)),
    ]
    if len(check.labels.counts):
        lines += ["", "subjects with usable runs, by target:", *labels_table(check.labels.counts)]
    if check.effort.rows or check.effort.notes:
        lines += ["", "it will take about:", *effort_table(check.effort.rows)]
        lines += [f"  {note}" for note in check.effort.notes]
    verdict = "ready" if check.ok else "not ready: see what is blocked"
    return "\n".join([*lines, "", verdict])
