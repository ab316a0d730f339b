"""A run's brain voxels on the target grid, as a stream of volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from neuromamba.files import InputError
from neuromamba.nifti import AHEAD, Header, read_blocks, read_header, read_image
from neuromamba.resample import Affine, Resampler, Shape, resample_mask

SAME_GRID_MM = 0.05
"""More than rounding in any header, less than any shift that matters."""


def read_brain(header: Header, path: Path) -> npt.NDArray[np.bool_]:
    """Read the brain mask of the run that `header` belongs to: (x, y, z) bool.

    Raises
    ------
    InputError
        When it is unreadable, not on the run's grid, or empty.
    """
    found = read_header(path)
    cure = f"give the mask that was made with the run {header.path.name}"
    if found.shape != header.shape or found.n_volumes != 1:
        raise InputError(
            f"{path}: this mask has {found.n_volumes} volume(s) of {found.shape} voxels, the run's "
            f"volumes have {header.shape}; {cure}"
        )
    corners = np.array([[0, 0, 0, 1], [*header.shape, 1]], dtype=np.float64).T
    if np.abs((found.affine - header.affine) @ corners).max() > SAME_GRID_MM:
        raise InputError(f"{path}: this mask's affine differs from the run's; {cure}")
    mask = read_image(found) > 0.5
    if not mask.any():
        raise InputError(f"{path}: this brain mask is empty; make it again")
    return np.asarray(mask)


class BrainStream:
    """Volumes of a run, resampled at the target grid's brain voxels, in original units.

    Parameters
    ----------
    header
        The run.
    mask
        File of its brain mask.
    shape, affine
        The target grid: voxels along x, y, z, and (4, 4) indices to mm.
    smoothing
        Full width at half maximum in mm of the Gaussian that volumes are smoothed with on their own
        grid, as `nilearn.image.smooth_img` does: across the edge of the brain, too.

    Attributes
    ----------
    header, path
        The run, and its file.
    voxels
        (voxel,) numbers of the brain voxels on the target grid, x fastest, ascending.

    Raises
    ------
    InputError
        When the mask is unusable or does not meet the target grid.
    """

    def __init__(
        self,
        header: Header,
        mask: Path,
        shape: Shape,
        affine: Affine,
        smoothing: float | None = None,
    ):
        self.header, self.path = header, header.path
        brain = read_brain(header, mask)
        self.voxels = resample_mask(brain, header.affine, shape, affine)
        if not len(self.voxels):
            raise InputError(f"{mask}: no voxel of it lies on the target grid; is it in MNI space?")
        self._resampler = Resampler(header.shape, header.affine, shape, affine, self.voxels)
        self._smoothing = smoothing
        flat = brain.ravel(order="F")
        self._in_brain = flat if smoothing else flat[self._resampler.touched]

    def blocks(self, ahead: int = AHEAD) -> Iterator[npt.NDArray[np.float32]]:
        """Yield all volumes in blocks: (volume, voxel) float32.

        NaN and infinity outside the brain mask count as 0.

        Parameters
        ----------
        ahead
            As in `neuromamba.nifti.read_blocks`.

        Raises
        ------
        InputError
            When the file is damaged, or a voxel of the brain mask is NaN or infinite.
        """
        scaled = (self.header.slope, self.header.intercept) != (1, 0)
        done = 0
        for block in read_blocks(self.header, ahead):
            # Smoothing spreads every voxel; else only those that are needed are looked at.
            needed = block if self._smoothing else self._resampler.gather(block)
            if needed.dtype.kind == "f":
                self._clear_background(needed, done)
            if self._smoothing:
                needed = self._resampler.gather(self._smooth(needed, self._smoothing))
            values = self._resampler.apply(needed)
            if scaled:
                values *= np.float32(self.header.slope)
                values += np.float32(self.header.intercept)
            done += len(block)
            yield values

    def _smooth(self, volumes: npt.NDArray[Any], width: float) -> npt.NDArray[np.float32]:
        from nilearn.image import smooth_img  # here, because it takes a second to load

        smoothed = np.empty(volumes.shape, dtype=np.float32)
        for volume, out in zip(volumes, smoothed, strict=True):
            data = volume.astype(np.float32).reshape(self.header.shape, order="F")
            image = smooth_img(nibabel.Nifti1Image(data, self.header.affine), width)
            out[:] = np.asarray(image.dataobj).ravel(order="F")
        return smoothed

    def _clear_background(self, values: npt.NDArray[Any], done: int) -> None:
        bad = ~np.isfinite(values)
        if not bad.any():
            return
        counts = (bad & self._in_brain).sum(axis=1)
        if counts.any():
            first = int(np.flatnonzero(counts)[0])
            raise InputError(
                f"{self.header.path}: {counts[first]} voxels of the brain mask are NaN or infinite "
                f"in volume {done + first} (counted from 0); preprocess the run again, or correct "
                "its mask"
            )
        values[bad] = -self.header.intercept / self.header.slope
