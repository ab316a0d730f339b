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

from neuromamba.atlas_files import read_atlas
from neuromamba.atlases import open_atlas
from neuromamba.bids import run_index
from neuromamba.config import Config, Rois
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.parcellation import make_cubes, resample_labels
from neuromamba.rois import make_rois, run_rois
from neuromamba.tables import read_table, write_table
from neuromamba.volumes import run_volumes

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
        make_rois(source, tmp_path / f"{shard}.zarr", cubes, shard, Rois())
    first, second = (xarray.open_zarr(tmp_path / f"{shard}.zarr") for shard in (4, 100))
    xarray.testing.assert_identical(first.load(), second.load())


def test_a_finished_run_is_kept_until_its_inputs_change(tmp_path: Path, bold: np.ndarray) -> None:
    make_run(make_config(tmp_path), RUN, bold, ball())
    source = Layout(tmp_path / "results", "toy").array("volumes", RUN)
    target = tmp_path / "rois.zarr"
    cubes = make_cubes(GRID, grid_affine(), 24.0)
    first = make_rois(source, target, cubes, 8, Rois())
    made = target.stat().st_ino
    assert make_rois(source, target, cubes, 8, Rois()) == first
    assert target.stat().st_ino == made
    make_rois(source, target, make_cubes(GRID, grid_affine(), 48.0), 8, Rois())
    assert target.stat().st_ino != made
    assert len(xarray.open_zarr(target)["roi"]) == 8


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


# --- Coverage -----------------------------------------------------------------------------------


