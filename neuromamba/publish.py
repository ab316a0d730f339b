"""Check what preprocessing made of a subject, and put the whole runs where the index finds them.

Design choices
--------------
- Each subject is made in a private folder, because programs that work on several subjects of one
  folder race for the files at its top.
- A run is whole when its BOLD and mask can be read to their ends on one grid, and its confounds
  have a row for each volume. A run that is not is not published; the subject's others are.
- A subject's folder appears by one rename. All that leads there lies in `.neuromamba` beside it:
  `new/sub-01` is complete from the moment it has that name, so whatever ends the job, the next
  start finishes what is there (`recover`). `old/sub-01` is what it replaces, and is only removed
  once the new one is in its place.
- The record of how a subject was made is in its folder, so that the two cannot disagree.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuromamba.bids_scan import BOLD, CONFOUNDS, MASK, ORDER, entities_of, run_name
from neuromamba.files import InputError, atomic_path, read_json, write_json
from neuromamba.nifti import Header, read_blocks, read_header
from neuromamba.raw_bids import RawRun, RawSubject
from neuromamba.tables import read_table

HIDDEN = ".neuromamba"
"""Folder of a derivatives folder for what is in progress."""
RECORD = ".neuromamba.json"
"""File of a subject's folder that tells how it was made."""
DESCRIPTION = "dataset_description.json"
SURFACES = "sourcedata/freesurfer"
"""Folder of FreeSurfer's subjects."""
GRID_MM = 1e-3
"""Largest difference between the affines of a run and its mask."""


# --- Verification -------------------------------------------------------------------------------


def verify_subject(output: Path, subject: RawSubject, space: str) -> dict[str, str]:
    """Why runs of a subject are not whole, by their names; whole runs are not in it.

    Parameters
    ----------
    output
        A folder of BIDS-Derivatives.
    subject
        The subject and the runs that must be there.
    space
        In which space.
    """
    reasons = {}
    for run in subject.runs:
        try:
            verify_run(output, run, space)
        except InputError as error:
            text = str(error).replace(f"{output}/", "")  # which another attempt may not have
            reasons[run.name] = " ".join(text.split())
    return reasons


def verify_run(output: Path, run: RawRun, space: str) -> None:
    """Raise `InputError` unless a run is whole, in every resolution that there is of it."""
    session = f"ses-{run.entities['ses']}" if "ses" in run.entities else ""
    folder = output / run.subject / session / "func"
    names = sorted(path.name for path in folder.glob("*") if _is_of_run(path.name, run))
    bold = [n for n in names if n.endswith(BOLD) and entities_of(n).get("space") == space]
    tables = [name for name in names if name.endswith(CONFOUNDS)]
    if not bold:
        raise InputError(f"{folder}: has no {run.name}_space-{space}_*{BOLD.lstrip('_')}")
    if not tables:
        raise InputError(f"{folder}: has no {run.name}{CONFOUNDS[0]}")
    for name in bold:
        header = _read_whole(folder / name)
        mask = _read_whole(folder / (name.removesuffix(BOLD) + MASK))
        if not header.is_series:
            raise InputError(f"{header.path}: is 3D; a BOLD run has a time axis")
        if header.shape != mask.shape or not np.allclose(
            header.affine, mask.affine, rtol=0, atol=GRID_MM
        ):
            raise InputError(f"{mask.path}: is on another grid than {name}")
        for table in tables:
            rows = len(read_table(folder / table))
            if rows != header.n_volumes:
                raise InputError(
                    f"{folder / table}: has {rows} rows, but {name} has {header.n_volumes} volumes"
                )


def _is_of_run(name: str, run: RawRun) -> bool:
    """Whether a file is a version of a run: all echoes combined, the magnitude, said or not."""
    entities = {key: value for key, value in entities_of(name).items() if key != "part"}
    return "echo" not in entities and run_name(entities) == run.name


def _read_whole(path: Path) -> Header:
    """The header of an image that can be read to its end."""
    header = read_header(path)
    for _ in read_blocks(header):
        pass
    return header


# --- Publication --------------------------------------------------------------------------------


def read_record(derivatives: Path, subject: str) -> dict[str, Any] | None:
    """How a published subject was made; `None` where nothing says so."""
    path = derivatives / subject / RECORD
    return read_json(path) if path.exists() else None


