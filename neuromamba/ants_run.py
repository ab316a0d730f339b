"""One run of the `ants` engine, from the raw file to the template's space.

Design choices
--------------
- Motion is followed first, then slices are timed alike, then space is interpolated once, as in
  fMRIPrep: registration and motion become points in each volume.
- The run's mask is the template's brain where every volume has been scanned and gives a signal.
- Memory holds a few volumes: series lie in files of the work folder, which are removed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from tqdm import tqdm

from neuromamba.ants_alignment import Alignment, align, find_brain
from neuromamba.ants_anatomy import Anatomy
from neuromamba.ants_outputs import Outputs, bold_sidecar
from neuromamba.ants_registration import map_points
from neuromamba.ants_template import BrainTemplate, Grid
from neuromamba.config import Preprocess
from neuromamba.confound_signals import make_confounds
from neuromamba.files import InputError, write_json, write_text
from neuromamba.motion import (
    Motion,
    count_non_steady_state,
    make_reference,
    motion_matrices,
    rotation_centre,
    track_motion,
)
from neuromamba.nifti import Header, read_header
from neuromamba.raw_bids import RawRun
from neuromamba.resample_series import (
    Series,
    correct_slice_timing,
    decode_series,
    map_new,
    middle_of,
    open_series,
    resample_volumes,
    slice_times,
    storage,
    write_image,
)
from neuromamba.sidecars import check_repetition_time, merge_sidecars

MIN_VOLUMES = 10
"""Fewer give neither a reference nor confounds that mean anything."""
MARGIN_MM = 8.0
"""How far around the template's brain values are computed."""
MOTION_MARGIN_MM = 5.0
"""How far around the run's brain motion is estimated."""
MIN_SIGNAL = 0.1
"""Of the brain's median in the reference; what is darker lost its signal to the air nearby."""


@dataclass(frozen=True)
class Job:
    """What all runs of a subject share."""

    bids: Path
    work: Path
    settings: Preprocess
    template: BrainTemplate
    grid: Grid
    anatomy: Anatomy | None
    outputs: Outputs

    @cached_property
    def near(self) -> npt.NDArray[np.intp]:
        """(voxel,) numbers of the grid's voxels in the template's brain and around it."""
        mask, voxel_size = self.template.mask, self.template.grid.affine[0, 0]
        depth = ndimage.distance_transform_edt(~mask, sampling=voxel_size)
        return np.flatnonzero(self.template.on(self.grid, depth <= MARGIN_MM).ravel(order="F"))


@dataclass(frozen=True)
class _Scan:
    """A run on disk, in time: `series` is (time, z, y, x), `brain` the reference's (x, y, z)."""

    run: RawRun
    header: Header
    metadata: dict[str, Any]
    series: Series
    non_steady: int
    reference: nibabel.Nifti1Image
    brain: npt.NDArray[np.bool_]
    motion: Motion
    start_time: float | None

    @property
    def repetition_time(self) -> float:
        return float(self.metadata["RepetitionTime"])


def preprocess_run(job: Job, run: RawRun) -> None:
    """Write a run and its confounds; `InputError` when it cannot be used."""
    header, metadata = _usable(run)
    with _folder(job.work / run.name) as work:
        scan = _in_time(job, run, header, metadata, work)
        alignment = align(scan.reference, scan.brain, job.anatomy, job.template, work, header.path)
        mask, series, voxels = _in_space(job, scan, alignment, work)
        _write_confounds(job, scan, mask, series, voxels)
        sidecar = bold_sidecar(
            job.outputs, run, scan.repetition_time, scan.start_time, alignment, job.anatomy
        )
        sidecar["NonSteadyStateVolumes"] = scan.non_steady
        sidecar["UnalignedVolumes"] = {str(k): v for k, v in scan.motion.unaligned.items()}
        sidecar["Interpolation"] = job.settings.ants.interpolation
        write_json(job.outputs.func(run, "desc-preproc_bold.json"), sidecar)


def _usable(run: RawRun) -> tuple[Header, dict[str, Any]]:
    """The run's header and metadata; `InputError` when it cannot be used, as far as they tell."""
    if run.problem:
        raise InputError(run.problem)
    if len(run.bold) > 1:
        raise InputError(
            f"{run.name} has {len(run.bold)} echoes, which the ants engine cannot combine; use "
            "fMRIPrep (preprocess.engine: docker or apptainer)"
        )
    header = read_header(run.bold[0])
    if header.n_volumes < MIN_VOLUMES:
        raise InputError(
            f"{header.path}: has {header.n_volumes} volumes, and at least {MIN_VOLUMES} are needed"
        )
    metadata = merge_sidecars(run.sidecars[0])
    check_repetition_time(metadata.get("RepetitionTime"), f"the sidecar of {header.path}")
    return header, metadata


# --- Time -----------------------------------------------------------------------------------------


