"""Find the runs of a derivatives folder by their names alone.

Plain `os.scandir` and string splitting, because a general BIDS layout library needs minutes and
gigabytes for the 10,000 subjects of a large cohort where this needs a second.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuromamba.bids_folders import func_folders, readable, root_of
from neuromamba.config import Dataset, FilePatterns
from neuromamba.files import InputError

BOLD = "_desc-preproc_bold.nii.gz"
MASK = "_desc-brain_mask.nii.gz"
CONFOUNDS = ("_desc-confounds_timeseries.tsv", "_desc-confounds_regressors.tsv")
"""The second is what fMRIPrep wrote before version 20.2."""
ORDER = ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo")
NOT_OF_A_RUN = {"space", "cohort", "res", "den", "desc", "seg", "atlas", "scale", "stat"}
"""Entities that tell versions of one run apart, not runs."""
LONG_NAMES = {
    "subject": "sub",
    "session": "ses",
    "acquisition": "acq",
    "ceagent": "ce",
    "reconstruction": "rec",
    "direction": "dir",
}
NATIVE = "native"
"""Value of `dataset.resolution` that means: files without a `res` entity."""
PLACEHOLDER = re.compile(r"\{(\w+)(?:,([^{}]+))?\}")
"""`{name}`, or `{name,regular expression}` as Snakemake writes it."""
SLASH = re.compile(r"/(?![^{}]*\})")
"""A slash that is not part of a placeholder's expression."""


@dataclass(frozen=True)
class FoundRun:
    """One BOLD file, or a table of its ROI series, and what belongs to it.

    `mask` is the path where the mask must be, whether or not it is there; empty for a table.
    """

    entities: dict[str, str]
    bold: str
    mask: str
    has_mask: bool
    confounds: str | None
    sidecar: str | None

    @property
    def name(self) -> str:
        """The run's entities in BIDS order, without those of its version: `sub-01_task-rest`."""
        return run_name(self.entities)


def run_name(entities: dict[str, str]) -> str:
    """The name of a run by its entities, in BIDS order; those of its version are left out."""
    known = [key for key in ORDER if key in entities]
    other = sorted(entities.keys() - set(ORDER) - NOT_OF_A_RUN)
    return "_".join(f"{key}-{entities[key]}" for key in [*known, *other])


def has_wanted_entities(entities: dict[str, str], dataset: Dataset) -> bool:
    """Whether `entities` of the dataset YAML, by short or long names, selects a run."""
    return all(
        entities.get(LONG_NAMES.get(key, key)) in values for key, values in dataset.entities.items()
    )


def find_runs(dataset: Dataset) -> list[FoundRun]:
    """All runs that the dataset's space, resolution and entities select, sorted by name.

    Raises
    ------
    InputError
        When the folder does not exist or holds no such run; the message lists what it does hold.
    """
    root = root_of(dataset)
    with readable():
        scan = _scan_patterns(root, dataset.files) if dataset.files else _scan_bids(root)
        every = list(scan)
    runs = [
        run
        for run in every
        if (dataset.files is not None or _is_version(run, dataset))
        and has_wanted_entities(run.entities, dataset)
    ]
    if not runs:
        raise InputError(_nothing(root, dataset, every))
    return sorted(runs, key=lambda run: (run.name, run.bold))


def _is_version(run: FoundRun, dataset: Dataset) -> bool:
    if run.entities.get("space") != dataset.space:
        return False
    if dataset.resolution is None:
        return True
    resolution = run.entities.get("res", NATIVE)
    return resolution.lstrip("0") == dataset.resolution.lstrip("0")


def _nothing(root: str, dataset: Dataset, every: list[FoundRun]) -> str:
    if dataset.files is not None:
        looked = f"{dataset.files.bold} (files.bold)"
    else:
        resolution = {None: "", NATIVE: " without res"}.get(
            dataset.resolution, f" res-{dataset.resolution}"
        )
        looked = f"sub-*/[ses-*/]func/*{BOLD} with space-{dataset.space}{resolution}"
    filters = "".join(f", {key} in {values}" for key, values in dataset.entities.items())
    if not every:
        hint = "no file of that form is there; check derivatives in the dataset YAML"
        return f"{root} has no runs: looked for {looked}{filters}; {hint}"
    keys = ("task",) if dataset.files is not None else ("space", "cohort", "res", "task")
    kinds = Counter(
        " ".join(f"{key}-{run.entities[key]}" for key in keys if key in run.entities)
        for run in every
    )
    there = ", ".join(f"{kind or 'no entities'} ({n} files)" for kind, n in kinds.most_common(10))
    return (
        f"{root} has no runs: looked for {looked}{filters}; there are: {there}; change space, "
        "resolution or entities in the dataset YAML"
    )


# --- BIDS names ---------------------------------------------------------------------------------


def _scan_bids(root: str) -> Iterator[FoundRun]:
    for folder, names, stem in func_folders(root):
        for name in names:
            if name.endswith(BOLD):
                yield _bids_run(folder, name, names, entities_of(stem))