def publish(
    output: Path,
    derivatives: Path,
    subject: RawSubject,
    whole: Collection[str],
    record: dict[str, Any],
) -> None:
    """Put a subject's whole runs, anatomy and reports into `derivatives`; older ones are replaced.

    Parameters
    ----------
    output
        The private folder that they were made in. It loses them if a rename can move them;
        from another file system they are copied. So are surfaces while a run is left out, as
        another attempt goes on from them.
    derivatives
        What others read. Files at its top are added where they are not there yet.
    subject
        The subject.
    whole
        Names of the runs that are whole; files of other runs are left out.
    record
        How the subject was made, for `read_record`.
    """
    name = subject.name
    recover(derivatives, name)
    _drop_other_runs(output / name, subject, whole)
    write_json(output / name / RECORD, record)
    _share(output, derivatives, name)
    with atomic_path(derivatives / HIDDEN / "new" / name) as staged:
        again = not {run.name for run in subject.runs} <= {*whole}
        for entry in list(_entries(output, name)):
            target = staged / entry.relative_to(output)
            target.parent.mkdir(parents=True, exist_ok=True)
            is_surface = entry.is_relative_to(output / SURFACES)
            (_copy if again and is_surface else _move)(entry, target)
    _swap(derivatives, name)


def recover(derivatives: Path, name: str) -> None:
    """Finish, or else undo, what an earlier job of a subject had begun to publish."""
    hidden = derivatives / HIDDEN
    for unfinished in hidden.glob(f"*/.tmp-*-{name}"):
        _discard(unfinished)
    if (hidden / "new" / name).is_dir():
        _swap(derivatives, name)
    old = hidden / "old" / name
    for entry in list(_entries(old, name)):
        place = derivatives / entry.relative_to(old)
        if not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            entry.rename(place)
    _discard(old)


def withdraw(derivatives: Path, name: str) -> None:
    """Take a subject out of what others read; `recover` brings it back."""
    recover(derivatives, name)
    for entry in list(_entries(derivatives, name)):
        _put_aside(derivatives, entry, name)


def _swap(derivatives: Path, name: str) -> None:
    """Put a complete `new` in place and remove what it replaces; goes on where it was stopped."""
    new = derivatives / HIDDEN / "new" / name
    if (new / name).is_dir():  # which is moved first: all that is in the derivatives is older
        for entry in list(_entries(derivatives, name)):
            _put_aside(derivatives, entry, name)
    for entry in list(_entries(new, name)):
        place = derivatives / entry.relative_to(new)
        place.parent.mkdir(parents=True, exist_ok=True)
        entry.rename(place)
    _discard(new)
    _discard(derivatives / HIDDEN / "old" / name)


def _put_aside(derivatives: Path, entry: Path, name: str) -> None:
    old = derivatives / HIDDEN / "old" / name / entry.relative_to(derivatives)
    _discard(old)
    old.parent.mkdir(parents=True, exist_ok=True)
    entry.rename(old)


def _entries(root: Path, name: str) -> Iterator[Path]:
    """What belongs to one subject: its folder, then its reports and surfaces."""
    if (root / name).is_dir():
        yield root / name
    yield from _reports(root, name)
    surfaces = root / SURFACES
    yield from sorted({*surfaces.glob(name), *surfaces.glob(f"{name}_*")})


def _reports(root: Path, name: str) -> list[Path]:
    return sorted({*root.glob(f"{name}.html"), *root.glob(f"{name}_*.html")})


def _drop_other_runs(folder: Path, subject: RawSubject, whole: Collection[str]) -> None:
    """Remove the functional files of runs that are not whole, or not asked for."""
    keys = {*ORDER, *(key for run in subject.runs for key in run.entities)} - {"echo"}
    for path in [*folder.glob("func/*"), *folder.glob("ses-*/func/*")]:
        entities = {k: v for k, v in entities_of(path.name).items() if k in keys}
        if run_name(entities) not in whole:
            path.unlink()


def _share(output: Path, derivatives: Path, name: str) -> None:
    """Add the files that belong to no subject; those that are there already stay."""
    for path in sorted(output.rglob("*")):
        relative = path.relative_to(output)
        own = any(
            part == name or part.startswith((f"{name}_", f"{name}.")) for part in relative.parts
        )
        if own or not (path.is_file() or path.is_symlink()):
            continue
        place = derivatives / relative
        if relative == Path(DESCRIPTION):
            _describe(path, place)
        elif not os.path.lexists(place):
            with atomic_path(place, keep=partial(os.path.lexists, place)) as temporary:
                _copy(path, temporary)


def _describe(made: Path, place: Path) -> None:
    """Write `dataset_description.json`, or add to it the programs that it does not name yet."""
    new = read_json(made)
    there = read_json(place) if place.exists() else {**new, "GeneratedBy": []}
    programs = there.get("GeneratedBy", [])
    missing = [program for program in new.get("GeneratedBy", []) if program not in programs]
    if missing or not place.exists():
        write_json(place, {**there, "GeneratedBy": [*missing, *programs]})


# --- Files --------------------------------------------------------------------------------------


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, a link as a link, or a folder.

    Not `shutil.copytree`, whose errors do not tell a full disk from others.
    """
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            _copy(entry, target / entry.name)
    else:
        shutil.copy2(source, target)


def _discard(path: Path) -> None:
    """Remove a file or folder; renamed first, so that no part of it passes for the whole."""
    if not os.path.lexists(path):
        return
    doomed = path.rename(path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}"))
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()
