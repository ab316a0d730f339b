"""Volumes after denoising: what is stored and recorded, smoothing, memory, nothing left behind."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import xarray
from confound_tables import by_nilearn, make_table, mark_moving, mark_unsteady, write_confounds
from nilearn.image import resample_img, smooth_img
from scans import GRID, affine_8mm, ball, make_config, series, write_index, write_run, write_scan

from neuromamba import nifti, spool
from neuromamba.config import Denoise, Volumes
from neuromamba.files import InputError, digest_file
from neuromamba.resample import target_affine
from neuromamba.tables import read_table
from neuromamba.volumes import Source, make_volumes, run_volumes

pytestmark = pytest.mark.usefixtures("small_blocks")

N = 80
SETTINGS = {"strategy": ["scrub", "motion"], "motion": "basic", "low_pass": 0.1, "detrend": True}


def make(
    folder: Path, data: np.ndarray, confounds: Path | None = None, **settings: Any
) -> tuple[xarray.Dataset, dict[str, Any]]:
    row = write_run(folder, "sub-01", data)
    source = Source(
        row["run"],
        row["subject"],
        Path(row["bold"]),
        Path(row["mask"]),
        "MNI152",
        2.0,
        row["fingerprint"],
        confounds,
    )
    volumes = Volumes(**GRID, denoise=Denoise(**settings))
    facts = make_volumes(source, folder / "sub-01.zarr", volumes, time_patch=2)
    return xarray.open_zarr(folder / "sub-01.zarr", chunks=None), facts


def on_grid(image: nibabel.Nifti1Image) -> np.ndarray:
    """(t, z, y, x)"""
    volumes = Volumes(**GRID)
    resampled = resample_img(
        image,
        target_affine(volumes),
        volumes.shape,
        interpolation="linear",
        force_resample=True,
        copy_header=True,
    )
    return np.asarray(resampled.dataobj).T


def moving_table() -> Any:
    table = make_table(N)
    mark_unsteady(table, 2)
    mark_moving(table, [30, 31, 45])
    return table


def test_a_denoised_store_is_nilearns_result_and_says_how_it_was_made(tmp_path: Path) -> None:
    data, table = series(n_volumes=N), moving_table()
    path = write_confounds(tmp_path, table)
    stored, facts = make(tmp_path, data, path, **SETTINGS)
    mask = stored["mask"].values
    before = on_grid(nibabel.Nifti1Image(data, affine_8mm()))[:, mask]
    late = write_confounds(tmp_path / "late", table.iloc[2:])
    expected = by_nilearn(before[2:], late, Denoise(**SETTINGS))
    kept = np.setdiff1d(np.arange(2, N), [30, 31, 45])
    expected += before[kept].mean(axis=0) - expected.mean(axis=0)
    bold = stored["bold"].values[:, mask]
    np.testing.assert_allclose(bold, expected, atol=2**-10 * np.abs(expected - 1000).max())
    np.testing.assert_allclose(stored["mean"].values[mask], expected.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stored["sd"].values[mask], expected.std(0), rtol=1e-3)
    np.testing.assert_array_equal(stored["time"], kept * 2.0)
    recorded = stored.attrs["denoise"]
    assert recorded["dropped"] == [0, 1]
    assert recorded["scrubbed"] == [30, 31, 45]
    assert len(recorded["columns"]) == recorded["rank"] == 6
    assert recorded["strategy"] == SETTINGS["strategy"]
    assert {"nilearn_version", "scipy_version", "filter"} <= set(recorded)
    assert stored.attrs["confounds_source"] == str(path)
    assert stored.attrs["confounds_sha256"] == digest_file(path)
    assert not stored.attrs["time_is_regular"]
    expected_facts = {"repetition_time": 2.0, "n_dropped": 2, "n_scrubbed": 3, "n_volumes": N - 5}
    assert expected_facts.items() <= facts.items()
    # 75 volumes at a Nyquist frequency of 0.25 Hz, 6 confounds, mean and trend.
    assert facts["dof"] == 30 - 6 - 2


def test_a_new_repetition_time_is_the_stores(tmp_path: Path) -> None:
    stored, facts = make(tmp_path, series(n_volumes=N), repetition_time=2.5)
    assert stored.attrs["repetition_time"] == facts["repetition_time"] == 2.5
    np.testing.assert_allclose(stored["time"], np.arange(64) * 2.5)
    assert stored.sizes["time"] == facts["n_volumes"] == stored.attrs["n_volumes"] == 64
    assert stored.attrs["time_is_regular"]


def test_a_finer_repetition_time_has_room(tmp_path: Path) -> None:
    stored, _ = make(tmp_path, series(n_volumes=30), repetition_time=1.0)
    coarse, _ = make(tmp_path / "coarse", series(n_volumes=30))
    assert stored.sizes["time"] == 59
    step = 2**-10 * np.nanmax(np.abs(coarse["bold"].values - 1000))
    np.testing.assert_allclose(stored["bold"].values[::2], coarse["bold"].values, atol=step)


def test_the_store_does_not_depend_on_the_blocks_of_voxels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_confounds(tmp_path, moving_table())
    one, _ = make(tmp_path / "one", series(n_volumes=N), path, **SETTINGS)
    monkeypatch.setattr(spool, "SPOOL_BYTES", 4 * N * 37)
    monkeypatch.setattr(spool, "READ_VOLUMES", 7)
    two, _ = make(tmp_path / "two", series(n_volumes=N), path, **SETTINGS)
    np.testing.assert_array_equal(one["mask"], two["mask"])
    step = 2**-10 * np.nanmax(np.abs(one["bold"].values - 1000))
    np.testing.assert_allclose(one["bold"].values, two["bold"].values, atol=step)


def test_constant_voxels_are_found_after_denoising_too(tmp_path: Path) -> None:
    data = series(n_volumes=N)
    data[9:12] = 700.0
    still, _ = make(tmp_path / "still", data)
    stored, facts = make(tmp_path / "denoised", data, high_pass=0.01)
    assert facts["n_constant_voxels"] == still.attrs["n_constant_voxels"] > 0
    np.testing.assert_array_equal(stored["mask"], still["mask"])


# --- Smoothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_time", [{}, {"detrend": True}], ids=["alone", "and denoised"])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_smoothing_is_nilearns(tmp_path: Path, in_time: dict[str, Any], kind: Any) -> None:
    data = np.round(series(n_volumes=30)).astype(kind)
    stored, _ = make(tmp_path, data, smoothing=14.0, **in_time)
    mask = stored["mask"].values
    image = nibabel.Nifti1Image(data.astype(np.float32), affine_8mm())
    expected = on_grid(smooth_img(image, 14.0))[:, mask]
    if in_time:
        expected = by_nilearn(expected, None, Denoise(**in_time)) + expected.mean(axis=0)
    tolerance = 2**-10 * np.abs(expected - 1000).max()
    np.testing.assert_allclose(stored["bold"].values[:, mask], expected, atol=tolerance)
    assert stored.attrs["smoothing"] == 14.0


def test_smoothing_takes_scaled_counts_and_empty_background(tmp_path: Path) -> None:
    data = series()
    row = write_run(tmp_path, "sub-01", data)
    counts = np.round((data - 500) / 0.5)
    counts[~ball(data.shape[:3])] = -1000  # 0 once scaled
    spoilt = np.where(ball(data.shape[:3])[..., None], counts, np.nan).astype(np.float32)
    stores = []
    for name, values in (("whole", counts.astype(np.int16)), ("spoilt", spoilt)):
        bold = write_scan(tmp_path / f"{name}.nii", values, affine_8mm(), slope=0.5, inter=500)
        source = Source("sub-01", "sub-01", bold, Path(row["mask"]), "MNI152", 2.0, "f")
        volumes = Volumes(**GRID, denoise=Denoise(smoothing=10.0))
        make_volumes(source, tmp_path / f"{name}.zarr", volumes, 2)
        stores.append(xarray.open_zarr(tmp_path / f"{name}.zarr", chunks=None)["bold"].values)
    np.testing.assert_allclose(*stores, atol=1)
    image = nibabel.Nifti1Image((counts * 0.5 + 500).astype(np.float32), affine_8mm())
    expected = on_grid(smooth_img(image, 10.0))
    inside = np.isfinite(stores[0])
    np.testing.assert_allclose(stores[0][inside], expected[inside], atol=1)


def test_smoothing_does_not_hide_nan_in_the_brain(tmp_path: Path) -> None:
    data = series()
    data[10, 12, 10, 7] = np.nan
    with pytest.raises(InputError, match=r"1 voxels of the brain mask are NaN .* in volume 7"):
        make(tmp_path, data, smoothing=10.0)


# --- The stage ------------------------------------------------------------------------------------


def test_nothing_asked_for_is_recorded_as_nothing(tmp_path: Path) -> None:
    stored, facts = make(tmp_path, series(), fd_threshold=0.3)
    assert not {"denoise", "dof", "smoothing", "confounds_source"} & set(stored.attrs)
    assert set(facts) == {"key", "n_volumes", "n_voxels", "n_constant_voxels"}


def test_memory_does_not_grow_with_the_number_of_volumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nifti, "BLOCK_BYTES", 1)
    monkeypatch.setattr(spool, "SPOOL_BYTES", 60_000)

    def peak(n_volumes: int) -> tuple[int, int]:
        data = series(n_volumes=n_volumes)
        row = write_run(tmp_path, "sub-01", data)
        bold, mask = Path(row["bold"]), Path(row["mask"])
        source = Source("sub-01", "sub-01", bold, mask, "MNI152", 2.0, str(n_volumes))
        volumes = Volumes(**GRID, denoise=Denoise(low_pass=0.1, repetition_time=2.2))
        tracemalloc.start()
        facts = make_volumes(source, tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr", volumes, 2)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result, facts["n_voxels"] * n_volumes * 4

    peak(60)
    short, _ = peak(60)
    long, run_bytes = peak(300)
    assert long < short + run_bytes / 3


def test_nothing_is_left_behind_when_a_run_turns_out_damaged(tmp_path: Path) -> None:
    row = write_run(tmp_path, "sub-01", series(n_volumes=N))
    bold = Path(row["bold"])
    bold.write_bytes(bold.read_bytes()[: bold.stat().st_size * 2 // 3])
    source = Source("sub-01", "sub-01", bold, Path(row["mask"]), "MNI152", 2.0, "f")
    volumes = Volumes(**GRID, denoise=Denoise(detrend=True))
    with pytest.raises(InputError, match="is truncated"):
        make_volumes(source, tmp_path / "stores" / "sub-01.zarr", volumes, 2)
    assert list((tmp_path / "stores").iterdir()) == []


def test_runs_without_confounds_are_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    rows = [write_run(tmp_path, f"sub-{i:02}", series(n_volumes=N, seed=i)) for i in (1, 2)]
    rows[0]["confounds"] = str(write_confounds(tmp_path, moving_table()))
    config = make_config(
        tmp_path, compute={"max_excluded": 0.5}, volumes={"denoise": {"strategy": ["scrub"]}}
    )
    layout = write_index(config, rows)
    run_volumes(config, "toy", 0)
    manifest = read_table(layout.manifest("volumes", 0), dtype={"run": str}).set_index("run")
    assert manifest.loc["sub-01", "n_scrubbed"] == 3
    assert "sub-02: has no confounds table" in manifest.loc["sub-02", "reason"]
    assert [path.name for path in layout.array("volumes", "x").parent.glob(".*")] == []
