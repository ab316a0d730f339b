"""Slice timing against a known signal, the one interpolation against ANTs, and what is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nilearn.image import resample_img
from scipy import ndimage

from neuromamba.ants_template import Grid
from neuromamba.files import InputError
from neuromamba.nifti import read_header
from neuromamba.resample_series import (
    correct_slice_timing,
    decode_series,
    map_new,
    open_series,
    resample_volumes,
    shift_in_time,
    slice_times,
    storage,
    write_image,
)

STEP = 2.0
SHAPE = (9, 10, 11)
AFFINE = np.array([[3.0, 0.2, 0, -10], [0, 3, 0.4, -14], [0.1, 0, 3.3, -15], [0, 0, 0, 1]])


def blobs(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    """Smooth structure, (x, y, z)."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    return (100 + 100 * ndimage.gaussian_filter(noise, 1.5)).astype(np.float32)


# --- Slice timing ---------------------------------------------------------------------------------


def signal(time: np.ndarray) -> np.ndarray:
    return 100 + np.sin(2 * np.pi * 0.05 * time) + 0.5 * np.cos(2 * np.pi * 0.03 * time)


@pytest.mark.parametrize(("direction", "axis"), [("k", 1), ("k-", 1), ("j", 2), ("i-", 3)])
def test_slices_get_the_values_of_the_middle_of_the_acquisition(direction: str, axis: int) -> None:
    taken = np.array([0.0, 1.0, 0.25, 1.25, 0.5, 1.5])
    shape = [60, 3, 4, 5]
    shape[axis] = 6
    metadata = {"SliceTiming": taken.tolist(), "RepetitionTime": STEP}
    if direction != "k":
        metadata["SliceEncodingDirection"] = direction
    by_index = taken[::-1] if direction.endswith("-") else taken
    place = by_index.reshape([-1 if k == axis else 1 for k in range(1, 4)])
    volumes = np.arange(60).reshape(-1, 1, 1, 1) * STEP
    series = np.broadcast_to(signal(volumes + place), shape).astype(np.float32)
    found, times = slice_times(metadata, shape, Path("bold.nii.gz"))
    assert found == axis
    before = np.abs(series[5:-5] - signal(volumes + 0.75)[5:-5]).max()
    correct_slice_timing(series, found, times, STEP)
    after = np.abs(series[5:-5] - signal(volumes + 0.75)[5:-5]).max()
    assert before > 0.2
    assert after < 2e-3


def test_volumes_before_the_steady_state_stay_and_shape_no_others() -> None:
    random = np.random.default_rng(0)
    series = random.standard_normal((20, 4, 2, 2)).astype(np.float32)
    bright = series.copy()
    bright[:2] += 1000
    times = np.array([0, 0.5, 1, 1.5])
    for data in (series, bright):
        correct_slice_timing(data, 1, times, STEP, skip=2)
    np.testing.assert_array_equal(series[2:], bright[2:])
    assert bright[:2].min() > 900


@pytest.mark.parametrize("shift", [-0.8, -0.25, 0.0, 0.4, 1.3])
def test_shifts_are_scipys_cubic_splines(shift: float) -> None:
    values = np.random.default_rng(1).standard_normal((15, 3)).astype(np.float32)
    at = np.arange(15) + shift
    expected = [
        ndimage.map_coordinates(x.astype(float), [at], order=3, mode="mirror") for x in values.T
    ]
    np.testing.assert_allclose(shift_in_time(values, shift), np.transpose(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SliceTiming": [0, 1]}, r"bold\.nii\.gz it has 2 times for 3 slices"),
        ({"SliceTiming": [0, 500, 1000]}, r"from 0 to 1000 s \(milliseconds\?\), TR 2"),
        ({"SliceTiming": [0, float("nan"), 1]}, "not a list of numbers"),
        ({"SliceTiming": [0, float("inf"), 1]}, "not a list of numbers"),
        ({"SliceTiming": [0, 10**400, 1]}, "not a list of numbers"),
        ({"SliceTiming": ["a", "b", "c"]}, "not a list of numbers"),
        ({"SliceTiming": [[0, 1], [0.5], 1]}, "not a list of numbers"),
        ({"SliceTiming": "0 0.5 1"}, "not a list of numbers"),
        ({"SliceTiming": None}, "not a list of numbers"),
        ({"SliceTiming": [-0.5, 0, 1]}, "from -0.5 to 1 s"),
        ({"SliceEncodingDirection": "z"}, "'z' is none of i, j, k"),
    ],
)
def test_times_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    metadata = {"SliceTiming": [0, 0.5, 1], "RepetitionTime": STEP, **change}
    with pytest.raises(InputError, match=message):
        slice_times(metadata, (9, 3, 4, 5), Path("bold.nii.gz"))