def slabs(folder: Path, parts: int = 4, name: str = "slabs.nii.gz") -> Path:
    """An atlas on the run's grid, cut along x into `parts` regions that fill it."""
    labels = np.repeat(np.arange(1, parts + 1), GRID[0] // parts)[:, None, None]
    return write_atlas(
        folder / name, np.broadcast_to(labels, GRID).astype(np.int16).copy(), grid_affine()
    )


def store_of(config: Config, bold: np.ndarray, mask: np.ndarray, run: str = RUN) -> xarray.Dataset:
    make_run(config, run, bold, mask)
    layout = Layout(Path(config.results), "toy")
    write_table(layout.manifest("volumes", 0), manifest_of([run]))
    run_rois(config, "toy", 0)
    return xarray.open_zarr(layout.array("rois", run)).load()


def test_a_roi_that_is_hardly_covered_is_missing_and_never_zero(
    tmp_path: Path, bold: np.ndarray
) -> None:
    mask = np.zeros(GRID[::-1], dtype=bool)
    mask[:, :, 3:9] = True  # slabs 2 and 3
    mask[:6, :, 2] = True  # a sixth of slab 1
    found = {}
    for least in (0.0, 0.2):
        config = make_config(
            tmp_path / f"{least}",
            dataset={"atlas": str(slabs(tmp_path))},
            rois={"min_coverage": least, "connectivity": ["pearson", "partial"]},
        )
        found[least] = store_of(config, bold, mask)
    expected = [1 / 6, 1, 1, 0]
    for rois in found.values():
        assert rois["coverage"].values == pytest.approx(expected)
    assert found[0.0].attrs["n_missing"] == 1
    lenient, strict = found[0.0]["timeseries"].values, found[0.2]["timeseries"].values
    assert np.isnan(strict).any(axis=0).tolist() == [True, False, False, True]
    assert np.isnan(strict[:, [0, 3]]).all()
    assert (strict[:, 1:3] == lenient[:, 1:3]).all()
    assert (found[0.2].attrs["n_rois"], found[0.2].attrs["n_missing"]) == (2, 2)
    for name in ("fc", "fc_partial"):
        values = found[0.2][name].values
        assert np.isnan(values[[0, 3]]).all()
        assert np.isfinite(values[1:3, 1:3]).all()


def test_a_run_that_covers_no_roi_enough_is_left_out(tmp_path: Path, bold: np.ndarray) -> None:
    config = make_config(
        tmp_path, dataset={"atlas": str(slabs(tmp_path))}, rois={"min_coverage": 0.9}
    )
    with pytest.raises(InputError, match=r"covers at most \d+% .* rois\.min_coverage = 0\.9"):
        store_of(config, bold, ball())


def test_what_lies_beyond_the_grid_counts_as_not_covered(tmp_path: Path, bold: np.ndarray) -> None:
    affine = grid_affine()
    affine[0, 3] -= VOXEL * GRID[0] / 2  # half of the atlas lies left of the grid
    labels = np.ones(GRID, dtype=np.int16)
    atlas = write_atlas(tmp_path / "wide.nii.gz", labels, affine)
    config = make_config(tmp_path, dataset={"atlas": str(atlas)})
    rois = store_of(config, bold, np.ones(GRID[::-1], dtype=bool))
    assert rois["coverage"].values == pytest.approx([0.5])


# --- Connectivity -------------------------------------------------------------------------------


def planted(signals: np.ndarray) -> np.ndarray:
    """A run whose slabs along x have the given signals: (time, slab) -> (time, z, y, x)."""
    of_voxel = np.repeat(signals, GRID[0] // signals.shape[1], axis=1)
    noise = np.random.default_rng(1).normal(size=(len(signals), *GRID[::-1]))
    return 800 + 10 * of_voxel[:, None, None, :] + noise


def test_planted_signals_and_their_correlations_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second, noise = rng.normal(size=(3, 400))
    # 1 -> 2 -> 3, and 4 alone: 1 and 3 correlate only through 2.
    middle = first + second
    signals = np.stack([first, middle, middle + noise, rng.normal(size=400)], axis=1)
    config = make_config(
        tmp_path,
        dataset={"atlas": str(slabs(tmp_path))},
        rois={"connectivity": ["partial", "pearson"]},
    )
    rois = store_of(config, planted(signals), ball(radius=5.5))
    series = rois["timeseries"].values
    assert [np.corrcoef(series[:, k], signals[:, k])[0, 1] > 0.999 for k in range(4)] == [True] * 4
    assert np.abs(rois["fc"].values - np.corrcoef(signals.T)).max() < 0.01
    assert rois["fc"].values[0, 2] > 0.4
    assert abs(rois["fc_partial"].values[0, 2]) < 0.1
    assert rois["fc_partial"].values[0, 1] > 0.4
    assert "Ledoit-Wolf" in rois["fc_partial"].attrs["long_name"]
    assert rois.attrs["connectivity"] == ["partial", "pearson"]


def test_fishers_z_is_stored_where_it_is_asked_for(tmp_path: Path, bold: np.ndarray) -> None:
    stores = []
    for is_z in (False, True):
        config = make_config(tmp_path / f"{is_z}", rois={"cube": 48.0, "fisher_z": is_z})
        stores.append(store_of(config, bold, ball()))
    r, z = stores
    assert (r["fc"].attrs["fisher_z"], z["fc"].attrs["fisher_z"]) == (False, True)
    assert np.isfinite(z["fc"].values).all()
    off = ~np.eye(8, dtype=bool)
    assert np.abs(np.tanh(z["fc"].values) - r["fc"].values)[off].max() < 1e-6
    assert np.diag(z["fc"].values) == pytest.approx(np.arctanh(0.99999), rel=1e-3)
    assert "fc_partial" not in r


@pytest.mark.parametrize("rois", [{"min_coverage": 0.1}, {"connectivity": ["partial"]}])
def test_a_run_is_made_again_when_its_settings_change(
    tmp_path: Path, bold: np.ndarray, rois: dict
) -> None:
    make_run(make_config(tmp_path), RUN, bold, ball())
    source = Layout(tmp_path / "results", "toy").array("volumes", RUN)
    cubes = make_cubes(GRID, grid_affine(), 24.0)
    first = make_rois(source, tmp_path / "rois.zarr", cubes, 8, Rois())
    assert make_rois(source, tmp_path / "rois.zarr", cubes, 8, Rois(**rois))["key"] != first["key"]


def test_a_kind_of_connectivity_is_named_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        Rois(connectivity=["pearson", "pearson"])
    with pytest.raises(ValueError, match="connectivity"):
        Rois(connectivity=[])


# --- Space, names and parcels -------------------------------------------------------------------


def test_the_space_and_the_names_of_the_atlas_are_recorded(
    tmp_path: Path, bold: np.ndarray
) -> None:
    atlas = slabs(tmp_path, name="A_space-MNI152NLin6Asym.nii.gz")
    (tmp_path / "A_labels.csv").write_text("index,name\n1,far left\n2,left\n3,right\n")
    config = make_config(tmp_path, dataset={"atlas": str(atlas)})
    with pytest.warns(UserWarning, match="few mm"):
        rois = store_of(config, bold, ball())
    assert rois["roi"].values.tolist() == ["far left", "left", "right", "4"]
    assert rois.attrs["atlas_space"] == "MNI152NLin6Asym"
    assert "few mm" in rois.attrs["atlas_note"]
    assert rois.attrs["atlas_names"] == "A_labels.csv"


def test_packaged_parcels_need_no_file(tmp_path: Path, bold: np.ndarray) -> None:
    config = make_config(tmp_path, dataset={"atlas": "packaged:10", "space": "MNI152NLin2009aSym"})
    rois = store_of(config, bold, ball(radius=6))
    assert rois["roi"].values.tolist() == [f"{side}{k}" for side in "LR" for k in range(1, 6)]
    assert "not anatomical" in rois.attrs["atlas"]
    assert (tmp_path / "results" / ".digests" / "atlas.lock").exists()


# --- Real scans ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("atlas", "n_rois", "named"),
    [
        ("AAL116_space-MNI152NLin6_res-2.nii.gz", 116, "Precentral_L"),
        ("cc400_roi_atlas_3mm.nii.gz", 392, "1"),
        ("packaged:100", 100, "L1"),
    ],
)
@pytest.mark.filterwarnings("ignore:atlas .* few mm")
def test_a_real_scan_gives_the_series_of_published_atlases(
    tmp_path: Path, real_volumes: Path, real_data: Path, atlas: str, n_rois: int, named: str
) -> None:
    path = atlas if ":" in atlas else str(real_data / "atlas" / atlas)
    found = open_atlas(path, "MNI152NLin2009cAsym")
    settings = Rois(connectivity=["pearson", "partial"], min_coverage=0.3)
    facts = make_rois(real_volumes, tmp_path / "rois.zarr", found, 8, settings)
    rois = xarray.open_zarr(tmp_path / "rois.zarr").load()
    assert len(rois["roi"]) == n_rois
    assert rois["roi"].values[0] == named
    assert 0 < facts["n_missing"] < 0.12 * n_rois
    present = ~np.isnan(rois["timeseries"].values[0])
    coverage = rois["coverage"].values
    assert (present == (coverage >= 0.3)).all()
    assert np.median(coverage) > 0.9
    for name in ("fc", "fc_partial"):
        values = rois[name].values
        assert (np.isfinite(values) == np.outer(present, present)).all()
        assert np.abs(values[np.ix_(present, present)]).max() < 1 + 1e-5
    if "AAL" in atlas:
        # The scan does not reach down to the lower cerebellum.
        assert all(
            name[:9] in ("Cerebelum", "Vermis_8", "Vermis_9")
            for name in rois["roi"].values[~present]
        )
        # Homotopic regions go together more than others do.
        fc = rois["fc"].values
        pairs = [(k, k + 1) for k in range(0, 107, 2) if present[k] and present[k + 1]]
        homotopic = np.mean([fc[pair] for pair in pairs])
        off = np.outer(present, present) & ~np.eye(n_rois, dtype=bool)
        assert homotopic > fc[off].mean() + 0.3


@pytest.fixture(scope="module")
def real_volumes(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volumes of a real scan."""
    folder = tmp_path_factory.mktemp("real")
    config = make_config(
        folder,
        dataset={"derivatives": str(real_data / "derivatives_antsdemo"), "repetition_time": 2.0},
        volumes={},
    )
    run_index(config, "toy")
    run_volumes(config, "toy", 0)
    return Layout.of(config, "toy").array("volumes", "sub-02_task-oneback_run-1")
