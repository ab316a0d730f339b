"""Walk through the folders of BIDS-like derivatives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuromamba.config import Dataset
from neuromamba.files import InputError


def root_of(dataset: Dataset) -> str:
    """The folder of the derivatives; `InputError` when it is none."""
    root = dataset.derivatives.rstrip("/") or "/"
    if not Path(root).is_dir():
        raise InputError(
            f"{root} is not a folder; set derivatives in the dataset YAML to the folder that "
            "holds sub-*"
        )
    return root


@contextmanager
def readable() -> Iterator[None]:
    """Turn a folder that may not be listed into an `InputError`."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            f"{error.filename} cannot be listed; ask for permission to read it"
        ) from None


def func_folders(root: str) -> Iterator[tuple[str, set[str], str]]:
    """The `func` folders below `root`: path, names of their files, and `sub-01_ses-1`."""
    places = []
    for subject in _folders(root, "sub-"):
        places.append((subject, subject))
        for session in _folders(f"{root}/{subject}", "ses-"):
            places.append((f"{subject}/{session}", f"{subject}_{session}"))
    for place, stem in places:
        folder = f"{root}/{place}/func"
        try:
            with os.scandir(folder) as entries:
                names = {entry.name for entry in entries}
        except FileNotFoundError:
            continue
        yield folder, names, stem


def _folders(folder: str, prefix: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [e.name for e in entries if e.name.startswith(prefix) and e.is_dir()]
