"""Parcellations: which voxels make up a ROI, on the atlas's own grid and on a run's.

Besides atlases (`neuromamba.atlases`) there are two that need no file and no network: cubes of the
grid, and parcels of the brain mask that nilearn packages. Neither is anatomical, and both say so in
their names.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neuromamba.files import InputError, digest_json

PACKAGED_SPACE = "MNI152NLin2009aSym"
"""Space of the ICBM 2009a symmetric template that nilearn packages."""
MOST_PARCELS = 2000
SAMPLE_MM = 4
"""Distance of the voxels that the parcels' centres are found from; all voxels are then assigned."""


@dataclass(frozen=True)
class Parcellation:
    """Which voxels make up a ROI.

    Attributes
    ----------
    name
        File name of the atlas, what it was fetched by, or what the ROIs are if they are ours.
    sha256
        Digest of the atlas file, or of labels and affine where there is none; `None` for cubes.
    labels
        One name per ROI, in the order of the `roi` axis.
    index
        (x, y, z) int32 on the atlas's own grid: number of the ROI, counted from 0, or -1 outside.
    affine
        (4, 4) voxel indices of `index` to mm.
    space
        The standard space that the atlas says it is in; `None` where it says nothing.
    names_from
        Where `labels` come from, if they are not plain numbers.
    """

    name: str
    sha256: str | None
    labels: list[str]
    index: npt.NDArray[np.int32]
    affine: npt.NDArray[np.float64]
    space: str | None = None
    names_from: str | None = None

    @property
    def key(self) -> str:
        """Changes when the ROIs do."""
        named = [self.name, self.sha256, self.labels, self.space]
        return digest_json([*named, list(self.index.shape)])


def make_cubes(
    shape: tuple[int, int, int], affine: npt.NDArray[np.float64], edge: float
) -> Parcellation:
    """Cut a grid of `shape` voxels into cubes of `edge` mm that start at its first voxel.

    Where the voxel size does not divide `edge`, neighbouring cubes differ by one voxel.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    cells = [
        np.floor(np.arange(n) * size / edge + 1e-6) for n, size in zip(shape, sizes, strict=True)
    ]
    counts = [int(cell[-1]) + 1 for cell in cells]
    x, y, z = np.meshgrid(*cells, indexing="ij")
    index = ((x * counts[1] + y) * counts[2] + z).astype(np.int32)
    labels = [f"x{i}-y{j}-z{k}" for i, j, k in np.ndindex(*counts)]
    return Parcellation(f"cubes of {edge:g} mm", None, labels, index, affine)


def make_parcels(count: int) -> Parcellation:
    """Cut nilearn's packaged brain mask into compact parcels of like size, in mirrored pairs.

    k-means of the voxels' places in the left half, and its mirror image: no parcel crosses the
    midline, and `L7` and `R7` are homotopic. The template is symmetric, so its mask is too. Numbers
    go from the back to the front. The same `count` gives the same parcels; `sha256` tells, should
    another version of scikit-learn find others.

    Parameters
    ----------
    count
        Number of parcels: even, 2 to `MOST_PARCELS`.

    Raises
    ------
    InputError
        When there cannot be that many.
    """
    if count % 2 or not 2 <= count <= MOST_PARCELS:
        raise InputError(
            f"packaged:{count} must be an even number of parcels, 2 to {MOST_PARCELS}: half of "
            "them in each hemisphere; correct the dataset's `atlas`"
        )
    # These take a second, which only datasets with this parcellation are to wait for.
    from nilearn.datasets import load_mni152_brain_mask
    from scipy.spatial import KDTree
    from sklearn.cluster import KMeans

    image = load_mni152_brain_mask()
    # Every second voxel, at odd x, so that none lies on the midline.
    brain = np.asarray(image.dataobj)[1::2, ::2, ::2] > 0
    affine = image.affine @ np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = image.affine[0, 3] + image.affine[0, 0]
    half = brain.shape[0] // 2
    voxels = np.argwhere(brain[:half])
    sample = voxels[(voxels % (SAMPLE_MM // 2) == 0).all(axis=1)]
    means = KMeans(count // 2, n_init=1, random_state=0).fit(sample.astype(float)).cluster_centers_
    means = means[np.lexsort(means.T[[0, 2, 1]])]
    index = np.full(brain.shape, -1, dtype=np.int32)
    index[tuple(voxels.T)] = KDTree(means).query(voxels)[1]
    right = index[half - 1 :: -1]
    index[half:] = np.where(right >= 0, right + count // 2, -1)
    labels = [f"{side}{number + 1}" for side in "LR" for number in range(count // 2)]
    of_what = f"the packaged {PACKAGED_SPACE} brain mask (ours, not anatomical)"
    name = f"{count} k-means parcels of {of_what}"
    return Parcellation(name, digest_labels(index, affine), labels, index, affine, PACKAGED_SPACE)


def digest_labels(index: npt.NDArray[np.int32], affine: npt.NDArray[np.float64]) -> str:
    """SHA-256 of the labels and the affine of an atlas that has no file."""
    digest = hashlib.sha256(f"{index.shape} {affine.tolist()}".encode())
    digest.update(np.ascontiguousarray(index, dtype="<i4").tobytes())
    return digest.hexdigest()


def resample_labels(
    parcellation: Parcellation, shape: tuple[int, ...], affine: npt.NDArray[np.float64]
) -> npt.NDArray[np.int32]:
    """Carry the ROI numbers to another grid, nearest neighbour, through both affines.

    Returns
    -------
    (x, y, z) int32
        ROI number of each voxel of the grid, -1 outside every ROI.
    """
    to_atlas = np.linalg.inv(parcellation.affine) @ affine
    voxels = np.indices(shape).reshape(3, -1)
    nearest = np.round(to_atlas[:3, :3] @ voxels + to_atlas[:3, 3:]).astype(np.int64)
    inside = ((nearest >= 0) & (nearest < np.array(parcellation.index.shape)[:, None])).all(axis=0)
    labels = np.full(voxels.shape[1], -1, dtype=np.int32)
    labels[inside] = parcellation.index[tuple(nearest[:, inside])]
    return labels.reshape(shape)


def count_voxels(
    parcellation: Parcellation, affine: npt.NDArray[np.float64]
) -> npt.NDArray[np.int_]:
    """Voxels of each ROI on a grid of this affine that is as large as the whole atlas needs.

    A ROI that a run's grid cuts off counts in full, so that its coverage is known.
    """
    labelled = np.argwhere(parcellation.index >= 0)
    low, high = labelled.min(axis=0) - 0.5, labelled.max(axis=0) + 0.5
    corners = np.array(list(itertools.product(*zip(low, high, strict=True)))).T
    to_grid = np.linalg.inv(affine) @ parcellation.affine
    corners = to_grid[:3, :3] @ corners + to_grid[:3, 3:]
    first, last = np.floor(corners.min(axis=1)), np.ceil(corners.max(axis=1))
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ first
    shape = tuple(int(n) for n in last - first + 1)
    grid = resample_labels(parcellation, shape, moved)
    return np.bincount(grid[grid >= 0], minlength=len(parcellation.labels))