# --- One interpolation ----------------------------------------------------------------------------


def points_of(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    return Grid((shape[0], shape[1], shape[2]), affine).points(np.arange(int(np.prod(shape))))


def resampled(volume: np.ndarray, points: np.ndarray, how: str, matrix: Any = None) -> np.ndarray:
    matrices = (np.eye(4) if matrix is None else matrix)[None]
    series = np.ascontiguousarray(volume.T)[None]
    return next(resample_volumes(series, AFFINE, points, matrices, how))[0]


@pytest.mark.parametrize(("how", "nilearns"), [("linear", "linear"), ("cubic", "continuous")])
def test_without_motion_values_are_nilearns(how: str, nilearns: str) -> None:
    target = np.diag([2.0, 2, 2, 1])
    target[:3, 3] = [-4, -6, -6]
    image = nibabel.Nifti1Image(blobs(), AFFINE)
    expected = resample_img(
        image, target, (6, 6, 6), interpolation=nilearns, force_resample=True, copy_header=True
    ).get_fdata()
    found = resampled(blobs(), points_of((6, 6, 6), target), how).reshape((6, 6, 6), order="F")
    # nilearn's splines treat the border differently.
    np.testing.assert_allclose(found, expected, atol=1e-3 if how == "linear" else 0.5)
    assert found.std() > 1


def test_motion_is_undone() -> None:
    volume, moved = blobs(), np.eye(4)
    moved[:3, :3] = [[0.999, -0.0447, 0], [0.0447, 0.999, 0], [0, 0, 1]]
    moved[:3, 3] = [1.0, -0.7, 0.5]
    points = points_of((3, 3, 3), np.diag([2.0, 2, 2, 1]))
    there = points @ moved[:3, :3].T + moved[:3, 3]
    np.testing.assert_allclose(
        resampled(volume, points, "cubic", moved), resampled(volume, there, "cubic"), atol=1e-3
    )


def test_on_its_own_grid_a_volume_is_unchanged_and_beyond_it_is_nothing() -> None:
    own = points_of(SHAPE, AFFINE)
    for how in ("linear", "cubic"):
        np.testing.assert_allclose(
            resampled(blobs(), own, how), blobs().ravel(order="F"), atol=1e-3
        )
    outside = own + AFFINE[:3, 0] * SHAPE[0]
    series = np.ascontiguousarray(blobs().T)[None]
    values, inside = next(resample_volumes(series, AFFINE, outside, np.eye(4)[None], "cubic"))
    assert not inside.any()
    assert not values.any()


def test_threads_change_nothing() -> None:
    series = np.stack([blobs(seed=k).T for k in range(9)])
    matrices = np.tile(np.eye(4), (9, 1, 1))
    matrices[:, 0, 3] = np.linspace(0, 2, 9)
    points = points_of((4, 4, 4), np.diag([2.0, 2, 2, 1]))
    one, three = (
        np.stack([v for v, _ in resample_volumes(series, AFFINE, points, matrices, "cubic", n)])
        for n in (1, 3)
    )
    np.testing.assert_array_equal(one, three)
    assert np.abs(np.diff(one, axis=0)).min(axis=1).max() > 0


def test_registration_composed_is_what_ants_makes_of_it(tmp_path: Path) -> None:
    ants = pytest.importorskip("ants")
    from neuromamba.ants_registration import Transform, _to_ants, map_points, warp

    volume = nibabel.Nifti1Image(blobs((30, 30, 30)), np.diag([2.0, 2, 2, 1]))
    target = np.diag([-2.5, 2.5, 2.5, 1])
    target[:3, 3] = [48, 8, 8]
    grid = nibabel.Nifti1Image(np.zeros((14, 15, 16), np.float32), target)
    affine = ants.create_ants_transform(
        transform_type="AffineTransform",
        matrix=np.array([[1.02, 0.03, 0], [-0.02, 0.97, 0.05], [0, 0.01, 1]]),
        translation=[0.8, -1.1, 1.3],
    )
    ants.write_transform(affine, str(tmp_path / "affine.mat"))
    field = np.stack(
        [
            ndimage.gaussian_filter(np.random.default_rng(k).standard_normal(grid.shape), 3) * 30
            for k in range(3)
        ],
        axis=-1,
    )
    like = _to_ants(grid)
    warped = ants.from_numpy(
        field.astype(np.float32), like.origin, like.spacing, like.direction, has_components=True
    )
    ants.image_write(warped, str(tmp_path / "warp.nii.gz"))
    chain = Transform((str(tmp_path / "warp.nii.gz"), str(tmp_path / "affine.mat")), ())
    expected = warp(volume, grid, chain.forward).get_fdata()
    points = map_points(points_of(grid.shape, target), chain.forward)
    assert np.abs(points - points_of(grid.shape, target)).max() > 2
    series = np.ascontiguousarray(volume.get_fdata(dtype=np.float32).T)[None]
    found, inside = next(resample_volumes(series, volume.affine, points, np.eye(4)[None], "linear"))
    assert inside.all()
    np.testing.assert_allclose(found.reshape(grid.shape, order="F"), expected, atol=0.02)


# --- Files ----------------------------------------------------------------------------------------


def test_a_series_is_decoded_in_units_and_without_nan(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(100, 10, (*SHAPE, 4)).astype(np.float32)
    data[1, 2, 3, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(data, AFFINE), tmp_path / "bold.nii.gz")
    series = decode_series(read_header(tmp_path / "bold.nii.gz"), tmp_path / "series")
    assert isinstance(series, np.memmap)
    np.testing.assert_array_equal(series, np.nan_to_num(data).T)
    counts = np.random.default_rng(0).integers(0, 1000, (*SHAPE, 4)).astype(np.int16)
    scaled = nibabel.Nifti1Image(counts, AFFINE)
    scaled.header.set_slope_inter(0.5, 3)
    nibabel.save(scaled, tmp_path / "scaled.nii.gz")
    series = decode_series(read_header(tmp_path / "scaled.nii.gz"), tmp_path / "series")
    np.testing.assert_allclose(series, nibabel.load(tmp_path / "scaled.nii.gz").get_fdata().T)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="macOS writes the zeros itself")
def test_a_full_disk_is_an_error_and_kills_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((*SHAPE, 4), np.int16), AFFINE), tmp_path / "a.nii")
    header = read_header(tmp_path / "a.nii")
    asked = []

    def full(file: int, start: int, size: int) -> None:
        asked.append((start, size))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            decode_series(header, tmp_path / "series")
    assert asked == [(0, 4 * 4 * 9 * 10 * 11)]
    decode_series(header, tmp_path / "series")
    used = (tmp_path / "series").stat()
    assert used.st_blocks * 512 >= used.st_size  # no holes, which a full disk could not fill


