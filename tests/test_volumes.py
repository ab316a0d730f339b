"""Volumes: nilearn's values on the grid, statistics, nothing half-written."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import xarray
from nilearn.image import resample_img
from scans import GRID, affine_8mm, ball, make_config, series, write_index, write_run, write_scan

from neuromamba import nifti, volumes
from neuromamba.config import Volumes
from neuromamba.files import InputError
from neuromamba.resample import target_affine
from neuromamba.shards import ShardWriter
from neuromamba.stage import batch_of
from neuromamba.tables import read_table
from neuromamba.volumes import Source, make_volumes, run_volumes

pytestmark = pytest.mark.usefixtures("small_blocks")

SETTINGS = Volumes(**GRID)


def source_of(row: dict[str, Any]) -> Source:
    return Source(
        row["run"],
        row["subject"],
        Path(row["bold"]),
        Path(row["mask"]),
        "MNI152",
        2.0,
        row["fingerprint"],
    )


def make(folder: Path, data: np.ndarray, settings: Volumes = SETTINGS, **kwargs: Any) -> Path:
    row = write_run(folder, "sub-01", data, **kwargs)
    make_volumes(source_of(row), folder / "sub-01.zarr", settings, time_patch=2)
    return folder / "sub-01.zarr"


def load(store: Path) -> xarray.Dataset:
    return xarray.open_zarr(store, chunks=None)


def on_grid(data: np.ndarray, settings: Volumes = SETTINGS, interpolation: str = "linear") -> Any:
    """The series as nilearn resamples it: (t, z, y, x)."""
    image = resample_img(
        nibabel.Nifti1Image(data.astype(np.float32), affine_8mm()),
        target_affine(settings),
        settings.shape,
        interpolation=interpolation,
        force_resample=True,
        copy_header=True,
    )
    return np.asarray(image.dataobj).T


def test_values_are_nilearns_within_float16_and_nan_outside_the_mask(tmp_path: Path) -> None:
    data = series()
    stored = load(make(tmp_path, data))
    expected = on_grid(data)
    mask = stored["mask"].values
    assert mask.sum() > 1000
    np.testing.assert_array_equal(mask, on_grid(ball(data.shape[:3]), interpolation="nearest") > 0)
    bold = stored["bold"].values
    assert np.isnan(bold[:, ~mask]).all()
    # Relative to the distance from the mean, in units of which the values are stored.
    tolerance = 2**-11 * np.abs(expected - 1000).max()
    np.testing.assert_allclose(bold[:, mask], expected[:, mask], rtol=0, atol=tolerance)


def test_xarray_decodes_to_full_precision(tmp_path: Path) -> None:
    store = make(tmp_path, series())
    raw = xarray.open_zarr(store, chunks=None, mask_and_scale=False)["bold"]
    assert raw.dtype == np.float16
    decoded = load(store)["bold"]
    assert decoded.dtype in (np.float32, np.float64)
    scale, offset = raw.attrs["scale_factor"], raw.attrs["add_offset"]
    np.testing.assert_array_equal(decoded.values, raw.values.astype(float) * scale + offset)


def test_dimensions_coordinates_and_attributes(tmp_path: Path) -> None:
    stored = load(make(tmp_path, series()))
    assert stored["bold"].dims == ("time", "z", "y", "x")
    np.testing.assert_array_equal(stored["time"], np.arange(20) * 2.0)
    affine = np.array(stored.attrs["affine"])
    np.testing.assert_array_equal(affine, target_affine(SETTINGS))
    corner = affine @ [0, 5, 23, 1]
    np.testing.assert_allclose([stored["x"][0], stored["y"][5], stored["z"][23]], corner[:3])
    assert stored["time"].attrs["units"] == "s"
    assert stored["x"].attrs["units"] == "mm"
    expected = {"space": "MNI152", "repetition_time": 2.0, "run": "sub-01", "n_volumes": 20}
    assert expected.items() <= stored.attrs.items()
    assert {"source", "source_sha256", "neuromamba_version", "interpolation"} <= set(stored.attrs)


def test_statistics_are_numpys(tmp_path: Path) -> None:
    data = series()
    # A large mean beside a small SD is where sums of squares fail.
    data += 1e5
    stored = load(make(tmp_path, data))
    mask = stored["mask"].values
    expected = on_grid(data - 1e5)[:, mask].astype(np.float64)
    np.testing.assert_allclose(stored["mean"].values[mask], expected.mean(axis=0) + 1e5, rtol=1e-6)
    np.testing.assert_allclose(stored["sd"].values[mask], expected.std(axis=0), rtol=2e-3)
    np.testing.assert_allclose(stored.attrs["global_mean"], expected.mean() + 1e5, rtol=1e-7)
    np.testing.assert_allclose(stored.attrs["global_sd"], expected.std(), rtol=1e-4)
    assert np.isnan(stored["sd"].values[~mask]).all()


def test_the_result_does_not_depend_on_shards_and_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = series(n_volumes=21)
    one = make(tmp_path / "one", data)
    monkeypatch.setattr(nifti, "BLOCK_BYTES", 10**9)
    two = make(tmp_path / "two", data, SETTINGS.model_copy(update={"shard_volumes": 14}))
    assert len(list((one / "bold").glob("c.*"))) == 3
    assert len(list((two / "bold").glob("c.*"))) == 2
    xarray.testing.assert_equal(load(one), load(two))


def test_a_scaled_integer_series_is_decoded(tmp_path: Path) -> None:
    data = series()
    row = write_run(tmp_path, "sub-01", data)
    counts = np.round((data - 500) / 0.5).astype(np.int16)
    write_scan(Path(row["bold"]), counts, affine_8mm(), slope=0.5, inter=500)
    make_volumes(source_of(row), tmp_path / "scaled.zarr", SETTINGS, time_patch=2)
    stored = load(tmp_path / "scaled.zarr")
    mask = stored["mask"].values
    error = stored["bold"].values[:, mask] - on_grid(counts * 0.5 + 500)[:, mask]
    assert np.abs(error).max() < 1


def test_constant_voxels_leave_the_mask_and_others_stay(tmp_path: Path) -> None:
    data = series()
    data[10, :, :, :] = 700.0
    # Still at first, so that the first guess is wrong.
    data[13, :, :, :11] = 700.0
    store = make(tmp_path, data, affine=target_affine(SETTINGS))
    stored = load(store)
    brain = np.zeros(SETTINGS.shape, dtype=bool)
    brain[:20, :, :21] = ball(data.shape[:3])
    constant = brain[10].sum()
    assert stored.attrs["n_constant_voxels"] == constant > 100
    brain[10] = False
    np.testing.assert_array_equal(stored["mask"].values, brain.T)
    np.testing.assert_array_equal(np.isfinite(stored["bold"].values).all(axis=0), brain.T)
    np.testing.assert_array_equal(np.isfinite(stored["bold"].values).any(axis=0), brain.T)
    assert stored.attrs["n_voxels"] == brain.sum()


def test_nan_outside_the_brain_counts_as_zero(tmp_path: Path) -> None:
    data = series()
    data[~ball(data.shape[:3])] = np.nan
    data[0, 0, 0] = np.inf
    stored = load(make(tmp_path, data))
    expected = on_grid(np.where(np.isfinite(data), data, 0))
    mask = stored["mask"].values
    np.testing.assert_allclose(stored["bold"].values[:, mask], expected[:, mask], atol=1)


def test_batches_share_the_runs_out(tmp_path: Path) -> None:
    rows = [write_run(tmp_path, f"sub-{i:02}", series(seed=i)) for i in (1, 2, 3)]
    rows[1]["reason"] = "no mask"
    config = make_config(tmp_path, compute={"batches": 2})
    layout = write_index(config, rows)
    for subject in ("sub-01", "sub-03"):
        batch = batch_of(subject, 2)
        run_volumes(config, "toy", batch)
        assert read_table(layout.manifest("volumes", batch))["run"].tolist() == [subject]


# --- Interruptions and reruns ---------------------------------------------------------------------


def test_a_full_disk_keeps_finished_runs_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [write_run(tmp_path, f"sub-{i:02}", series(seed=i)) for i in (1, 2)]
    config = make_config(tmp_path)
    layout = write_index(config, rows)
    write = ShardWriter.append
    written = 0

    def append_until_full(self: ShardWriter, chunk: np.ndarray) -> None:
        nonlocal written
        if "sub-02" in str(self.layout.path):
            written += 1
            if written == 6:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, chunk)

    monkeypatch.setattr(ShardWriter, "append", append_until_full)
    with pytest.raises(InputError, match=r"disk is full while writing sub-02.*start again"):
        run_volumes(config, "toy", 0)
    folder = layout.array("volumes", "x").parent
    assert [path.name for path in folder.iterdir()] == ["sub-01.zarr"]
    monkeypatch.undo()
    run_volumes(config, "toy", 0)
    assert load(folder / "sub-02.zarr")["bold"].notnull().any()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from neuromamba.config import Volumes
    from neuromamba.shards import ShardWriter
    from neuromamba.volumes import Source, make_volumes

    write = ShardWriter.append

    def append_until_killed(self, chunk):
        if self.layout.shard(1).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, chunk)

    ShardWriter.append = append_until_killed
    bold, mask, target, settings = sys.argv[1:]
    source = Source("sub-01", "sub-01", Path(bold), Path(mask), "MNI152", 2.0, "f")
    make_volumes(source, Path(target), Volumes.model_validate_json(settings), 2)
"""


