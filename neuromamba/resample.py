"""Resampling to the target grid as one sparse matrix over brain voxels.

Trilinear interpolation is linear, so a run's resampling is a matrix with at most 8 numbers a row:
made once from the two affines, applied to every volume. Only brain voxels have rows, and only the
source voxels that these rows touch are ever converted to float. Where the two grids coincide the
rows have a single 1 and the values are copied unchanged.

Points beyond the centres of the source's outermost voxels are outside: 0, as in
`nilearn.image.resample_img(interpolation="linear")`, which the tests compare with.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from neuromamba.config import Volumes

Shape = tuple[int, int, int]
Affine = npt.NDArray[np.float64]

CENTRE_MM = (0.5, -17.5, 4.5)
"""Centre of the field of view, MNI mm. The brain of MNI152NLin2009cAsym (2 mm mask: x -72.5..71.5,
y -108.5..71.5, z -72.5..81.5) lies inside 96 voxels of 2 mm with at least 2 to spare on each side,
and the grid falls on that of fMRIPrep's `res-2`, whose values are therefore copied unchanged."""
SNAP = 1e-6, 1e-4
"""Where source and target step alike, their ratio is an integer but for the rounding of float32
affines: the entries of the linear part and the shift (in voxels) that are this near are rounded.
Otherwise grids that coincide would miss each other, and border voxels would fall outside."""


def target_affine(volumes: Volumes) -> npt.NDArray[np.float64]:
    """Affine of the target grid: (4, 4), voxel indices (x, y, z) to MNI mm, axes to R, A, S."""
    affine = np.diag([volumes.voxel_size] * 3 + [1.0])
    affine[:3, 3] = CENTRE_MM - volumes.voxel_size * (np.array(volumes.shape) - 1) / 2
    return affine


def source_coordinates(
    voxels: npt.NDArray[np.intp], shape: Shape, affine: Affine, source_affine: Affine
) -> npt.NDArray[np.float64]:
    """Where voxels of the target grid lie on the source grid.

    Parameters
    ----------
    voxels
        (voxel,) numbers of the target voxels, x fastest.
    shape
        Target grid, voxels along x, y, z.
    affine, source_affine
        (4, 4) voxel indices to mm of the target and of the source.

    Returns
    -------
    (3, voxel) float64
        Source voxel indices (x, y, z), fractional.
    """
    indices = np.stack(np.unravel_index(voxels, shape, order="F"))
    to_source = np.linalg.inv(source_affine) @ affine
    linear, shift = _snap(to_source[:3, :3], SNAP[0]), _snap(to_source[:3, 3:], SNAP[1])
    return np.asarray(linear @ indices + shift)


def resample_mask(
    mask: npt.NDArray[np.bool_], source_affine: Affine, shape: Shape, affine: Affine
) -> npt.NDArray[np.intp]:
    """Brain voxels of the target grid: those whose nearest source voxel is in `mask`.

    Parameters
    ----------
    mask
        (x, y, z) brain mask on the source grid.
    source_affine, shape, affine
        Source affine, target shape (x, y, z) and target affine.

    Returns
    -------
    (voxel,) intp
        Numbers of the voxels, x fastest, ascending; voxels outside the source's field of view are
        never brain.
    """
    voxels = np.arange(np.prod(shape), dtype=np.intp)
    points = source_coordinates(voxels, shape, affine, source_affine)
    inside = _inside(points, mask.shape)
    nearest = np.round(points[:, inside]).astype(np.intp)
    return voxels[inside][mask[tuple(nearest)]]


class Resampler:
    """Trilinear interpolation of volumes at the brain voxels of the target grid.

    Parameters
    ----------
    source_shape, source_affine
        The grid that volumes come on.
    shape, affine
        The target grid.
    voxels
        (voxel,) numbers of the target voxels to compute, x fastest.

    Attributes
    ----------
    touched
        (touched,) numbers of the source voxels that are needed, x fastest, ascending.
    matrix
        (voxel, touched) float32 CSR.
    """

    def __init__(
        self,
        source_shape: Shape,
        source_affine: Affine,
        shape: Shape,
        affine: Affine,
        voxels: npt.NDArray[np.intp],
    ):
        points = source_coordinates(voxels, shape, affine, source_affine)
        inside = _inside(points, source_shape)
        corner = np.floor(points)
        fraction = points - corner
        columns = np.zeros((len(voxels), 8), dtype=np.intp)
        weights = np.zeros((len(voxels), 8), dtype=np.float32)
        for k, step in enumerate(itertools.product((0, 1), repeat=3)):
            shift = np.array(step)[:, None]
            # A corner beyond the last voxel has weight 0; clipping keeps its number valid.
            at = np.minimum(corner.astype(np.intp) + shift, np.array(source_shape)[:, None] - 1)
            at = np.maximum(at, 0)
            columns[:, k] = np.ravel_multi_index(tuple(at), source_shape, order="F")
            weights[:, k] = np.where(shift, fraction, 1 - fraction).prod(axis=0) * inside
        used = weights != 0
        is_touched = np.zeros(np.prod(source_shape), dtype=bool)
        is_touched[columns[used]] = True
        self.touched = np.flatnonzero(is_touched)
        place = np.cumsum(is_touched, dtype=np.int32) - 1
        starts = np.concatenate([[0], np.cumsum(used.sum(axis=1))])
        self.matrix = scipy.sparse.csr_array(
            (
                weights[used],
                place[columns[used]],
                starts.astype(np.int32),
            ),
            shape=(len(voxels), len(self.touched)),
        )

    def gather(self, volumes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Take the needed source voxels: (volume, source voxel) -> (volume, touched)."""
        return volumes.take(self.touched, axis=1)

    def apply(self, gathered: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Interpolate: (volume, touched) of any type -> (volume, voxel) float32."""
        return np.stack([self.matrix @ volume for volume in gathered.astype(np.float32)])


def _snap(values: npt.NDArray[np.float64], near: float) -> npt.NDArray[np.float64]:
    return np.where(np.abs(values - np.round(values)) < near, np.round(values), values)


def _inside(points: npt.NDArray[np.float64], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    last = np.array(shape)[:, None] - 1
    return np.asarray(((points >= 0) & (points <= last)).all(axis=0))
