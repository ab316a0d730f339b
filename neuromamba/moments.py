"""Mean and SD over time of many voxels, from a stream of volumes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Moments:
    """Running mean and SD over time of each voxel, in float64, whatever the blocks.

    Attributes
    ----------
    n
        Volumes so far.
    """

    def __init__(self) -> None:
        self.n = 0

    def add(self, volumes: Floats) -> None:
        """Take in (volume, voxel)."""
        if not self.n:
            # Sums of differences to a typical value keep the precision that plain sums would lose.
            self._reference = volumes[0].copy()
            self._total = np.zeros(volumes.shape[1])
            self._squares = np.zeros(volumes.shape[1])
        for volume in volumes:
            difference = volume - self._reference
            self._total += difference
            difference *= difference
            self._squares += difference
            self.n += 1

    def mean(self) -> npt.NDArray[np.float64]:
        """(voxel,) mean over the volumes so far."""
        return self._reference + self._total / self.n

    def sd(self) -> npt.NDArray[np.float64]:
        """(voxel,) SD over the volumes so far, with n in the denominator."""
        variance = self._squares / self.n - np.square(self._total / self.n)
        return np.asarray(np.sqrt(np.maximum(variance, 0)))
