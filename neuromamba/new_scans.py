"""Scans to be predicted: files and derivatives folders that are given on the command line.

A folder is indexed as the `index` stage does it, and its T1w images are found as the `anat` stage
does it. A single file is looked at in the same way: its mask, sidecars and confounds are those that
BIDS names put beside it. A model that reads the images of people is given these and no runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.anat_scan import T1W, Anatomical, find_anatomicals, fingerprint_images
from neuromamba.bids import index_runs
from neuromamba.bids_scan import (
    BOLD,
    CONFOUNDS,
    MASK,
    FoundRun,
    entities_of,
    run_name,
    subject_name,
)
from neuromamba.config import Dataset
from neuromamba.files import InputError
from neuromamba.headers import glimpse_series
from neuromamba.listing import fingerprint
from neuromamba.sidecars import check_repetition_time, find_sidecars, merge_sidecars
from neuromamba.volumes import Source


@dataclass(frozen=True)
class Asked:
    """What the command line says of the scans.

    `mask` is that of a single file; `space` is for files whose names do not tell it, and
    `repetition_time` (s) for scans without a sidecar; `resolution` chooses in folders that hold
    more than one.
    """

    mask: Path | None = None
    space: str | None = None
    resolution: str | None = None
    repetition_time: float | None = None


@dataclass(frozen=True)
class NewScan:
    """One run, or T1w image, to be predicted, or the reason why there is none.

    Attributes
    ----------
    given
        The argument that it was found by.
    root
        Folder within which a subject's name means one person.
    subject, run
        `None` where not even these can be told. An image is named like a run, `sub-01_ses-1`.
    source
        The files of a run; `None` where there is a `reason`.
    image
        The files of an image, where the model reads these; `None` where there is a `reason`.
    n_volumes
        Of a run, by its header.
    """

    given: str
    root: str
    subject: str | None = None
    run: str | None = None
    source: Source | None = None
    n_volumes: int = 0
    reason: str | None = None
    image: Anatomical | None = None

    @property
    def file(self) -> Path | None:
        """The NIfTI file that is read."""
        if self.image is not None:
            return Path(str(self.image.t1w))
        return None if self.source is None else self.source.bold


def find_scans(
    paths: Sequence[Path], space: str, asked: Asked, images: bool = False
) -> list[NewScan]:
    """All runs that some files and folders hold, each once, in the order they are given.

    Parameters
    ----------
    paths
        NIfTI files and derivatives folders.
    space
        Standard space that the model was trained in.
    images
        Look for T1w images in place of runs; of a folder, one of each subject.

    Raises
    ------
    InputError
        When a mask is given for anything but one file.
    """
    if asked.mask is not None and (len(paths) != 1 or paths[0].is_dir()):
        raise InputError("--mask is the mask of one scan: give that scan's file alone")
    in_folder, of_file = (_images_in, _image_of) if images else (_in_folder, _of_file)
    found: dict[object, NewScan] = {}
    for path in paths:
        scans = in_folder(path, space, asked) if path.is_dir() else [of_file(path, space, asked)]
        for scan in scans:
            own = (scan.given, scan.subject, scan.run)
            found.setdefault(own if scan.file is None else scan.file.absolute(), scan)
    return list(found.values())


# --- Folders --------------------------------------------------------------------------------------


def _in_folder(folder: Path, space: str, asked: Asked) -> Iterator[NewScan]:
    """The runs of a derivatives folder, or of the folder of one subject in it."""
    root, one = _root_and_subject(folder)
    where = (str(folder), str(root.resolve()))
    dataset = Dataset(
        derivatives=str(root),
        space=space,
        resolution=asked.resolution,
        repetition_time=asked.repetition_time,
        entities={"sub": [one.removeprefix("sub-")]} if one else {},
    )
    try:
        table = index_runs(dataset)
    except InputError as error:
        reason = f"no preprocessed run in space {space}: {_one_line(error)}"
        yield NewScan(*where, one, reason=reason)
        return
    for row in table.to_dict("records"):
        yield _of_row({str(name): value for name, value in row.items()}, space, where)
    # fMRIPrep writes the spaces that it was asked for, and perhaps not this one for everybody.
    paths = [] if one else root.glob("sub-*")
    names = {subject_name(path.name) for path in paths if path.is_dir()}
    for name in sorted(names - set(table["subject"])):
        yield NewScan(*where, name, reason=f"{folder}: {name} has no run in space {space}")


def _root_and_subject(folder: Path) -> tuple[Path, str | None]:
    """The derivatives folder, and which subject's alone is asked for."""
    root = folder.absolute()
    return (root.parent, root.name) if root.name.startswith("sub-") else (root, None)


def _images_in(folder: Path, space: str, asked: Asked) -> Iterator[NewScan]:
    """The T1w image of each subject of a derivatives folder, or of the one whose folder it is."""
    root, one = _root_and_subject(folder)
    where = (str(folder), str(root.resolve()))
    dataset = Dataset(derivatives=str(root), space=space, resolution=asked.resolution)
    every = [found for found in find_anatomicals(dataset) if one in (None, found.subject)]
    if not every:
        yield NewScan(*where, one, reason=f"{folder}: holds no folder sub-* of a subject")
    for image in every:
        if image.reason is None:
            session = {} if image.session is None else {"ses": image.session}
            run = run_name({"sub": image.subject.removeprefix("sub-"), **session})
            yield NewScan(*where, image.subject, run, image=image)
        else:
            yield NewScan(*where, image.subject, reason=image.reason)


