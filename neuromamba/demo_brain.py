"""Where the demo's signal lies: brain voxels, parcels and networks on a coarse MNI grid.

The brain is nilearn's packaged MNI152 template (ICBM 2009, 2 mm), sampled at the voxel centres of
a grid that starts at the corner of fMRIPrep's MNI152NLin2009cAsym images. Parcels are the cells
around k-means centres of one hemisphere, mirrored to the other, so that each has a partner. They
are found on a fixed point lattice and therefore lie in the same place for every voxel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.spatial import cKDTree

NETWORKS = ("A", "B", "C", "D", "E", "F")
PARCELS = 80
CLUSTERS_PER_NETWORK = 2
CORNER = (-96.5, -132.5, -78.5)
"""Centre of the first voxel (mm), as in fMRIPrep's MNI152NLin2009cAsym outputs."""
EXTENT = (193.0, 229.0, 193.0)
"""Edges of the field of view, mm."""
NODE_SPACING = 10.0
"""Distance of the nodes (mm) between which spatially smooth noise is interpolated."""


@dataclass(frozen=True)
class Brain:
    """Brain voxels of one grid, listed with x fastest, then y, z (the order in a NIfTI file).

    Attributes
    ----------
    shape : tuple of int
        Grid size along x, y, z.
    affine : ndarray, (4, 4)
        Voxel index to mm.
    mask : ndarray of bool, (z, y, x)
    mm : ndarray of float32, (voxel, 3)
        Coordinates of the brain voxels.
    intensity : ndarray of float32, (voxel,)
        T1-weighted template, 0.2 to 1.
    parcel : ndarray of int, (voxel,)
        Parcel of each voxel, from 0; the first half of the numbers is the left hemisphere.
    network : ndarray of int, (parcel,)
        Network of each parcel, an index into `NETWORKS`.
    csf, white_matter : ndarray of bool, (voxel,)
    smoother : scipy.sparse.csr_array of float32, (voxel, node)
        Turns independent unit-variance values at the nodes into smooth unit-variance values.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    mask: NDArray[np.bool_]
    mm: NDArray[np.float32]
    intensity: NDArray[np.float32]
    parcel: NDArray[np.intp]
    network: NDArray[np.intp]
    csf: NDArray[np.bool_]
    white_matter: NDArray[np.bool_]
    smoother: sparse.csr_array

    @property
    def n_voxels(self) -> int:
        return len(self.mm)


@lru_cache(maxsize=2)
def load_brain(voxel_size: float) -> Brain:
    """The demo's brain on an isotropic grid of `voxel_size` mm."""
    template, inside, to_index = _template()
    shape = tuple(int(np.ceil(edge / voxel_size)) for edge in EXTENT)
    affine = np.diag([voxel_size, voxel_size, voxel_size, 1.0])
    affine[:3, 3] = CORNER
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape[::-1]), indexing="ij")
    mm = np.stack([x, y, z], axis=-1) * voxel_size + CORNER
    index = (mm @ to_index[:3, :3].T + to_index[:3, 3]).transpose(3, 0, 1, 2)
    mask = ndimage.map_coordinates(inside, index, order=1) >= 0.5
    intensity = ndimage.map_coordinates(template, index[:, mask], order=1)
    brain_mm = mm[mask].astype(np.float32)
    centres, network = parcellation()
    low, high = np.quantile(intensity, [0.08, 0.75])
    return Brain(
        shape=(shape[0], shape[1], shape[2]),
        affine=affine,
        mask=mask,
        mm=brain_mm,
        intensity=np.clip(intensity, 0.2, 1.0).astype(np.float32),
        parcel=_nearest_parcel(brain_mm, centres),
        network=network,
        csf=intensity <= low,
        white_matter=intensity >= high,
        smoother=_smoother(brain_mm),
    )


@lru_cache(maxsize=1)
def parcellation() -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Centres of the left hemisphere's parcels, and the network of all parcels.

    Returns
    -------
    centres : ndarray, (PARCELS / 2, 3)
        mm, with the distance from the midline in place of x.
    network : ndarray of int, (PARCELS,)
        The same for partners in the two hemispheres. Each network has two patches of neighbouring
        parcels that lie apart from front to back, so that its coherence shows as long-range
        connectivity too.
    """
    from sklearn.cluster import KMeans

    _, inside, to_index = _template()
    points = np.argwhere(inside[::3, ::3, ::3] > 0) * 3
    from_index = np.linalg.inv(to_index)
    mm = points @ from_index[:3, :3].T + from_index[:3, 3]
    mm[:, 0] = np.abs(mm[:, 0])
    centres = KMeans(PARCELS // 2, n_init=1, random_state=0).fit(mm).cluster_centers_
    n_clusters = CLUSTERS_PER_NETWORK * len(NETWORKS)
    clusters = KMeans(n_clusters, n_init=10, random_state=0).fit(centres)
    front_to_back = np.argsort(np.argsort(clusters.cluster_centers_[:, 1]))
    network = front_to_back[clusters.labels_] % len(NETWORKS)
    return centres, np.tile(network, 2)


@lru_cache(maxsize=1)
def _template() -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Template and brain mask at 2 mm, indexed (x, y, z), and the affine from mm to index."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    template = load_mni152_template(resolution=2)
    mask = load_mni152_brain_mask(resolution=2)
    return (
        np.asarray(template.dataobj, dtype=np.float32),
        np.asarray(mask.dataobj, dtype=np.float32),
        np.linalg.inv(template.affine),
    )


def _nearest_parcel(mm: NDArray[np.float32], centres: NDArray[np.float64]) -> NDArray[np.intp]:
    folded = mm.astype(np.float64)
    folded[:, 0] = np.abs(folded[:, 0])
    nearest = cKDTree(centres).query(folded)[1]
    return np.where(mm[:, 0] < 0, nearest, nearest + len(centres)).astype(np.intp)


def _smoother(mm: NDArray[np.float32]) -> sparse.csr_array:
    """Trilinear interpolation from a lattice of nodes, with rows scaled to unit variance."""
    position = (mm.astype(np.float64) - CORNER) / NODE_SPACING
    low = np.floor(position).astype(np.intp)
    offset = position - low
    size = low.max(axis=0) + 2
    row, column, weight = [], [], []
    for corner in np.ndindex(2, 2, 2):
        node = low + corner
        row.append(np.arange(len(mm)))
        column.append(np.ravel_multi_index(tuple(node.T), tuple(size)))
        weight.append(np.prod(np.where(corner, offset, 1 - offset), axis=1))
    used, column_used = np.unique(np.concatenate(column), return_inverse=True)
    weights = np.concatenate(weight)
    matrix = sparse.csr_array(
        (weights, (np.concatenate(row), column_used)), shape=(len(mm), len(used))
    )
    scale = 1 / np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return sparse.csr_array(sparse.diags_array(scale) @ matrix).astype(np.float32)
