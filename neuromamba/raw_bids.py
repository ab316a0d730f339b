"""Find the scans of a raw BIDS dataset, and their sidecars, by their names.

Design choices
--------------
- Only folders are listed; no file is opened to find the runs of 10,000 subjects.
- The echoes of a run belong together, and of a complex scan only the magnitude counts.
- A run that names alone show to be unusable is kept, with its problem, to be reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from neuromamba.bids_scan import entities_of, has_wanted_entities, run_name
from neuromamba.config import Dataset
from neuromamba.files import InputError, digest_json
from neuromamba.listing import READERS, find_excluded, refuse_useless_exclude, sample_file
from neuromamba.sidecars import (
    Level,
    applicable,
    list_folder,
    sidecar_level,
    split_name,
)

IMAGES = (".nii.gz", ".nii")
KINDS = {"anat", "fmap", "func"}
"""Folders of a subject or session that are read."""
AUXILIARY = {"sbref", "T2w", "FLAIR"}
"""Images beside T1w, BOLD and fieldmaps that preprocessing may use."""
WITHIN_A_RUN = {"echo", "part"}
OF_DERIVATIVES = {"space", "desc"}


@dataclass(frozen=True)
class RawRun:
    """A run of a raw dataset.

    Attributes
    ----------
    name
        Its entities in BIDS order, without echo and part: `sub-02_ses-1_task-rest_run-1`.
    subject
        `sub-02`.
    entities
        By short keys, without echo and part.
    bold
        One file, or one of each echo, echoes ascending.
    sidecars
        Of each file in `bold` the JSON files that apply to it, the nearest last.
    problem
        Why the run cannot be used, as far as names tell.
    """

    name: str
    subject: str
    entities: dict[str, str]
    bold: tuple[Path, ...]
    sidecars: tuple[tuple[Path, ...], ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class RawSubject:
    """A subject's runs, T1w images of all sessions, and other files that engines may read.

    `auxiliary` are fieldmaps, single-band references, T2w and FLAIR images, and the sidecars of
    these and of the T1w images.
    """

    name: str
    runs: tuple[RawRun, ...]
    t1w: tuple[Path, ...] = ()
    auxiliary: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Image:
    path: Path
    suffix: str
    entities: dict[str, str]
    sidecars: tuple[Path, ...]


def find_raw_subjects(dataset: Dataset) -> list[RawSubject]:
    """The subjects with runs that `entities` and `exclude` of the dataset YAML leave, by name.

    Raises
    ------
    InputError
        When `bids` is not a folder, cannot be listed, or has no such runs; the message says what
        it does have.
    """
    return select_raw_subjects(scan_raw_subjects(dataset), dataset)


def select_raw_subjects(subjects: Sequence[RawSubject], dataset: Dataset) -> list[RawSubject]:
    """Those with runs that `entities` and `exclude` leave; `InputError` when there are none."""
    chosen = [_choose(subject, dataset, set()) for subject in subjects]
    names = [run.name for subject in chosen for run in subject.runs]
    if not names:
        raise InputError(_nothing(dataset, subjects))
    images = [split_name(path.name)[0] for subject in chosen for path in subject.t1w]
    excluded, useless = find_excluded([*names, *images], dataset)
    refuse_useless_exclude(str(dataset.bids), useless, excluded.issuperset(names))
    chosen = [_choose(subject, dataset, excluded) for subject in chosen]
    return [subject for subject in chosen if subject.runs]


def scan_raw_subjects(dataset: Dataset) -> list[RawSubject]:
    """All subjects of the folder with all their runs, whatever the dataset YAML selects.

    Raises
    ------
    InputError
        When `bids` is not a folder, or cannot be listed.
    """
    if not dataset.bids or not Path(dataset.bids).is_dir():
        raise InputError(
            f"{dataset.bids} is not a folder; set bids in the dataset YAML to the folder that "
            "holds sub-*"
        )
    root = dataset.bids.rstrip("/") or "/"
    try:
        files, folders = list_folder(root)
        level = sidecar_level(root, files)
        names = sorted(name for name in folders if name.startswith("sub-"))
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda name: _scan_subject(root, name, level), names))
    except PermissionError as error:
        raise InputError(
            f"{error.filename} cannot be listed; ask for permission to read it"
        ) from None


def scan_subject(root: Path | str, name: str) -> RawSubject:
    """One subject of a folder with all its runs and images, whatever is selected."""
    return _scan_subject(str(root), name, sidecar_level(str(root), list_folder(root)[0]))


def _choose(subject: RawSubject, dataset: Dataset, excluded: set[str]) -> RawSubject:
    if not dataset.entities and not excluded:
        return subject
    runs = [
        run
        for run in subject.runs
        if run.name not in excluded and has_wanted_entities(run.entities, dataset)
    ]
    t1w = [path for path in subject.t1w if split_name(path.name)[0] not in excluded]
    return replace(subject, runs=tuple(runs), t1w=tuple(t1w))


def _nothing(dataset: Dataset, subjects: Sequence[RawSubject]) -> str:
    filters = "".join(f", {key} in {values}" for key, values in dataset.entities.items())
    looked = f"{dataset.bids} has no runs: looked for sub-*/[ses-*/]func/*_bold.nii[.gz]{filters}; "
    tasks = Counter(
        run.entities.get("task", "(none)") for subject in subjects for run in subject.runs
    )
    if tasks:
        there = ", ".join(f"task-{task} ({n} runs)" for task, n in tasks.most_common(10))
        return f"{looked}there are: {there}; change entities in the dataset YAML"
    return (
        f"{looked}there are {len(subjects)} sub-* folders; check bids in the dataset YAML (a "
        "folder of preprocessed scans is given by derivatives instead)"
    )


# --- Names --------------------------------------------------------------------------------------


def _scan_subject(root: str, name: str, level: Level) -> RawSubject:
    images = sorted(_images_of(root, name, level), key=lambda image: str(image.path))
    bold = [image for image in images if image.suffix == "bold" and _is_magnitude(image)]
    t1w = [image for image in images if image.suffix == "T1w"]
    others = [i for i in images if i.path.parent.name == "fmap" or i.suffix in AUXILIARY]
    auxiliary = {path for image in others for path in (image.path, *image.sidecars)}
    auxiliary |= {path for image in t1w for path in image.sidecars}
    by_name = sorted(bold, key=_name)
    return RawSubject(
        name=name,
        runs=tuple(_run(name, key, list(group)) for key, group in groupby(by_name, key=_name)),
        t1w=tuple(image.path for image in t1w),
        auxiliary=tuple(sorted(auxiliary, key=str)),
    )


def _images_of(root: str, subject: str, level: Level) -> Iterator[_Image]:
    top = f"{root}/{subject}"
    files, folders = list_folder(top)
    levels = [level, sidecar_level(top, files)]
    yield from _images_in(top, folders, levels)
    for session in folders:
        if session.startswith("ses-"):
            files, inside = list_folder(f"{top}/{session}")
            of_session = sidecar_level(f"{top}/{session}", files)
            yield from _images_in(f"{top}/{session}", inside, [*levels, of_session])


def _images_in(folder: str, kinds: Sequence[str], levels: list[Level]) -> Iterator[_Image]:
    for kind in kinds:
        if kind in KINDS:
            files, _ = list_folder(f"{folder}/{kind}")
            here = [*levels, sidecar_level(f"{folder}/{kind}", files)]
            for name in files:
                if name.endswith(IMAGES):
                    yield _image(f"{folder}/{kind}", name, here)


def _image(folder: str, name: str, levels: Sequence[Level]) -> _Image:
    stem, suffix = split_name(name)
    entities = entities_of(stem)
    return _Image(Path(folder, name), suffix, entities, applicable(levels, entities, suffix))


def _is_magnitude(image: _Image) -> bool:
    in_folder = image.path.parent.name == "func"
    raw = not OF_DERIVATIVES & image.entities.keys()
    return in_folder and raw and image.entities.get("part", "mag") == "mag"


def _name(image: _Image) -> str:
    return run_name(_of_run(image))


def _of_run(image: _Image) -> dict[str, str]:
    return {key: value for key, value in image.entities.items() if key not in WITHIN_A_RUN}


def _run(subject: str, name: str, images: list[_Image]) -> RawRun:
    images = sorted(images, key=_echo)
    return RawRun(
        name=name,
        subject=subject,
        entities=_of_run(images[0]),
        bold=tuple(image.path for image in images),
        sidecars=tuple(image.sidecars for image in images),
        problem=_problem(subject, images),
    )


def _echo(image: _Image) -> int:
    label = image.entities.get("echo", "0")
    return int(label) if label.isdecimal() else 0


def _problem(subject: str, images: Sequence[_Image]) -> str | None:
    """What is wrong with a run, as far as names tell."""
    path, entities = images[0].path, images[0].entities
    session = path.parent.parent.name
    in_session = session.removeprefix("ses-") if session.startswith("ses-") else None
    if f"sub-{entities.get('sub')}" != subject or entities.get("ses") != in_session:
        return f"{path} is named after another subject or session than its folder; rename it"
    if "task" not in entities:
        return f"{path} has no task in its name; BIDS needs one (task-rest)"
    echoes = [image.entities.get("echo") for image in images]
    if len(set(echoes)) < len(echoes) or (None in echoes and len(echoes) > 1):
        files = ", ".join(str(image.path) for image in images)
        return f"duplicate run: {len(images)} files ({files}); keep one"
    return None


# --- Content ------------------------------------------------------------------------------------


def fingerprint_subject(root: Path, subject: RawSubject) -> str:
    """16 hexadecimal digits that change with the names or the content of a subject's files.

    BOLD and T1w images, what else engines may read, and all sidecars that apply to them count;
    content as in `listing.fingerprint`.
    """
    files = {*subject.t1w, *subject.auxiliary}
    for run in subject.runs:
        files.update(run.bold)
        files.update(path for sidecars in run.sidecars for path in sidecars)
    return digest_json(
        [[path.relative_to(root).as_posix(), *sample_file(str(path))] for path in sorted(files)]
    )[:16]
