"""JSON sidecars of raw scans, by the BIDS inheritance principle.

Those of the dataset, the subject, the session and the image's own folder apply whose suffix is the
image's and whose entities the image has; the nearest wins, key by key.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuromamba.bids_scan import entities_of
from neuromamba.files import InputError, read_json

Level = dict[str, list[tuple[frozenset[tuple[str, str]], Path]]]
"""The sidecars of one folder by suffix: the entities that an image must have, and the path."""
LONGEST_REPETITION_TIME = 30.0


def find_sidecars(root: Path, image: Path) -> tuple[Path, ...]:
    """The JSON files that apply to an image of the dataset at `root`, the nearest last."""
    parts = image.parent.relative_to(root).parts
    folders = [root.joinpath(*parts[:n]) for n in range(len(parts) + 1)]
    levels = [sidecar_level(str(folder), list_folder(folder)[0]) for folder in folders]
    stem, suffix = split_name(image.name)
    return applicable(levels, entities_of(stem), suffix)


def list_folder(folder: Path | str) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder, each sorted; a broken link is a file."""
    files: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            (folders if entry.is_dir() else files).append(entry.name)
    return sorted(files), sorted(folders)


def sidecar_level(folder: str, names: Sequence[str]) -> Level:
    """The JSON files of a folder, by suffix; those that ask for fewer entities come first."""
    level: Level = {}
    for name in names:
        if name.endswith(".json"):
            stem, suffix = split_name(name)
            entities = frozenset(entities_of(stem).items())
            level.setdefault(suffix, []).append((entities, Path(folder, name)))
    for sidecars in level.values():
        sidecars.sort(key=lambda one: len(one[0]))
    return level


def applicable(levels: Sequence[Level], entities: dict[str, str], suffix: str) -> tuple[Path, ...]:
    """The sidecars of some folders, the farthest first, that apply to an image."""
    of_image = entities.items()
    return tuple(
        path for level in levels for needed, path in level.get(suffix, ()) if needed <= of_image
    )


def split_name(name: str) -> tuple[str, str]:
    """`sub-01_task-rest_bold.nii.gz` as `("sub-01_task-rest", "bold")`."""
    stem, _, suffix = name.partition(".")[0].rpartition("_")
    return stem, suffix


def merge_sidecars(sidecars: Sequence[Path]) -> dict[str, Any]:
    """The keys of JSON files, of which the last wins; `InputError` names one that is broken."""
    metadata: dict[str, Any] = {}
    for path in sidecars:
        metadata |= read_sidecar(path)
    return metadata


def read_sidecar(path: Path) -> dict[str, Any]:
    """One sidecar's keys; `InputError` when it is a broken link, not JSON, or not an object."""
    try:
        value = read_json(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error}); ask for permission to read it"
        ) from None
    except InputError:
        if path.is_symlink() and not path.exists():
            raise InputError(
                f"{path} is a link to content that is not here; fetch it (with DataLad: datalad "
                "get)"
            ) from None
        raise
    if not isinstance(value, dict):
        raise InputError(
            f"{path} must hold a JSON object ({{...}}), not {type(value).__name__}; repair it"
        )
    return value


def check_repetition_time(value: Any, sidecar: Path | str) -> float:
    """A sidecar's RepetitionTime in seconds; `InputError` when it cannot be one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= LONGEST_REPETITION_TIME:
        raise InputError(
            f"RepetitionTime must be seconds, above 0 and at most {LONGEST_REPETITION_TIME:g}: "
            f"{sidecar} has {value!r}; correct it"
        )
    return float(value)
