"""The brain within a head: bright tissue, cut loose from the scalp by erosion.

A template without skull pulls a whole head to its brain's outline: the scalp ends up where the
cortex should be. A rough brain is enough to prevent that, and is all that is made here; the mask
that counts is the template's, carried back by the registration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

BRIGHTEST = 99.0
"""Percentile beyond which intensities are taken alike, so that a vessel or fat decides nothing."""
LINK_MM, REACH_MM, CLOSE_MM = 4.0, 6.0, 8.0
"""What is thinner than twice `LINK_MM` is cut; the core then grows by `REACH_MM` and is closed."""


def extract_brain(
    head: npt.NDArray[np.float32], near: npt.NDArray[np.bool_], voxel_size: float
) -> npt.NDArray[np.bool_]:
    """A rough brain mask of a T1w image: (x, y, z) bool.

    Parameters
    ----------
    head
        (x, y, z) intensities on isotropic voxels; a head without skull will do too.
    near
        (x, y, z) where the brain may be.
    voxel_size
        mm.
    """
    tissue = near & (head > otsu(head[near]))
    core = largest_part(ndimage.binary_erosion(tissue, _ball(LINK_MM, voxel_size)))
    grown = ndimage.binary_dilation(core, _ball(REACH_MM, voxel_size))
    margin = int(np.ceil(CLOSE_MM / voxel_size)) + 1
    closed = ndimage.binary_closing(np.pad(grown, margin), _ball(CLOSE_MM, voxel_size))
    inside = tuple(slice(margin, -margin) for _ in range(3))
    return np.asarray(ndimage.binary_fill_holes(closed)[inside] & near)


def otsu(values: npt.NDArray[Any]) -> float:
    """The threshold between dark and bright that leaves the least variance within the two.

    Source: Otsu, IEEE Trans. Systems, Man, and Cybernetics 9 (1979).
    """
    counts, edges = np.histogram(values, 256, range=(0, float(np.percentile(values, BRIGHTEST))))
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[np.argmax(np.nan_to_num(between))])


def largest_part(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The largest connected part of a mask."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray((labels == sizes.argmax()) & mask)


def _ball(radius_mm: float, voxel_size: float) -> npt.NDArray[np.bool_]:
    radius = radius_mm / voxel_size
    n = int(np.floor(radius))
    offsets = np.mgrid[-n : n + 1, -n : n + 1, -n : n + 1]
    return np.asarray((offsets**2).sum(axis=0) <= radius**2 + 0.5)
