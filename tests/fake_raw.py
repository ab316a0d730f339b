"""Tiny raw BIDS datasets for several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fake_bids import write_bold

SLICES = 4
GOOD = {"RepetitionTime": 2.0, "SliceTiming": [0.0, 0.5, 1.0, 1.5]}


def add_raw_run(
    root: Path,
    entities: str,
    shape: tuple[int, ...] = (4, 4, SLICES, 30),
    sidecar: Any = GOOD,
    step: float = 2.0,
    suffix: str = "bold.nii.gz",
) -> Path:
    """Write the BOLD of one run, and its sidecar unless that is `None`; return the BOLD's path."""
    bold = folder_of(root, entities) / "func" / f"{entities}_{suffix}"
    write_bold(bold, shape, step)
    if sidecar is not None:
        sidecar_of(bold).write_text(json.dumps(sidecar))
    return bold


def add_t1w(root: Path, entities: str, shape: tuple[int, ...] = (4, 4, 4)) -> Path:
    """Write a T1w image; return its path."""
    path = folder_of(root, entities) / "anat" / f"{entities}_T1w.nii.gz"
    write_bold(path, shape)
    return path


def add_subject(root: Path, name: str, **settings: Any) -> Path:
    """Write a subject with a T1w image and a run of rest; return the BOLD's path."""
    add_t1w(root, name)
    return add_raw_run(root, f"{name}_task-rest", **settings)


def folder_of(root: Path, entities: str) -> Path:
    parts = [part for part in entities.split("_") if part.startswith(("sub-", "ses-"))]
    return root.joinpath(*parts)


def sidecar_of(image: Path) -> Path:
    return image.with_name(image.name.partition(".")[0] + ".json")