def _in_time(job: Job, run: RawRun, header: Header, metadata: dict[str, Any], work: Path) -> _Scan:
    """Decode a run, follow its motion, and time its slices alike, in this order, as fMRIPrep."""
    series = decode_series(header, work / "series")
    volumes = series.transpose(0, 3, 2, 1)
    non_steady = count_non_steady_state([volume.mean(dtype=np.float64) for volume in series])
    with _naming(header.path):
        reference = nibabel.Nifti1Image(make_reference(volumes, header.affine), header.affine)
    sizes = nibabel.affines.voxel_sizes(header.affine)
    brain = find_brain(reference, header.path)
    depth = ndimage.distance_transform_edt(~brain, sampling=sizes)
    shown = tqdm(volumes, desc=f"{run.name}: motion", unit="volume", leave=False, mininterval=1.0)
    still = reference.get_fdata(dtype=np.float32)
    with _naming(header.path):
        motion = track_motion(shown, still, header.affine, depth <= MOTION_MARGIN_MM)
    start_time = None
    if job.settings.ants.slice_timing and "SliceTiming" in metadata:
        axis, times = slice_times(metadata, series.shape, header.path)
        correct_slice_timing(series, axis, times, float(metadata["RepetitionTime"]), non_steady)
        start_time = middle_of(times)
    return _Scan(run, header, metadata, series, non_steady, reference, brain, motion, start_time)


# --- Space ----------------------------------------------------------------------------------------


def _in_space(
    job: Job, scan: _Scan, alignment: Alignment, work: Path
) -> tuple[npt.NDArray[np.bool_], Series, npt.NDArray[np.intp]]:
    """Write the run, its mask and its reference on the template's grid.

    Returns
    -------
    (voxel,) bool, (time, voxel) float32 and (voxel,) intp
        The run's mask, its series, and the voxels' numbers on the grid, for the template's brain.
    """
    template, grid, outputs = job.template, job.grid, job.outputs
    near = job.near
    is_brain = template.on(grid, template.mask).ravel(order="F")[near]
    points = map_points(grid.points(near), alignment.transforms)
    header, n_volumes = scan.header, len(scan.series)
    centre = rotation_centre(header.shape, header.affine)
    matrices = motion_matrices(scan.motion.parameters, centre)
    highest = max(float(volume.max()) for volume in scan.series)
    dtype, step = storage(header, highest)
    shape = (n_volumes, int(is_brain.sum()))
    brain = map_new(work / "brain", shape)
    seen = np.ones(len(near), dtype=bool)
    options = job.settings.ants.interpolation, job.settings.threads
    volumes = resample_volumes(scan.series, header.affine, points, matrices, *options)
    path = outputs.func(scan.run, "desc-preproc_bold.nii.gz")
    with open_series(path, grid, n_volumes, scan.repetition_time, dtype, step) as stream:
        label = f"{scan.run.name}: to {template.space}"
        shown = tqdm(volumes, label, n_volumes, leave=False, unit="volume", mininterval=1.0)
        for number, (values, inside) in enumerate(shown):
            brain[number] = values[is_brain]
            seen &= inside
            stream.write(_paint(grid, near, values, dtype, step))
    if not (is_brain & seen).any():
        raise InputError(f"{header.path}: no voxel of the template's brain is in all its volumes")
    reference = _still(scan, points)
    seen &= reference >= MIN_SIGNAL * np.median(reference[is_brain & seen])
    mask = (is_brain & seen).astype(np.uint8)
    for ending, data in (("desc-brain_mask.nii.gz", mask), ("boldref.nii.gz", reference)):
        image = np.zeros(grid.n_voxels, dtype=data.dtype)
        image[near] = data
        write_image(outputs.func(scan.run, ending), grid, image.reshape(grid.shape, order="F"))
    return seen[is_brain], brain, near[is_brain]


def _still(scan: _Scan, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The reference volume at points of its own."""
    data = scan.reference.get_fdata(dtype=np.float32).T[None]
    values, _ = next(resample_volumes(data, scan.header.affine, points, np.eye(4)[None], "linear"))
    return values


def _paint(
    grid: Grid,
    voxels: npt.NDArray[np.intp],
    values: npt.NDArray[np.float32],
    dtype: np.dtype[Any],
    step: float,
) -> bytes:
    """A volume as it is stored, 0 but for some voxels."""
    volume = np.zeros(grid.n_voxels, dtype)
    if dtype.kind == "i":
        limits = np.iinfo(dtype)
        values = np.clip(np.rint(values / np.float32(step)), limits.min, limits.max)
    volume[voxels] = values
    return volume.tobytes()


def _write_confounds(
    job: Job,
    scan: _Scan,
    mask: npt.NDArray[np.bool_],
    series: Series,
    voxels: npt.NDArray[np.intp],
) -> None:
    tissues = {
        name: job.template.on(job.grid, tissue).ravel(order="F")[voxels]
        for name, tissue in job.template.tissues.items()
    }
    table, columns = make_confounds(
        series,
        mask,
        tissues,
        scan.motion.parameters,
        scan.repetition_time,
        scan.non_steady,
        job.settings.ants.motion_parameters,
        scan.motion.unaligned,
    )
    text = table.to_csv(
        sep="\t", index=False, na_rep="n/a", float_format="%.9g", lineterminator="\n"
    )
    write_text(job.outputs.confounds(scan.run, ".tsv"), text)
    write_json(job.outputs.confounds(scan.run, ".json"), columns)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of which file an error is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """An empty folder that is removed in the end, with whatever an earlier attempt left in it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