def test_a_killed_process_leaves_nothing_that_passes_for_a_store(tmp_path: Path) -> None:
    row = write_run(tmp_path, "sub-01", series())
    target = tmp_path / "sub-01.zarr"
    arguments = [row["bold"], row["mask"], str(target), SETTINGS.model_dump_json()]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *arguments]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".tmp-*"))
    assert not target.exists()
    make_volumes(source_of(row), target, SETTINGS, time_patch=2)
    assert load(target).sizes["time"] == 20


def test_a_whole_run_is_skipped_and_remade_when_something_changes(tmp_path: Path) -> None:
    row = write_run(tmp_path, "sub-01", series())
    target = tmp_path / "sub-01.zarr"

    def remade(settings: Volumes = SETTINGS, time_patch: int = 2) -> bool:
        before = (target / "zarr.json").stat().st_ino if target.exists() else None
        facts = make_volumes(source_of(row), target, settings, time_patch)
        stored = load(target)
        assert facts["n_voxels"] == stored["mask"].values.sum()
        assert facts["n_volumes"] == stored.sizes["time"]
        return (target / "zarr.json").stat().st_ino != before

    assert remade()
    assert not remade()
    finer = SETTINGS.model_copy(update={"shape": (28, 28, 28), "voxel_size": 7.0})
    assert remade(finer)
    assert load(target)["bold"].shape == (20, 28, 28, 28)
    assert remade()
    assert remade(time_patch=4)
    write_run(tmp_path, "sub-01", series(seed=5))
    assert remade()
    (target / "zarr.json").write_text("{")
    assert remade()


