"""Files of one synthetic run, named and laid out as fMRIPrep does: BOLD, brain mask, confounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from isal import igzip
from numpy.typing import DTypeLike, NDArray

from neuromamba.demo_brain import Brain
from neuromamba.demo_signal import Run, framewise_displacement
from neuromamba.files import write_json, write_text

SPACE = "MNI152NLin2009cAsym"
TEMPLATE = f"https://templateflow.s3.amazonaws.com/tpl-{SPACE}/tpl-{SPACE}_res-01_T1w.nii.gz"
"""TemplateFlow's address of the image that defines the space."""
INTENSITY_STEP = 8.0
"""Step of the stored BOLD: well below the signal's SD, and coarse enough to compress well."""
MNI_CODE = 4


def write_run(folder: Path, entities: str, run: Run, rng: np.random.Generator) -> None:
    """Write BOLD, mask, confounds and their sidecars of one run into `folder`."""
    brain = run.brain
    summary = _write_bold(folder / f"{entities}_space-{SPACE}_desc-preproc_bold", run, rng)
    mask = folder / f"{entities}_space-{SPACE}_desc-brain_mask"
    with open_nifti(with_suffix(mask, ".nii.gz"), brain, np.uint8) as stream:
        stream.write(paint(brain, np.ones(brain.n_voxels, np.uint8)))
    write_json(
        with_suffix(mask, ".json"),
        {
            "Type": "Brain",
            "Description": "Outline of the MNI152 template",
            "Sources": [],
            "SpatialReference": TEMPLATE,
        },
    )
    table = _confounds(run, summary)
    confounds = folder / f"{entities}_desc-confounds_timeseries"
    write_text(
        with_suffix(confounds, ".tsv"),
        table.to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.6g", lineterminator="\n"),
    )
    columns = {column: {"Description": _explain(column)} for column in table.columns}
    write_json(with_suffix(confounds, ".json"), columns)


def _write_bold(stem: Path, run: Run, rng: np.random.Generator) -> NDArray[np.float64]:
    """Stream the BOLD to its file and return what `_summary` says of its volumes."""
    volumes = len(run.parcels)
    rows: list[NDArray[np.float64]] = []
    last = None
    with open_nifti(
        with_suffix(stem, ".nii.gz"),
        run.brain,
        np.int16,
        volumes,
        run.repetition_time,
        INTENSITY_STEP,
    ) as stream:
        for block in run.blocks(rng):
            for volume in np.rint(block / INTENSITY_STEP).astype(np.int16):
                stream.write(paint(run.brain, volume))
            rows.append(_summary(block, last, run.brain))
            last = block[-1]
    sidecar = {
        "RepetitionTime": run.repetition_time,
        "TaskName": "rest",
        "SkullStripped": True,
        "SliceTimingCorrected": False,
        "Description": "Synthetic BOLD",
        "Sources": [],
        "SpatialReference": TEMPLATE,
    }
    write_json(with_suffix(stem, ".json"), sidecar)
    return np.concatenate(rows)


def _summary(
    block: NDArray[np.float32], last: NDArray[np.float32] | None, brain: Brain
) -> NDArray[np.float64]:
    """Global, CSF and white-matter means and DVARS of each volume of a block: (volume, 4)."""
    before = block[:1] if last is None else last[None]
    steps = np.diff(np.concatenate([before, block]), axis=0)
    dvars = np.sqrt(np.mean(steps**2, axis=1, dtype=np.float64))
    if last is None:
        dvars[0] = np.nan
    means = [block.mean(axis=1), block @ _share(brain.csf), block @ _share(brain.white_matter)]
    return np.stack([*means, dvars], axis=1).astype(np.float64)


def _share(region: NDArray[np.bool_]) -> NDArray[np.float32]:
    return (region / max(int(region.sum()), 1)).astype(np.float32)


