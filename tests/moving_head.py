"""A head that moves in the scanner: volumes of a known motion, sampled from a finer image."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage

from neuromamba.motion import motion_matrices, rotation_centre

SIGNAL = 1000.0
"""Of the median brain voxel."""


def oblique(voxel: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """A tilted grid whose x axis runs to the left, with the head in its middle."""
    tilt = np.deg2rad(10)
    turn = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    return _centred(turn @ np.diag([-voxel[0], voxel[1], voxel[2]]), shape)


def straight(voxel: tuple[float, float, float], shape: tuple[int, int, int]) -> np.ndarray:
    """A grid along the world's axes, with the head in its middle."""
    return _centred(np.diag(voxel), shape)


def move_head(
    parameters: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    tsnr: float = 75.0,
    seed: int = 0,
) -> np.ndarray:
    """(t, x, y, z) float32 volumes of the motion `parameters`, with noise.

    The head is nilearn's template at 1 mm, as blurred as voxels of this size are, interpolated by
    cubic splines: nothing of the grid that motion is estimated on went into it.
    """
    size = np.linalg.norm(affine[:3, :3], axis=0)
    spline, to_index = _head(float(size.mean()))
    random = np.random.default_rng(seed)
    matrices = motion_matrices(parameters, rotation_centre(shape, affine))
    volumes = np.empty((len(matrices), *shape), dtype=np.float32)
    for volume, matrix in zip(volumes, matrices, strict=True):
        at = to_index @ np.linalg.inv(matrix) @ affine
        ndimage.affine_transform(
            spline, at[:3, :3], at[:3, 3], output=volume, order=3, prefilter=False
        )
        volume += random.standard_normal(shape, dtype=np.float32) * np.float32(SIGNAL / tsnr)
    return np.abs(volumes)


def random_walk(n: int, step: float = 0.05, seed: int = 0) -> np.ndarray:
    """(n, 6) parameters from zero; a step is `step` mm, and as much by rotation at 50 mm."""
    random = np.random.default_rng(seed)
    steps = random.standard_normal((n, 6)) * step / np.array([1, 1, 1, 50, 50, 50])
    steps[0] = 0
    return np.cumsum(steps, axis=0)


@lru_cache(maxsize=2)
def _head(blur: float) -> tuple[np.ndarray, np.ndarray]:
    from nilearn.datasets import load_mni152_template

    template = load_mni152_template(resolution=1)
    image = ndimage.gaussian_filter(np.asarray(template.dataobj, np.float32), 0.45 * blur)
    image *= SIGNAL / np.median(image[image > 0.3 * image.max()])
    return ndimage.spline_filter(image, 3, output=np.float32), np.linalg.inv(template.affine)


def _centred(linear: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = np.array([0, -18, 8]) - linear @ (np.array(shape) - 1) / 2
    return affine