def test_a_store_of_older_code_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = write_run(tmp_path, "sub-01", series())
    target = tmp_path / "sub-01.zarr"
    make_volumes(source_of(row), target, SETTINGS, 2)
    key = load(target).attrs["key"]
    monkeypatch.setattr(volumes, "code_of", lambda *modules: {"volumes.py": "other"})
    make_volumes(source_of(row), target, SETTINGS, 2)
    assert load(target).attrs["key"] != key


def test_memory_does_not_grow_with_the_number_of_volumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One volume a block, so that both runs are longer than what is read ahead.
    monkeypatch.setattr(nifti, "BLOCK_BYTES", 1)

    def peak(n_volumes: int) -> int:
        row = write_run(tmp_path, f"sub-{n_volumes}", series(n_volumes=n_volumes))
        tracemalloc.start()
        make_volumes(source_of(row), tmp_path / f"{n_volumes}.zarr", SETTINGS, 2)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(20)
    volume_bytes = 20 * 24 * 21 * 4
    # Far less than the 120 volumes between them; garbage of other tests comes and goes.
    assert peak(160) < peak(40) + 60 * volume_bytes


# --- Real scans -----------------------------------------------------------------------------------


def test_a_real_run_equals_nilearn_within_float16(real_data: Path, tmp_path: Path) -> None:
    (bold,) = real_data.glob("derivatives_antsdemo/sub-02/func/*_desc-preproc_bold.nii.gz")
    mask = bold.with_name(bold.name.replace("desc-preproc_bold", "desc-brain_mask"))
    source = Source("sub-02", "sub-02", bold, mask, "MNI152NLin2009cAsym", 2.0, "f")
    # Half a millimetre off the scan's own grid, so that there is something to interpolate.
    settings = Volumes(shape=(95, 95, 95), voxel_size=2.0)
    make_volumes(source, tmp_path / "run.zarr", settings, 2)
    stored = load(tmp_path / "run.zarr")
    image = nibabel.load(bold)
    frames = np.asarray(image.dataobj)[..., [0, 23]].astype(np.float32)
    expected = resample_img(
        nibabel.Nifti1Image(frames, image.affine),
        target_affine(settings),
        settings.shape,
        interpolation="linear",
        force_resample=True,
        copy_header=True,
    ).get_fdata(dtype=np.float32)
    inside = stored["mask"].values
    assert stored.attrs["n_constant_voxels"] > 0
    ours = stored["bold"][[0, 23]].values[:, inside]
    theirs = expected.T[:, inside]
    tolerance = 2**-11 * np.abs(theirs - stored.attrs["global_mean"]).max() * 1.1
    assert np.abs(ours - theirs).max() < tolerance
    # The scan's noise is far above the rounding.
    assert np.median(np.abs(ours - theirs) / stored["sd"].values[inside]) < 0.01
