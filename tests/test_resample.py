"""Resampling: what nilearn computes, for any affine."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from nilearn.datasets import load_mni152_brain_mask
from nilearn.image import resample_img
from scipy.spatial.transform import Rotation

from neuromamba.config import Volumes
from neuromamba.resample import Resampler, resample_mask, target_affine

GRID = Volumes(shape=(32, 32, 32), voxel_size=6.0)


def place(linear: np.ndarray, shape: tuple[int, ...], centre: tuple[float, ...]) -> np.ndarray:
    """An affine with this linear part that puts the middle of the grid at `centre` mm."""
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = np.array(centre) - linear @ (np.array(shape) - 1) / 2
    return affine


ROTATED = Rotation.from_euler("xyz", [15, -8, 25], degrees=True).as_matrix()
SOURCES = {
    "like fMRIPrep": np.array(
        [[2, 0, 0, -96.5], [0, 2, 0, -132.5], [0, 0, 2, -78.5], [0, 0, 0, 1]]
    ),
    "like FSL": np.array([[-2, 0, 0, 90.0], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]]),
    "rotated": place(ROTATED * 4, (40, 48, 40), (3, -20, 11)),
    "anisotropic, axes swapped": place(
        np.array([[0, 3.3, 0], [0, 0, -4.1], [2.7, 0, 0]]), (40, 48, 40), (0, -15, 5)
    ),
    "field of view too small": place(np.eye(3) * 3, (40, 48, 40), (30, -50, 40)),
}
SHAPES = {"like fMRIPrep": (97, 115, 97), "like FSL": (91, 109, 91)}


def nilearn_resample(data: np.ndarray, affine: np.ndarray, interpolation: str) -> np.ndarray:
    image = resample_img(
        nibabel.Nifti1Image(data.astype(np.float32), affine),
        target_affine(GRID),
        GRID.shape,
        interpolation=interpolation,
        force_resample=True,
        copy_header=True,
    )
    return np.asarray(image.dataobj)


@pytest.mark.parametrize("name", SOURCES)
def test_values_equal_nilearns(name: str) -> None:
    shape = SHAPES.get(name, (40, 48, 40))
    data = 1000 + 200 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    voxels = np.arange(np.prod(GRID.shape))
    resampler = Resampler(shape, SOURCES[name], GRID.shape, target_affine(GRID), voxels)
    frames = np.stack([data.ravel(order="F"), 2 * data.ravel(order="F")])
    ours, twice = resampler.apply(resampler.gather(frames))
    expected = nilearn_resample(data, SOURCES[name], "linear").ravel(order="F")
    assert (expected != 0).mean() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=2e-3)
    np.testing.assert_array_equal(twice, 2 * ours)


@pytest.mark.parametrize("name", SOURCES)
def test_the_mask_equals_nilearns_nearest_neighbour(name: str) -> None:
    shape = SHAPES.get(name, (40, 48, 40))
    distance = (np.indices(shape).T - (np.array(shape) - 1) / 2) / (0.45 * np.array(shape))
    mask = (np.linalg.norm(distance, axis=-1) < 1).T
    voxels = resample_mask(mask, SOURCES[name], GRID.shape, target_affine(GRID))
    ours = np.zeros(np.prod(GRID.shape), dtype=bool)
    ours[voxels] = True
    expected = nilearn_resample(mask, SOURCES[name], "nearest").ravel(order="F") > 0
    # A point just half-way between two voxels may be rounded to either.
    assert (ours != expected).mean() < 0.002
    assert ours.sum() > 100


def test_coinciding_grids_copy_values_in_spite_of_float32_affines() -> None:
    affine = target_affine(GRID)
    source = affine.astype(np.float32).astype(np.float64)
    source[:3, :3] *= 1 + 1e-7
    voxels = np.arange(np.prod(GRID.shape))
    resampler = Resampler(GRID.shape, source, GRID.shape, affine, voxels)
    data = np.random.default_rng(0).standard_normal((1, len(voxels))).astype(np.float32)
    np.testing.assert_array_equal(resampler.apply(resampler.gather(data)), data)
    assert resampler.matrix.nnz == len(voxels)


def test_fmriprep_2mm_voxels_are_copied_to_the_default_grid() -> None:
    grid = Volumes()
    voxels = np.arange(0, np.prod(grid.shape), 977)
    resampler = Resampler(
        (97, 115, 97), SOURCES["like fMRIPrep"], grid.shape, target_affine(grid), voxels
    )
    assert set(resampler.matrix.data) == {np.float32(1)}


@pytest.mark.parametrize(
    "grid", [Volumes(), Volumes(shape=(48, 48, 48), voxel_size=4.0)], ids=["2 mm", "4 mm"]
)
def test_the_whole_mni_brain_lies_on_the_grid_with_a_margin(grid: Volumes) -> None:
    brain = load_mni152_brain_mask(resolution=2)
    voxels = np.argwhere(np.asarray(brain.dataobj) > 0)
    mm = voxels @ brain.affine[:3, :3].T + brain.affine[:3, 3]
    affine = target_affine(grid)
    at = (mm - affine[:3, 3]) / grid.voxel_size
    assert at.min() >= 1
    assert (np.array(grid.shape) - 1 - at).min() >= 1