def _bids_run(folder: str, name: str, names: set[str], of_folder: dict[str, str]) -> FoundRun:
    stem = name.removesuffix(BOLD)
    mask, sidecar = stem + MASK, name.removesuffix(".nii.gz") + ".json"
    confounds = confounds_name(stem, names)
    return FoundRun(
        entities={**of_folder, **entities_of(stem)},
        bold=f"{folder}/{name}",
        mask=f"{folder}/{mask}",
        has_mask=mask in names,
        confounds=f"{folder}/{confounds}" if confounds else None,
        sidecar=f"{folder}/{sidecar}" if sidecar in names else None,
    )


def subject_name(label: str) -> str:
    """`sub-` and the letters and digits of `label`, which may or may not begin with `sub-`."""
    return "sub-" + re.sub(r"[^A-Za-z0-9]", "", label.strip().removeprefix("sub-"))


def entities_of(stem: str) -> dict[str, str]:
    """`sub-01_task-rest` as `{"sub": "01", "task": "rest"}`; other parts are left out."""
    return {
        key: value for key, dash, value in (part.partition("-") for part in stem.split("_")) if dash
    }


def confounds_name(stem: str, names: set[str], suffixes: Sequence[str] = CONFOUNDS) -> str | None:
    """The run's confounds table among `names`; one table serves all echoes of a run."""
    parts = [part for part in stem.split("_") if part.split("-")[0] not in NOT_OF_A_RUN]
    without_echo = [part for part in parts if not part.startswith("echo-")]
    for kept in (parts, without_echo):
        for suffix in suffixes:
            name = "_".join(kept) + suffix
            if name in names:
                return name
    return None


# --- Other names --------------------------------------------------------------------------------


def _scan_patterns(root: str, files: FilePatterns) -> Iterator[FoundRun]:
    known = {name for name, _ in PLACEHOLDER.findall(files.bold)}
    if not known & {"subject", "sub"}:
        raise InputError(f"files.bold {files.bold!r} must have the placeholder {{subject}}")
    for key, pattern in (("mask", files.mask), ("confounds", files.confounds or "")):
        strange = {name for name, _ in PLACEHOLDER.findall(pattern)} - known
        if strange:
            raise InputError(
                f"files.{key} {pattern!r} has placeholders that files.bold has not: "
                f"{', '.join(sorted(strange))}"
            )
    for bold, values in _match(root, SLASH.split(files.bold.strip("/")), {}):
        mask = _fill(root, files.mask, values)
        confounds = _fill(root, files.confounds, values) if files.confounds else None
        sidecar = bold.removesuffix(".gz").removesuffix(".nii") + ".json"
        yield FoundRun(
            entities=_clean(values),
            bold=bold,
            mask=mask,
            has_mask=Path(mask).exists(),
            confounds=confounds if confounds and Path(confounds).exists() else None,
            sidecar=sidecar if Path(sidecar).exists() else None,
        )


def _match(
    folder: str, parts: list[str], values: dict[str, str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Paths below `folder` that match the pattern's remaining parts, with the placeholders' values.

    A part without new placeholders is followed without listing the folder.
    """
    part, rest = parts[0], parts[1:]
    if all(name in values for name, _ in PLACEHOLDER.findall(part)):
        names = [(_substitute(part, values), values)]
    else:
        regex = _regex(part, values)
        with os.scandir(folder) as entries:
            matches = [(entry.name, regex.fullmatch(entry.name)) for entry in entries]
        names = [(name, {**values, **m.groupdict()}) for name, m in matches if m]
    for name, found in names:
        path = f"{folder}/{name}"
        if not rest:
            # A broken link is found too: the run must be reported, not silently left out.
            if os.path.lexists(path):
                yield path, found
        elif Path(path).is_dir():
            yield from _match(path, rest, found)


def _regex(part: str, values: dict[str, str]) -> re.Pattern[str]:
    """A path part as a regular expression; `{name}` matches anything without `_`."""
    text, end, seen = "", 0, set()
    for match in PLACEHOLDER.finditer(part):
        name, expression = match.groups()
        text += re.escape(part[end : match.start()])
        if name in values:
            text += re.escape(values[name])
        else:
            text += f"(?P={name})" if name in seen else f"(?P<{name}>{expression or '[^/_]+'})"
        seen.add(name)
        end = match.end()
    try:
        return re.compile(text + re.escape(part[end:]))
    except re.error as error:
        raise InputError(f"files.bold: {part!r} is not a valid pattern ({error})") from None


def _substitute(pattern: str, values: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: values[match[1]], pattern)


def _fill(root: str, pattern: str, values: dict[str, str]) -> str:
    """The path of a pattern, below `root` unless it is absolute."""
    path = _substitute(pattern, values)
    return path if path.startswith("/") else f"{root}/{path}"


def _clean(values: dict[str, str]) -> dict[str, str]:
    """Placeholder values as BIDS entities: short keys, labels of letters and digits only."""
    entities = {}
    for name, value in values.items():
        key = LONG_NAMES.get(name, name)
        entities[key] = re.sub(r"[^A-Za-z0-9]", "", value.removeprefix(f"{key}-"))
    return entities
