"""Mean and SD over time of many voxels, from a stream of volumes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Moments:
    """Running mean and SD over time of each voxel, in float64, whatever the blocks.

    Parameters
    ----------
    reference
        (voxel,) values near the mean, such as the first volume: sums of differences to it keep the
        precision that sums of squares would lose.
    """

    def __init__(self, reference: Floats):
        self.reference = reference
        self.n = 0
        self.total = np.zeros(len(reference))
        self.squares = np.zeros(len(reference))

    def add(self, volumes: Floats) -> None:
        """Take in (volume, voxel)."""
        for volume in volumes:
            difference = volume - self.reference
            self.total += difference
            difference *= difference
            self.squares += difference
            self.n += 1

    def mean(self) -> npt.NDArray[np.float64]:
        return self.reference + self.total / self.n

    def sd(self) -> npt.NDArray[np.float64]:
        variance = self.squares / self.n - np.square(self.total / self.n)
        return np.asarray(np.sqrt(np.maximum(variance, 0)))
