"""Which runs of a raw dataset can be preprocessed, by their names, headers and sidecars."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neuromamba.config import Config, Dataset
from neuromamba.files import InputError
from neuromamba.findings import CheckedRun, Finding, Level
from neuromamba.headers import Glimpse, glimpse, glimpse_series
from neuromamba.listing import READERS
from neuromamba.raw_bids import RawRun, RawSubject, scan_raw_subjects, select_raw_subjects
from neuromamba.sidecars import check_repetition_time, check_slice_timing, read_sidecar

TOLERANCE = 1e-3
"""Seconds by which header and sidecar may differ, as headers hold 32-bit numbers."""


@dataclass(frozen=True)
class _Rules:
    """What the engine makes of a run."""

    min_volumes: int
    corrects_slice_timing: bool
    needs_t1w: bool
    uses_t1w: bool
    is_fmriprep: bool
    read: Callable[[Path], dict[str, Any]]


def check_raw_runs(config: Config, dataset: Dataset) -> tuple[list[CheckedRun], list[Finding]]:
    """Judge all runs of a raw dataset.

    Returns
    -------
    runs
        Every run of the folder, sorted; those that `entities` and `exclude` leave out too.
    findings
        What is not of one run.

    Raises
    ------
    InputError
        When there is no such folder, or no run that the dataset's settings select.
    """
    every = scan_raw_subjects(dataset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = select_raw_subjects(every, dataset)
    findings = [Finding("warning", "", str(warning.message)) for warning in caught]
    findings += [
        Finding("note", subject.name, f"no BOLD run: {subject.name} has no func/*_bold.nii[.gz]")
        for subject in every
        if not subject.runs
    ]
    rules = _rules(config)
    with ThreadPoolExecutor(READERS) as pool:
        judged = pool.map(lambda subject: _judge_subject(subject, rules), chosen)
        shown = tqdm(judged, "check", total=len(chosen), unit="subject", mininterval=1.0)
        runs = [run for of_subject in shown for run in of_subject]
    runs += _not_selected(every, {run.run for run in runs}, dataset)
    return sorted(runs, key=lambda run: run.run), findings


def _rules(config: Config) -> _Rules:
    settings = config.preprocess
    is_fmriprep = settings.engine in ("docker", "apptainer")
    flags = settings.fmriprep.flags
    ignored = "slicetiming" in " ".join(flags)
    corrects = not ignored if is_fmriprep else settings.ants.slice_timing
    has_anatomy = any(flag.startswith(("--derivatives", "--anat-derivatives")) for flag in flags)
    needs_t1w = not has_anatomy if is_fmriprep else settings.ants.registration == "t1w"
    template = settings.ants.template
    by_epi = settings.ants.registration == "epi" or (template is not None and not template.t1w)
    return _Rules(
        min_volumes=config.volumes.min_volumes,
        corrects_slice_timing=corrects,
        needs_t1w=needs_t1w,
        uses_t1w=needs_t1w or (not is_fmriprep and not by_epi),
        is_fmriprep=is_fmriprep,
        read=lru_cache(maxsize=4096)(read_sidecar),  # one sidecar may serve all subjects
    )


def _not_selected(
    subjects: Sequence[RawSubject], selected: set[str], dataset: Dataset
) -> list[CheckedRun]:
    keys = [key for key in ("entities", "exclude") if getattr(dataset, key)]
    reason = f"not selected by {' and '.join(keys)} of the dataset YAML"
    return [
        CheckedRun(run.name, run.subject, "not selected", reason)
        for subject in subjects
        for run in subject.runs
        if run.name not in selected
    ]


# --- One run ------------------------------------------------------------------------------------


def _judge_subject(subject: RawSubject, rules: _Rules) -> list[CheckedRun]:
    bad_image = None
    # fMRIPrep averages all images, and `ants` takes the first.
    images = subject.t1w if rules.is_fmriprep else subject.t1w[:1]
    for path in images if rules.uses_t1w else ():
        try:
            header = glimpse(path)
            if len([size for size in header.shape if size > 1]) != 3:
                raise InputError(f"{path} is no T1w volume (shape {header.shape}); replace it")
        except InputError as error:
            bad_image = bad_image or str(error)
    return [_judge_run(run, subject, bad_image, rules) for run in subject.runs]


def _judge_run(
    run: RawRun, subject: RawSubject, bad_image: str | None, rules: _Rules
) -> CheckedRun:
    findings: list[Finding] = []
    n_volumes = repetition_time = None

    def add(level: Level, message: str) -> None:
        findings.append(Finding(level, run.name, message))

    try:
        if run.problem:
            raise InputError(run.problem)
        headers = [glimpse_series(path) for path in run.bold]
        n_volumes = headers[0].shape[3]
        _check_series(run, headers, rules, add)
        metadata = [_metadata(sidecars, rules) for sidecars in run.sidecars]
        repetition_time = _repetition_time(run, metadata[0], headers[0], add)
        _check_echoes(run, metadata, rules)
        _check_slice_timing(run, metadata[0], headers[0], repetition_time, rules, add)
        _check_anatomy(subject, bad_image, rules, add)
    except InputError as error:
        reason = " ".join(str(error).split())
        left_out = Finding("left out", run.name, reason)
        return CheckedRun(
            run.name, run.subject, "left out", reason, n_volumes, repetition_time, (left_out,)
        )
    return CheckedRun(
        run.name, run.subject, "used", None, n_volumes, repetition_time, tuple(findings)
    )


def _metadata(sidecars: Sequence[Path], rules: _Rules) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for path in sidecars:
        metadata |= rules.read(path)
    return metadata


def _check_series(
    run: RawRun, headers: Sequence[Glimpse], rules: _Rules, add: Callable[[Level, str], None]
) -> None:
    path, header = run.bold[0], headers[0]
    if len({one.shape for one in headers}) > 1:
        shapes = ", ".join(str(one.shape) for one in headers)
        raise InputError(
            f"echoes of different shapes: {run.name} has {shapes}; replace the odd one"
        )
    if header.shape[3] < rules.min_volumes:
        raise InputError(
            f"too few volumes: {path} has {header.shape[3]}, volumes.min_volumes is "
            f"{rules.min_volumes}"
        )
    for image, one in zip(run.bold, headers, strict=True):
        if not one.complete and not image.name.endswith(".gz"):
            raise InputError(f"{image} is truncated (shorter than its header says); copy it again")
        if not one.complete:
            add(
                "warning",
                f"{image} may be truncated: its length does not fit its header; try gzip -t, and "
                "copy it again",
            )


def _repetition_time(
    run: RawRun, metadata: dict[str, Any], header: Glimpse, add: Callable[[Level, str], None]
) -> float:
    path = run.bold[0]
    if "RepetitionTime" not in metadata:
        in_header = header.repetition_time
        says = "has none" if in_header is None else f"says {in_header:g} s"
        task = run.entities.get("task")
        raise InputError(
            f"missing RepetitionTime: no sidecar of {path} has it; write it to its .json, or for "
            f"all runs to task-{task}_bold.json beside dataset_description.json (the NIfTI header "
            f"{says})"
        )
    value = metadata["RepetitionTime"]
    repetition_time = check_repetition_time(value, f"the sidecar of {path}")
    in_header = header.repetition_time
    if in_header is not None and abs(in_header - repetition_time) > TOLERANCE:
        add(
            "warning",
            f"repetition times disagree: the header of {path} says {in_header:g} s, its sidecar "
            f"{repetition_time:g} s; the sidecar's counts, so make sure that it is right",
        )
    return repetition_time


def _check_echoes(run: RawRun, metadata: Sequence[dict[str, Any]], rules: _Rules) -> None:
    if len(run.bold) == 1:
        return
    if not rules.is_fmriprep:
        raise InputError(
            f"multi-echo: {run.name} has {len(run.bold)} echoes, which the ants engine cannot "
            "combine; preprocess it by fMRIPrep (preprocess.engine: docker or apptainer)"
        )
    times = [one.get("EchoTime") for one in metadata]
    if not all(isinstance(time, (int, float)) for time in times) or len({*times}) < len(times):
        raise InputError(
            f"echo times: the sidecars of {run.name} have EchoTime {times}, where each echo needs "
            "its own; correct them"
        )


def _check_slice_timing(
    run: RawRun,
    metadata: dict[str, Any],
    header: Glimpse,
    repetition_time: float,
    rules: _Rules,
    add: Callable[[Level, str], None],
) -> None:
    path = run.bold[0]
    if not rules.corrects_slice_timing:
        return
    if "SliceTiming" not in metadata:
        add("note", f"no SliceTiming: slices of {path} are taken as acquired all at once")
        return
    check_slice_timing(metadata, header.shape[:3], repetition_time, path)


def _check_anatomy(
    subject: RawSubject,
    bad_image: str | None,
    rules: _Rules,
    add: Callable[[Level, str], None],
) -> None:
    if bad_image:
        raise InputError(bad_image)
    if not subject.t1w and rules.needs_t1w:
        raise InputError(
            f"no T1w image: {subject.name} has none, and the engine needs one; leave the subject "
            "out, or register by EPI (preprocess.engine: ants)"
        )
    if not subject.t1w and rules.uses_t1w:
        add("note", f"no T1w image: {subject.name} is registered by its BOLD volumes directly")
