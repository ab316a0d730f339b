"""Align volumes with one reference by a rigid motion: made once, then milliseconds a volume.

Design choices
--------------
- What is interpolated is the reference, not the volume: the volume's noise stays as it is (smoothed
  more or less by position, it would bias the estimate), and all that depends on the reference is
  made once.
- Only voxels with steep gradients take part; the others say nothing of the position.
- Gauss-Newton with Tukey's weights, first on smoothed volumes (6 mm apart, which finds motion of
  8 mm and 8 degrees), then on the voxels as they are. Gain and offset of the intensity are solved
  for in the same equations.
- Slices that lost their signal are found by their sums, beforehand: in the smoothed volume they
  would pull at their neighbours, and so many alike are no outliers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neuromamba.files import InputError
from neuromamba.rigid_level import Floats, Level, NotAligned, Pose, Scale

LOST_SIGNAL = 0.65
"""A slice with less than this share of its usual signal is left out."""
MIN_SLICES = 0.4
"""Share of the slices that must be left for some to be left out."""
MIN_CORRELATION = 0.5
"""With the reference, in the voxels that take part; below it, a volume is not aligned."""


class RigidAligner:
    """Finds where volumes lie with respect to a reference.

    Parameters
    ----------
    reference
        (x, y, z) image.
    affine
        (4, 4) voxel indices to mm, of the reference and the volumes.
    mask
        (x, y, z) bool; only what lies in it takes part. None: everywhere.
    n_points
        Voxels that take part at the finest scale.

    Raises
    ------
    InputError
        When the reference is not finite, or has too little structure.
    """

    def __init__(
        self,
        reference: npt.NDArray[np.floating],
        affine: Pose,
        mask: npt.NDArray[np.bool_] | None = None,
        n_points: int = 15_000,
    ):
        self.shape = reference.shape
        image = np.ascontiguousarray(reference.T, dtype=np.float32)
        region = np.ones(image.shape, bool) if mask is None else np.asarray(mask, bool).T
        _check(image, region)
        linear = np.asarray(affine, np.float64)[:3, :3]
        coarse = max(10.0, 2 * float(np.linalg.norm(linear, axis=0).max()))
        self.reference = image
        self.slice_sums = image.sum(axis=(1, 2), dtype=np.float64)
        self.levels = [
            Level(image, linear, region, Scale(coarse, 6.0, 4000, 0.05)),
            Level(image, linear, region, Scale(0.0, 0.0, 5000, 0.02)),
            Level(image, linear, region, Scale(0.0, 0.0, n_points, 4e-3)),
        ]

    def align(self, volume: npt.NDArray[np.generic], start: Pose | None = None) -> Pose:
        """Find the motion from the reference to a volume.

        Parameters
        ----------
        volume
            (x, y, z).
        start
            A motion that may be near, such as the last volume's; it is taken in place of none where
            the images then look more alike.

        Returns
        -------
        (4, 4) float64
            mm of the reference to mm of the volume, both from the centre of the grid.

        Raises
        ------
        NotAligned
            With the reason.
        """
        image = np.ascontiguousarray(volume.T, dtype=np.float32)
        lost, filled = self._lost_slices(image)
        inverse: Pose = np.eye(4)
        for level in self.levels:
            points = level.take(filled)
            used = ~lost[level.slices]
            if level.scale.fwhm and start is not None:
                other = np.asarray(np.linalg.inv(start), dtype=np.float64)
                inverse = max(inverse, other, key=lambda at: level.likeness(points, used, at))
            inverse, likeness = level.solve(points, used, inverse)
        if not likeness >= MIN_CORRELATION:
            raise NotAligned(f"looks unlike the reference (correlation {likeness:.2f})")
        return np.asarray(np.linalg.inv(inverse), dtype=np.float64)

    def _lost_slices(self, image: Floats) -> tuple[npt.NDArray[np.bool_], Floats]:
        """(z,) the slices that lost their signal, and the volume with the reference's instead."""
        sums = image.sum(axis=(1, 2), dtype=np.float64)
        if not np.isfinite(sums).all():
            raise NotAligned("holds values that are not finite")
        known = self.slice_sums > 0.1 * self.slice_sums.max()
        ratio = np.where(known, sums / np.where(known, self.slice_sums, 1), 1)
        usual = float(np.median(ratio[known]))
        lost = known & (ratio < LOST_SIGNAL * usual)
        if not lost.any() or (known & ~lost).sum() < MIN_SLICES * known.sum():
            return np.zeros_like(lost), image
        filled = image.copy()
        filled[lost] = self.reference[lost] * np.float32(usual)
        return lost, filled


def _check(image: Floats, region: npt.NDArray[np.bool_]) -> None:
    if region.shape != image.shape:
        raise InputError(
            f"the mask of the motion has shape {region.T.shape}, its reference {image.T.shape}"
        )
    if min(image.shape) < 3:
        raise InputError(
            f"a volume of {image.T.shape} voxels is too thin for motion to be estimated: 3 are "
            "needed along each axis"
        )
    if not np.isfinite(image).all():
        raise InputError("the reference of the motion holds values that are not finite")
    if not region.any() or np.ptp(image[region]) == 0:
        raise InputError("the reference of the motion (or its mask) is empty")
