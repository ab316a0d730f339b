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
SLICE_AXES = {"i": 0, "j": 1, "k": 2}
LONGEST_TIME = 1e9
"""Seconds, or milliseconds: what is longer (or NaN) is no time."""


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


def check_slice_timing(
    metadata: dict[str, Any], shape: Sequence[int], repetition_time: float, image: Path | str
) -> tuple[int, list[float]]:
    """The slices' axis, 0 to 2 for x to z, and when in a volume each is taken: s, by its index.

    Parameters
    ----------
    metadata
        With `SliceTiming` (s), and maybe `SliceEncodingDirection`: `k-` means that the times begin
        with the last slice.
    shape
        Voxels along x, y, z.
    repetition_time
        s.
    image
        The scan, for messages.

    Raises
    ------
    InputError
        When the times are none, or do not fit the scan.
    """
    direction = str(metadata.get("SliceEncodingDirection", "k"))
    axis = SLICE_AXES.get(direction.removesuffix("-"))
    times = metadata["SliceTiming"]
    if axis is None:
        wrong = f"SliceEncodingDirection {direction!r} is none of i, j, k (or with a minus)"
    elif not (isinstance(times, list) and all(map(_is_time, times))):
        wrong = "it is not a list of numbers"
    elif len(times) != shape[axis]:
        wrong = f"it has {len(times)} times for {shape[axis]} slices"
    elif min(times) < 0 or max(times) >= repetition_time:
        unit = " (milliseconds?)" if max(times) > 10 * repetition_time else ""
        wrong = f"times reach from {min(times):g} to {max(times):g} s{unit}, TR {repetition_time:g}"
    else:
        in_order = times[::-1] if direction.endswith("-") else times
        return axis, [float(time) for time in in_order]
    raise InputError(
        f"bad SliceTiming: in the sidecar of {image} {wrong}; correct or remove it, or switch the "
        "correction off"
    )


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < LONGEST_TIME
