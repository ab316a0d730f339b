"""Scans to be predicted: files and derivatives folders that are given on the command line.

A folder is indexed as the `index` stage does it. A single file is looked at in the same way: its
mask, sidecars and confounds are those that BIDS names put beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

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
    """One run to be predicted, or the reason why there is none.

    Attributes
    ----------
    given
        The argument that it was found by.
    root
        Folder within which a subject's name means one person.
    subject, run
        `None` where not even these can be told.
    source
        Its files; `None` where there is a `reason`.
    n_volumes
        By its header.
    """

    given: str
    root: str
    subject: str | None = None
    run: str | None = None
    source: Source | None = None
    n_volumes: int = 0
    reason: str | None = None


def find_scans(paths: Sequence[Path], space: str, asked: Asked) -> list[NewScan]:
    """All runs that some files and folders hold, each once, in the order they are given.

    Parameters
    ----------
    paths
        NIfTI files and derivatives folders.
    space
        Standard space that the model was trained in.

    Raises
    ------
    InputError
        When a mask is given for anything but one file.
    """
    if asked.mask is not None and (len(paths) != 1 or paths[0].is_dir()):
        raise InputError("--mask is the mask of one scan: give that scan's file alone")
    found: dict[object, NewScan] = {}
    for path in paths:
        scans = _in_folder(path, space, asked) if path.is_dir() else [_of_file(path, space, asked)]
        for scan in scans:
            where = (
                scan.source.bold.absolute() if scan.source else (scan.given, scan.subject, scan.run)
            )
            found.setdefault(where, scan)
    return list(found.values())


# --- Folders --------------------------------------------------------------------------------------


def _in_folder(folder: Path, space: str, asked: Asked) -> Iterator[NewScan]:
    """The runs of a derivatives folder, or of the folder of one subject in it."""
    root, one = folder.absolute(), None
    if root.name.startswith("sub-"):
        root, one = root.parent, root.name
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
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    entities = entities_of(stem)
    entities = entities if "sub" in entities else {"sub": subject_name(stem)[4:]}
    subject, run = subject_name(entities["sub"]), run_name(entities)
    try:
        if stem == path.name:
            raise InputError(f"{path} is neither a NIfTI file (.nii, .nii.gz) nor a folder")
        if not path.exists():
            raise InputError(f"{path} does not exist")
        _refuse_other_space(path, entities.get("space"), space, asked)
        found = _found_run(path, entities, asked.mask)
        header = glimpse_series(path)
        if not found.has_mask:
            raise InputError(
                f"no brain mask: {found.mask} does not exist; add it, or give --mask FILE"
            )
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