@pytest.mark.parametrize("reserves", [True, False])
def test_a_new_mapping_is_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserves: bool
) -> None:
    if not reserves:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr("neuromamba.resample_series.ZEROS", 1000)
    (tmp_path / "series").write_bytes(b"old" * 9999)
    series = map_new(tmp_path / "series", (3, 7, 61))
    assert (series.shape, series.dtype) == ((3, 7, 61), np.float32)
    assert not series.any()
    assert (tmp_path / "series").stat().st_size == 4 * 3 * 7 * 61
    series[2, 6, 60] = 1


def test_what_is_written_is_read_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    grid = Grid(SHAPE, AFFINE)
    volumes = np.random.default_rng(0).integers(-300, 300, (3, grid.n_voxels)).astype(np.int16)
    for name in ("a", "b"):
        with open_series(tmp_path / f"{name}.nii.gz", grid, 3, STEP, np.int16, 0.25) as stream:
            for volume in volumes:
                stream.write(volume.tobytes())
    image = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    assert image.header.get_zooms()[3] == STEP
    np.testing.assert_allclose(image.get_fdata().reshape(-1, 3, order="F").T, volumes * 0.25)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    write_image(tmp_path / "mask.nii.gz", grid, blobs() > 100)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "mask.nii.gz").get_fdata(), blobs() > 100)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with open_series(tmp_path / "a.nii.gz", Grid(SHAPE, AFFINE), 3) as stream:
            stream.write(bytes(10))
            raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "slope", "highest", "stored", "step"),
    [
        (np.int16, 1, 9000, np.int16, 1),
        (np.int16, 1, 100, np.int16, 0.025),
        (np.uint16, 1, 60000, np.int16, 2),
        (np.int16, 0.5, 4000, np.int16, 0.5),
        (np.float32, 1, 1, np.float32, 1),
    ],
)
def test_values_are_stored_as_finely_as_they_came(
    tmp_path: Path, dtype: Any, slope: float, highest: float, stored: Any, step: float
) -> None:
    image = nibabel.Nifti1Image(np.ones((4, 4, 4, 2), dtype), np.eye(4))
    if slope != 1:
        image.header.set_slope_inter(slope, 0)
    nibabel.save(image, tmp_path / "x.nii.gz")
    header = read_header(tmp_path / "x.nii.gz")
    assert storage(header, highest) == (np.dtype(stored), pytest.approx(step))
