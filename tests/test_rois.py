"""ROI series: against nilearn, in original units, the same ROIs for every run, resumed by key."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import xarray
from fabricate import GRID, VOXEL, ball, make_config, write_volumes
from nilearn.image import resample_img
from nilearn.maskers import NiftiLabelsMasker

from neuromamba.config import Config
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.rois import (
    connectivity,
    make_cubes,
    make_rois,
    read_atlas,
    resample_labels,
    run_rois,
)
from neuromamba.tables import read_table, write_table

RUN = "sub-01_task-rest"


def grid_affine(voxel: float = VOXEL) -> np.ndarray:
    affine = np.diag([voxel] * 3 + [1.0])
    affine[:3, 3] = -voxel * (np.array(GRID) - 1) / 2
    return affine


def write_atlas(path: Path, labels: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(labels, affine), path)
    return path


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """A finer, flipped (left-to-right) atlas of eight octants, with gaps in its label numbers."""
    half = 5.0
    n = 24
    affine = np.diag([-half, half, half, 1.0])
    affine[:3, 3] = [half * (n - 1) / 2, -half * (n - 1) / 2, -half * (n - 1) / 2]
    x, y, z = np.indices((n, n, n)) >= n // 2
    labels = (10 * (x * 4 + y * 2 + z) + 3).astype(np.int16)
    labels[:2] = 0
    labels[:, [0, -1]] = labels[:, :, [0, -1]] = labels[-1] = 0
    return write_atlas(tmp_path / "octants.nii.gz", labels, affine)


@pytest.fixture
def bold() -> np.ndarray:
    rng = np.random.default_rng(0)
    level = rng.uniform(500, 900, size=GRID[::-1])
    return level + 20 * rng.normal(size=(21, *GRID[::-1]))


def manifest_of(runs: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"run": runs, "reason": None})


def make_run(config: Config, run: str, bold: np.ndarray, mask: np.ndarray) -> None:
    layout = Layout(Path(config.results), "toy")
    write_volumes(layout.array("volumes", run), run, bold, mask)


def test_labels_are_resampled_like_nilearns(blocks: Path) -> None:
    rotated = grid_affine()
    turn = np.deg2rad(20)
    rotated[:2, :2] = VOXEL * np.array(
        [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    )
    parcellation = read_atlas(blocks)
    found = resample_labels(parcellation, GRID, rotated)
    expected = resample_img(
        nibabel.load(blocks), rotated, GRID, interpolation="nearest", force_resample=True
    ).get_fdata()
    names = np.array([0, *map(int, parcellation.labels)])
    assert (names[found + 1] == expected).mean() > 0.995  # voxels halfway between two may differ


def test_series_are_nilearns_in_original_units(
    tmp_path: Path, blocks: Path, bold: np.ndarray
) -> None:
    config = make_config(tmp_path, dataset={"atlas": str(blocks)})
    layout = Layout(Path(config.results), "toy")
    mask = ball()
    make_run(config, RUN, bold, mask)
    write_table(layout.manifest("volumes", 0), manifest_of([RUN]))
    run_rois(config, "toy", 0)
    rois = xarray.open_zarr(layout.array("rois", RUN))
    affine = grid_affine()
    on_grid = resample_labels(read_atlas(blocks), GRID, affine)
    atlas = nibabel.Nifti1Image((on_grid + 1).astype(np.int16), affine)
    masker = NiftiLabelsMasker(
        atlas, mask_img=nibabel.Nifti1Image(mask.T.astype(np.uint8), affine), standardize=None
    )
    expected = masker.fit_transform(nibabel.Nifti1Image(np.moveaxis(bold.T, -1, 3), affine))
    assert rois["timeseries"].dims == ("time", "roi")
    assert rois["timeseries"].dtype == np.float32
    assert np.abs(rois["timeseries"].values - expected).max() < 0.05  # fp16 of a signal near 700
    assert np.abs(rois["fc"].values - np.corrcoef(expected.T)).max() < 1e-3
    assert list(rois["roi"].values) == ["3", "13", "23", "33", "43", "53", "63", "73"]
    assert rois.attrs["atlas"] == "octants.nii.gz"
    assert len(rois.attrs["atlas_sha256"]) == 64
    assert rois.attrs["tsnr"] == pytest.approx(700 / 20, rel=0.05)
    assert rois["time"].values[1] == rois.attrs["repetition_time"] == 2.0


def test_every_run_has_the_same_cubes_and_absent_ones_are_missing(
    tmp_path: Path, bold: np.ndarray
) -> None:
    config = make_config(tmp_path)
    layout = Layout(Path(config.results), "toy")
    small = ball(radius=2.0)
    make_run(config, "sub-01", bold, ball())
    make_run(config, "sub-02", bold, small)
    write_table(layout.manifest("volumes", 0), manifest_of(["sub-01", "sub-02"]))
    run_rois(config, "toy", 0)
    large, little = (xarray.open_zarr(layout.array("rois", run)) for run in ("sub-01", "sub-02"))
    assert (large["roi"].values == little["roi"].values).all()
    assert len(large["roi"]) == (12 * 8 // 24) ** 3
    missing = np.isnan(little["timeseries"].values).all(axis=0)
    cube = (np.indices(GRID[::-1]) // 3).transpose(1, 2, 3, 0)[small]
    assert (~missing).sum() == len(np.unique(cube, axis=0))
    assert np.isnan(little["fc"].values[missing]).all()
    assert np.isfinite(little["fc"].values[np.ix_(~missing, ~missing)]).all()
    manifest = read_table(layout.manifest("rois", 0)).set_index("run")
    assert manifest.loc["sub-02", "n_missing"] == missing.sum()


def test_a_cube_is_named_by_its_place() -> None:
    cubes = make_cubes((4, 6, 2), np.diag([2.0, 2.0, 2.0, 1.0]), 4.0)
    assert cubes.labels[0] == "x0-y0-z0"
    assert cubes.labels[cubes.index[3, 2, 1]] == "x1-y1-z0"
    uneven = make_cubes((10, 10, 10), np.eye(4) * 2, 5.0)
    assert len(uneven.labels) == 64
    assert len(np.unique(uneven.index)) == 64


def test_reading_in_shards_changes_nothing(tmp_path: Path, bold: np.ndarray) -> None:
    make_run(make_config(tmp_path), RUN, bold, ball())
    source = Layout(tmp_path / "results", "toy").array("volumes", RUN)
    cubes = make_cubes(GRID, grid_affine(), 24.0)
    for shard in (4, 100):
        make_rois(source, tmp_path / f"{shard}.zarr", cubes, shard)
    first, second = (xarray.open_zarr(tmp_path / f"{shard}.zarr") for shard in (4, 100))
    xarray.testing.assert_identical(first.load(), second.load())


def test_a_finished_run_is_kept_until_its_inputs_change(tmp_path: Path, bold: np.ndarray) -> None:
    make_run(make_config(tmp_path), RUN, bold, ball())
    source = Layout(tmp_path / "results", "toy").array("volumes", RUN)
    target = tmp_path / "rois.zarr"
    cubes = make_cubes(GRID, grid_affine(), 24.0)
    first = make_rois(source, target, cubes, 8)
    made = target.stat().st_ino
    assert make_rois(source, target, cubes, 8) == first
    assert target.stat().st_ino == made
    make_rois(source, target, make_cubes(GRID, grid_affine(), 48.0), 8)
    assert target.stat().st_ino != made
    assert len(xarray.open_zarr(target)["roi"]) == 8


def test_a_constant_roi_has_no_correlation() -> None:
    series = np.random.default_rng(0).normal(size=(20, 3))
    series[:, 1] = 5
    fc = connectivity(series)
    assert np.isnan(fc[1]).all()
    assert fc[0, 0] == pytest.approx(1)


def test_an_atlas_in_another_space_is_refused(tmp_path: Path, bold: np.ndarray) -> None:
    far = grid_affine()
    far[:3, 3] += 500
    atlas = write_atlas(tmp_path / "far.nii.gz", np.ones(GRID, np.int16), far)
    config = make_config(tmp_path, dataset={"atlas": str(atlas)})
    make_run(config, RUN, bold, ball())
    layout = Layout(Path(config.results), "toy")
    write_table(layout.manifest("volumes", 0), manifest_of([RUN]))
    with pytest.raises(InputError, match=r"far\.nii\.gz.*MNI152NLin2009cAsym"):
        run_rois(config, "toy", 0)
    assert not layout.array("rois", RUN).exists()


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.zeros(GRID, np.int16), "no label above 0"),
        (np.full(GRID, 0.5, np.float32), "whole numbers"),
        (-np.ones(GRID, np.int16), "whole numbers"),
        (np.ones((*GRID, 2), np.int16), "one 3D image of labels"),
    ],
)
def test_an_image_that_is_no_atlas_is_refused(
    tmp_path: Path, labels: np.ndarray, problem: str
) -> None:
    path = write_atlas(tmp_path / "atlas.nii.gz", labels, np.eye(4))
    with pytest.raises(InputError, match=problem):
        read_atlas(path)


def test_an_absent_or_broken_atlas_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_atlas(tmp_path / "none.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"broken\.nii\.gz"):
        read_atlas(tmp_path / "broken.nii.gz")


def test_the_published_atlases_can_be_read(real_data: Path) -> None:
    aal = read_atlas(real_data / "atlas" / "AAL116_space-MNI152NLin6_res-2.nii.gz")
    cc400 = read_atlas(real_data / "atlas" / "cc400_roi_atlas_3mm.nii.gz")
    assert (len(aal.labels), len(cc400.labels)) == (116, 392)