def _of_row(row: dict[str, Any], space: str, where: tuple[str, str]) -> NewScan:
    """A run by its row of the index."""
    subject, run = row["subject"], row["run"]
    if not pd.isna(row["reason"]):
        return NewScan(*where, subject, run, reason=row["reason"])
    source = Source(
        run=run,
        subject=subject,
        bold=Path(row["bold"]),
        mask=Path(row["mask"]),
        space=space,
        repetition_time=float(row["repetition_time"]),
        fingerprint=row["fingerprint"],
        confounds=None if pd.isna(row["confounds"]) else Path(row["confounds"]),
    )
    return NewScan(*where, subject, run, source, int(row["n_volumes"]))


# --- Files ----------------------------------------------------------------------------------------


def _of_file(path: Path, space: str, asked: Asked) -> NewScan:
    root = _root(path)
    where = (str(path), str(root.resolve()))
    entities = _entities(path)
    subject, run = subject_name(entities["sub"]), run_name(entities)
    try:
        _refuse_unreadable(path)
        _refuse_other_space(path, entities.get("space"), space, asked)
        found = _found_run(path, entities, asked.mask)
        header = glimpse_series(path)
        _refuse_without_mask(Path(found.mask))
        source = Source(
            run=run,
            subject=subject,
            bold=path,
            mask=Path(found.mask),
            space=space,
            repetition_time=_repetition_time(root, path, asked),
            fingerprint=fingerprint([found]),
            confounds=Path(found.confounds) if found.confounds else None,
        )
    except InputError as error:
        return NewScan(*where, subject, run, reason=_one_line(error))
    return NewScan(*where, subject, run, source, header.shape[3])


def _image_of(path: Path, space: str, asked: Asked) -> NewScan:
    where = (str(path), str(_root(path).resolve()))
    entities = _entities(path)
    subject, run = subject_name(entities["sub"]), run_name(entities)
    try:
        _refuse_unreadable(path)
        _refuse_other_space(path, entities.get("space"), space, asked)
        mask = asked.mask or path.with_name(path.name.removesuffix(T1W) + MASK)
        _refuse_without_mask(mask)
    except InputError as error:
        return NewScan(*where, subject, run, reason=_one_line(error))
    t1w, brain = str(path), str(mask)
    image = Anatomical(subject, t1w, brain, entities.get("ses"), fingerprint_images([t1w, brain]))
    return NewScan(*where, subject, run, image=image)


def _entities(path: Path) -> dict[str, str]:
    """Of a file's name; of one that names no subject, that all of it is the subject's name."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    entities = entities_of(stem)
    return entities if "sub" in entities else {"sub": subject_name(stem)[4:]}


def _refuse_unreadable(path: Path) -> None:
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path} is neither a NIfTI file (.nii, .nii.gz) nor a folder")
    if not path.exists():
        raise InputError(f"{path} does not exist")


def _refuse_without_mask(mask: Path) -> None:
    if not mask.exists():
        raise InputError(f"no brain mask: {mask} does not exist; add it, or give --mask FILE")


def _root(path: Path) -> Path:
    """The folder above that of the subject, or else the file's own."""
    above = [folder.parent for folder in path.absolute().parents if folder.name.startswith("sub-")]
    return above[0] if above else path.absolute().parent


def _refuse_other_space(path: Path, named: str | None, space: str, asked: Asked) -> None:
    if named is None and asked.space is None:
        raise InputError(
            f"{path}: its name has no space-, so it may be in the space of the scanner; the model "
            f"reads scans in {space}: give --space {space} if that is where it lies"
        )
    if (named or asked.space) != space:
        raise InputError(
            f"{path} is in the space {named or asked.space}, and the model was trained in {space}; "
            "take that output of the preprocessing"
        )


def _found_run(path: Path, entities: dict[str, str], mask: Path | None) -> FoundRun:
    """A file with what lies beside it, as `bids_scan` finds it."""
    named = path.with_name(path.name.removesuffix(BOLD) + MASK)
    tables = [path.with_name(run_name(entities) + suffix) for suffix in CONFOUNDS]
    # One table serves all echoes of a run.
    single = {key: value for key, value in entities.items() if key != "echo"}
    tables += [path.with_name(run_name(single) + suffix) for suffix in CONFOUNDS]
    confounds = [str(table) for table in tables if table.exists()]
    sidecar = path.with_name(path.name.removesuffix(".gz").removesuffix(".nii") + ".json")
    return FoundRun(
        entities=entities,
        bold=str(path),
        mask=str(mask or named),
        has_mask=(mask or named).exists(),
        confounds=confounds[0] if confounds else None,
        sidecar=str(sidecar) if sidecar.exists() else None,
    )


def _repetition_time(root: Path, path: Path, asked: Asked) -> float:
    """From the sidecars in seconds, or else from the command line."""
    sidecars = find_sidecars(root, path.absolute())
    metadata = merge_sidecars(sidecars)
    if "RepetitionTime" in metadata:
        return check_repetition_time(metadata["RepetitionTime"], sidecars[-1])
    if asked.repetition_time is not None:
        return asked.repetition_time
    raise InputError(
        f"missing TR: no sidecar of {path} has RepetitionTime; give --repetition-time SECONDS"
    )


def _one_line(error: InputError) -> str:
    return " ".join(str(error).split())
