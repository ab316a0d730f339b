"""Tiny derivatives folders, named like fMRIPrep's, for several test files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SPACE = "MNI152NLin2009cAsym"


def write_bold(path: Path, shape: tuple[int, ...] = (4, 4, 4, 30), step: float = 1.5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4))
    if len(shape) > 3:
        image.header.set_zooms((1, 1, 1, step) + (1,) * (len(shape) - 4))
        image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)


def add_run(
    root: Path,
    entities: str,
    version: str = f"space-{SPACE}",
    shape: tuple[int, ...] = (4, 4, 4, 30),
    sidecar: dict[str, Any] | None = None,
) -> Path:
    """Write BOLD, mask, confounds and sidecar of one run; return the BOLD's path."""
    parts = entities.split("_")
    folders = [part for part in parts if part.startswith(("sub-", "ses-"))]
    stem = root.joinpath(*folders, "func", f"{entities}_{version}")
    bold = Path(f"{stem}_desc-preproc_bold.nii.gz")
    write_bold(bold, shape)
    write_bold(Path(f"{stem}_desc-brain_mask.nii.gz"), (4, 4, 4))
    (bold.parent / f"{entities}_desc-confounds_timeseries.tsv").write_text("csf\n0\n")
    sidecar = {"RepetitionTime": 2.0} if sidecar is None else sidecar
    Path(f"{stem}_desc-preproc_bold.json").write_text(json.dumps(sidecar))
    return bold