def _confounds(run: Run, summary: NDArray[np.float64]) -> pd.DataFrame:
    """The columns of fMRIPrep's confounds table that the synthetic run has a meaning for."""
    volumes = len(summary)
    basic = dict(zip(("global_signal", "csf", "white_matter"), summary.T[:3], strict=True))
    axes = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
    basic.update(zip(axes, run.motion.T, strict=True))
    columns: dict[str, NDArray[Any]] = {}
    for name, course in basic.items():
        change = np.concatenate([[np.nan], np.diff(course)])
        columns[name] = course
        columns[f"{name}_derivative1"] = change
        columns[f"{name}_derivative1_power2"] = change**2
        columns[f"{name}_power2"] = course**2
    dvars = summary[:, 3]
    displacement = framewise_displacement(run.motion)
    columns["dvars"] = dvars
    columns["std_dvars"] = dvars / np.nanmedian(dvars)
    columns["framewise_displacement"] = displacement
    for i in range(int(2 * volumes * run.repetition_time / 128)):
        columns[f"cosine{i:02d}"] = np.sqrt(2 / volumes) * np.cos(
            np.pi * (i + 1) * (np.arange(volumes) + 0.5) / volumes
        )
    outliers = np.flatnonzero((displacement > 0.5) | (columns["std_dvars"] > 1.5))
    for i, volume in enumerate(outliers):
        columns[f"motion_outlier{i:02d}"] = (np.arange(volumes) == volume).astype(int)
    return pd.DataFrame(columns)


def _explain(column: str) -> str:
    base = column.removesuffix("_power2").removesuffix("_derivative1")
    meanings = {
        "global_signal": "mean over the brain mask",
        "csf": "mean over the darkest 8 % of the template",
        "white_matter": "mean over the brightest 25 % of the template",
        "dvars": "root mean square change from the volume before",
        "std_dvars": "DVARS divided by its median over the run",
        "framewise_displacement": "Power's framewise displacement, mm, 50 mm sphere",
    }
    if base.startswith("trans_"):
        text = "translation, mm"
    elif base.startswith("rot_"):
        text = "rotation, rad"
    elif base.startswith("cosine"):
        text = "discrete cosine basis of a 128 s high-pass filter"
    elif base.startswith("motion_outlier"):
        text = "1 at a volume with framewise displacement > 0.5 mm or standardised DVARS > 1.5"
    else:
        text = meanings[base]
    if "_derivative1" in column:
        text = f"change from the volume before: {text}"
    return f"square of: {text}" if column.endswith("_power2") else text


# --- NIfTI --------------------------------------------------------------------------------------


@contextmanager
def open_nifti(
    path: Path,
    brain: Brain,
    dtype: DTypeLike,
    volumes: int | None = None,
    repetition_time: float = 0.0,
    step: float = 1.0,
) -> Iterator[igzip.IGzipFile]:
    """Open a `.nii.gz` on the demo's grid for the bytes of its volumes; without `volumes`, 3D.

    Neither name nor time stand in the gzip header, so that the same content is the same bytes.
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(brain.shape if volumes is None else (*brain.shape, volumes))
    size = float(brain.affine[0, 0])
    header.set_zooms([size] * 3 + ([] if volumes is None else [repetition_time]))
    header.set_xyzt_units("mm", "sec")
    header.set_qform(brain.affine, MNI_CODE)
    header.set_sform(brain.affine, MNI_CODE)
    header.set_slope_inter(step, 0)
    header.set_data_offset(352)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as raw,
        igzip.IGzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as stream,
    ):
        stream.write(header.binaryblock + bytes(4))
        yield stream


def paint(brain: Brain, values: NDArray[Any]) -> bytes:
    """Bytes of one volume on the whole grid, 0 outside the brain."""
    volume = np.zeros(brain.mask.shape, values.dtype)
    volume[brain.mask] = values
    return volume.tobytes()


def with_suffix(stem: Path, suffix: str) -> Path:
    """Append to a BIDS stem, whose labels may hold dots that `Path.with_suffix` would cut off."""
    return stem.with_name(stem.name + suffix)
