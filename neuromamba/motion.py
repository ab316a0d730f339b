"""Head motion of a run: six numbers a volume, and what is made of them.

Conventions
-----------
A row of parameters is `trans_x, trans_y, trans_z` (mm) and `rot_x, rot_y, rot_z` (radians), along
and about the axes of the image's world coordinates (RAS+: x to the right, y to the front, z up),
whatever the order of its voxels. They say where the head went: what lies at x in the reference lies
in the volume at

    R (x - centre) + centre + trans,    R = Rx(rot_x) Ry(rot_y) Rz(rot_z),

with right-handed rotations about `centre`, the middle of the grid (`rotation_centre`). Names and
units are those of fMRIPrep's confounds; the centre and the signs of its values depend on the tool
that estimated them.

Framewise displacement: Power et al. 2012 (doi:10.1016/j.neuroimage.2011.10.018).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from neuromamba.files import InputError
from neuromamba.rigid import RigidAligner
from neuromamba.rigid_level import NotAligned

Volume = npt.NDArray[Any]
Volumes = Iterable[Volume] | npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float64]

OUTLIER = 3.5
"""Modified z-score (Iglewicz and Hoaglin 1993) above which a volume is not in the steady state."""
STEADY_BY = 50
"""Volumes among which those before the steady state are sought, as fMRIPrep does."""


@dataclass(frozen=True)
class Motion:
    """Where the head was.

    Attributes
    ----------
    parameters
        (t, 6) float64, see the module's conventions.
    unaligned
        Numbers of the volumes that could not be aligned, from 0, with the reason. Their parameters
        are those of the last volume before them that could be (none: zero); nothing is
        interpolated.
    """

    parameters: Matrix
    unaligned: dict[int, str]


def track_motion(
    volumes: Volumes,
    reference: npt.NDArray[np.floating],
    affine: Matrix,
    mask: Mask | None = None,
) -> Motion:
    """Estimate the motion of every volume, one at a time; only the parameters are kept.

    Parameters
    ----------
    volumes
        (x, y, z) arrays, or one (t, x, y, z) array, of any type of numbers.
    reference
        (x, y, z) image on the same grid, such as `make_reference` gives.
    affine
        (4, 4) voxel indices to mm.
    mask
        (x, y, z) bool; only what lies in it takes part, so let it be generous (a brain mask dilated
        by 5 mm): the steepest gradients are at the edge of the brain. None: everywhere.

    Raises
    ------
    InputError
        When the reference has no structure, a volume is on another grid, or none can be aligned.
    """
    aligner = RigidAligner(reference, affine, mask)
    rows: list[Matrix] = []
    unaligned: dict[int, str] = {}
    pose = None
    for number, volume in enumerate(volumes):
        if volume.shape != aligner.shape:
            raise InputError(
                f"volume {number} (counted from 0) has shape {volume.shape}, the reference of the "
                f"motion {aligner.shape}"
            )
        try:
            pose = aligner.align(volume, pose)
        except NotAligned as reason:
            unaligned[number] = str(reason)
        rows.append(np.zeros(6) if pose is None else _parameters(pose))
    if rows and len(unaligned) == len(rows):
        raise InputError(
            f"none of {len(rows)} volumes can be aligned with the reference (the first one "
            f"{unaligned[0]}): are they of the same run?"
        )
    return Motion(np.array(rows).reshape(-1, 6), unaligned)


def rotation_centre(shape: tuple[int, ...], affine: Matrix) -> Matrix:
    """(3,) mm: the middle of a grid of `shape` (x, y, z) voxels, about which the head rotates."""
    return np.asarray(affine[:3, :3] @ ((np.array(shape[:3]) - 1) / 2) + affine[:3, 3])


def motion_matrices(parameters: Matrix, centre: npt.ArrayLike) -> Matrix:
    """Motion as matrices.

    Parameters
    ----------
    parameters
        (t, 6) from `track_motion`.
    centre
        (3,) mm, from `rotation_centre` of the grid they were estimated on.

    Returns
    -------
    (t, 4, 4) float64
        From mm of the reference to mm of the volume: what resampling needs. The value of the
        aligned volume at x is that of the volume at `matrix @ x`.
    """
    parameters, centre = np.atleast_2d(parameters), np.asarray(centre, dtype=np.float64)
    matrices = np.tile(np.eye(4), (len(parameters), 1, 1))
    rotations = Rotation.from_euler("XYZ", parameters[:, 3:]).as_matrix()
    matrices[:, :3, :3] = rotations
    matrices[:, :3, 3] = parameters[:, :3] + centre - rotations @ centre
    return matrices


def framewise_displacement(parameters: Matrix, radius: float = 50.0) -> Matrix:
    """(t,) mm from the volume before: sum over the six, rotations as arcs at `radius` mm.

    The first is NaN. Source: Power et al. 2012.
    """
    steps = np.abs(np.diff(parameters, axis=0)) @ np.array([1, 1, 1, radius, radius, radius])
    return np.concatenate([[np.nan], steps])[: len(parameters)]


def resample_volume(volume: Volume, matrix: Matrix, affine: Matrix) -> npt.NDArray[np.float32]:
    """The volume as it would be without its motion, by cubic splines, on its own grid.

    `matrix` is (4, 4) from `motion_matrices`; beyond the grid, its nearest voxels go on.
    """
    moved = np.linalg.inv(affine) @ matrix @ affine
    return ndimage.affine_transform(
        volume, moved[:3, :3], moved[:3, 3], order=3, output=np.float32, mode="nearest"
    )


def count_non_steady_state(means: npt.ArrayLike) -> int:
    """How many volumes at the start are brighter or darker than the first 50 usually are.

    `means` is (t,) the mean of each volume. The rule is that of fMRIPrep
    (`nipype.algorithms.confounds.NonSteadyStateDetector`).
    """
    first = np.asarray(means, dtype=np.float64)[:STEADY_BY]
    distance = np.abs(first - np.median(first))
    outlying = 0.6745 * distance > OUTLIER * np.median(distance)
    return int(np.argmin(outlying)) if not outlying.all() else 0


def make_reference(
    volumes: Volumes, affine: Matrix, mask: Mask | None = None, n_volumes: int = 16
) -> npt.NDArray[np.float32]:
    """A robust reference: the median of volumes of the whole run, aligned with one of them.

    Volumes before the steady state are skipped. The one that the others are aligned with is the
    nearest to their median, so a jump is not chosen; where it lies, the reference lies.

    Parameters
    ----------
    volumes, affine, mask
        As in `track_motion`. Of a stream, at most `2 * n_volumes` are held at a time.
    n_volumes
        How many volumes the median is of.

    Returns
    -------
    (x, y, z) float32

    Raises
    ------
    InputError
        When there is no volume, or none has structure.
    """
    kept = _spread(volumes, n_volumes)
    region = np.ones(kept[0].shape, bool) if mask is None else np.asarray(mask, bool)
    middle = np.median([volume[region] for volume in kept], axis=0)
    target = kept[int(np.argmin([np.abs(v[region] - middle).mean() for v in kept]))]
    aligner = RigidAligner(target, affine, mask)
    centre = rotation_centre(target.shape, affine)
    pose, aligned = None, []
    for volume in kept:
        try:
            pose = aligner.align(volume, pose)
        except NotAligned:
            continue  # one of many; the median does without it
        matrix = motion_matrices(_parameters(pose), centre)[0]
        aligned.append(resample_volume(volume, matrix, affine))
    if not aligned:
        raise InputError("no volume of the run can be aligned with another: is it a BOLD series?")
    return np.median(aligned, axis=0).astype(np.float32)


def _spread(volumes: Volumes, n: int) -> list[npt.NDArray[np.float32]]:
    """At most `n` steady and finite volumes, evenly over a series whose length is not known."""
    means, kept, every = [], {}, 1
    for number, volume in enumerate(volumes):
        means.append(float(np.mean(volume, dtype=np.float64)))
        if number % every == 0 and np.isfinite(means[-1]):
            kept[number] = np.array(volume, dtype=np.float32)
        if len(kept) > 2 * n:
            every *= 2
            kept = {number: volume for number, volume in kept.items() if number % every == 0}
    skipped = count_non_steady_state(means) if means else 0
    steady = [volume for number, volume in kept.items() if number >= skipped]
    if not steady:
        raise InputError("the series has no volume without NaN or infinity; is the file whole?")
    chosen = np.linspace(0, len(steady) - 1, min(n, len(steady))).round().astype(int)
    return [steady[at] for at in chosen]


def _parameters(pose: Matrix) -> Matrix:
    """(6,) parameters of a motion about the centre."""
    angles = Rotation.from_matrix(pose[:3, :3]).as_euler("XYZ")
    return np.concatenate([pose[:3, 3], angles])
