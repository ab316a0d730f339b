"""What is measured of a run: against plain NumPy, planted faults, and a scan that is moved."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import xarray
from fabricate import GRID, VOXEL, ball, write_volumes

from neuromamba import qc_metrics
from neuromamba.qc_metrics import (
    Motion,
    find_spikes,
    image_metrics,
    motion_metrics,
    read_course,
    read_images,
    read_motion,
)
from neuromamba.qc_template import Template, overlap, registration_score, template_on

SHAPE = (48, 48, 48)


def affine_4mm() -> np.ndarray:
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = [-93.5, -111.5, -89.5]
    return affine


@pytest.fixture(scope="module")
def template() -> Template:
    return template_on(SHAPE, affine_4mm())


def epi_of(template: Template, seed: int = 0) -> np.ndarray:
    """A mean EPI that is bright in CSF and dark in white matter, under a field that drifts."""
    rng = np.random.default_rng(seed)
    fluid = np.clip(1 - template.gray - template.white, 0, 1)
    tissue = 0.9 * fluid + 0.6 * template.gray + 0.4 * template.white
    x = np.linspace(0.4, 1.6, SHAPE[0])
    noise = 1 + 0.1 * rng.standard_normal(tissue.shape)
    return np.where(template.brain, 1000 * tissue * x[:, None, None] * noise, np.nan)


def moved(image: np.ndarray, axis: int, voxels: int) -> np.ndarray:
    return np.roll(image, voxels, axis=axis)


# --- The registration score ---------------------------------------------------------------------


def test_a_misplaced_brain_scores_far_lower(template: Template) -> None:
    mean, mask = epi_of(template), template.brain
    aligned = registration_score(mean, mask, template, 4.0)
    assert aligned > 0.7
    for axis in range(3):
        off = registration_score(moved(mean, axis, 2), moved(mask, axis, 2), template, 4.0)
        assert off < 0.5 * aligned
    assert registration_score(mean[:, ::-1], mask[:, ::-1], template, 4.0) < 0.5 * aligned


def test_the_score_does_not_depend_on_contrast_or_scale(template: Template) -> None:
    mean, mask = epi_of(template), template.brain
    aligned = registration_score(mean, mask, template, 4.0)
    inverted = registration_score(5000 - 3 * mean, mask, template, 4.0)
    assert inverted == pytest.approx(aligned, abs=1e-3)


def test_noise_has_a_score_near_zero(template: Template) -> None:
    noise = np.random.default_rng(0).standard_normal(template.brain.shape)
    assert registration_score(noise, template.brain, template, 4.0) < 0.05


def test_no_overlap_and_no_contrast_score_zero(template: Template) -> None:
    mean = epi_of(template)
    outside = np.zeros_like(template.brain)
    outside[:2] = True
    assert registration_score(mean, outside, template, 4.0) == 0
    assert registration_score(np.ones_like(mean), template.brain, template, 4.0) == 0


def test_a_real_scan_scores_lower_when_moved_or_mirrored(real_data: Path) -> None:
    folder = real_data / "derivatives_antsdemo" / "sub-02" / "func"
    stem = "sub-02_task-oneback_run-1_space-MNI152NLin2009cAsym_res-2_desc-"
    image = nibabel.load(folder / f"{stem}preproc_bold.nii.gz")
    mask = np.asarray(nibabel.load(folder / f"{stem}brain_mask.nii.gz").dataobj).T > 0
    mean = np.asarray(image.dataobj, dtype=np.float32).mean(axis=-1).T
    template = template_on(mean.T.shape, image.affine)
    aligned = registration_score(mean, mask, template, 2.0)
    assert aligned > 0.25
    for axis in range(3):
        eight_mm = registration_score(moved(mean, axis, 4), moved(mask, axis, 4), template, 2.0)
        assert eight_mm < 0.5 * aligned
    assert registration_score(mean[:, ::-1], mask[:, ::-1], template, 2.0) < 0.5 * aligned
    assert overlap(mask, template)["coverage"] > 0.85


def test_coverage_and_dice_count_voxels(template: Template) -> None:
    brain = template.brain
    assert overlap(brain, template) == {"coverage": 1.0, "dice": 1.0}
    half = brain.copy()
    half[len(half) // 2 :] = False
    kept = half.sum() / brain.sum()
    assert overlap(half, template)["coverage"] == pytest.approx(kept)
    assert overlap(half, template)["dice"] == pytest.approx(2 * kept / (1 + kept))


# --- Over time ----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A volumes store, with its values (time, z, y, x) as they come back from it, and its mask."""
    rng = np.random.default_rng(1)
    mask = ball()
    bold = 1000 + 20 * rng.standard_normal((20, *GRID[::-1]))
    bold[10] += 100
    path = tmp_path / "sub-1_task-rest.zarr"
    write_volumes(path, "sub-1_task-rest", bold, mask)
    with xarray.open_zarr(path, chunks=None, mask_and_scale=False) as stored:
        code = stored["bold"].attrs
        values = stored["bold"].values.astype(float) * code["scale_factor"] + code["add_offset"]
    return path, values, mask


def coarse(mask: np.ndarray) -> Template:
    affine = np.diag([VOXEL] * 3 + [1.0])
    affine[:3, 3] = -VOXEL * (np.array(mask.T.shape) - 1) / 2
    return template_on(mask.T.shape, affine)


def open_store(path: Path) -> xarray.Dataset:
    return xarray.open_zarr(path, chunks=None, mask_and_scale=False)


def test_courses_are_those_of_the_whole_array(run, monkeypatch: pytest.MonkeyPatch) -> None:
    path, bold, mask = run
    monkeypatch.setattr(qc_metrics, "READ_VOLUMES", 3)  # blocks that end where no shard does
    course = read_course(open_store(path), mask, coarse(mask))
    brain = bold[:, mask]
    np.testing.assert_allclose(course.global_signal, brain.mean(axis=1), rtol=1e-5)
    expected = np.sqrt(np.mean(np.diff(brain, axis=0) ** 2, axis=1))
    np.testing.assert_allclose(course.dvars[1:], expected, rtol=1e-4)
    assert np.isnan(course.dvars[0])
    z = (brain - brain.mean(axis=0)) / brain.std(axis=0)
    assert course.carpet.shape == (mask.sum(), 20)
    np.testing.assert_allclose(np.sort(course.carpet[:, 4]), np.sort(z[4]), atol=1e-3)
    assert (np.diff(course.tissue) >= 0).all()


def test_a_sudden_change_is_two_spikes_and_a_gap_is_none(run) -> None:
    path, _, mask = run
    volumes = open_store(path)
    course = read_course(volumes, mask, coarse(mask))
    assert np.flatnonzero(find_spikes(course.dvars)).tolist() == [10, 11]
    late = volumes["time"].values + np.where(np.arange(20) >= 10, 60.0, 0.0)
    gap = read_course(volumes.assign_coords(time=late), mask, coarse(mask))
    assert np.flatnonzero(np.isnan(gap.dvars)).tolist() == [0, 10]


def test_images_give_tsnr_and_percentages(run) -> None:
    path, bold, mask = run
    volumes = open_store(path)
    images, template = read_images(volumes), coarse(mask)
    found = image_metrics(images, read_course(volumes, mask, template), template)
    brain = bold[:, mask]
    assert found["tsnr"] == pytest.approx(np.median(brain.mean(0) / brain.std(0)), rel=1e-2)
    assert found["temporal_sd"] == pytest.approx(
        100 * np.median(brain.std(0)) / brain.mean(), rel=1e-2
    )
    assert found["global_sd"] == pytest.approx(
        100 * brain.mean(axis=1).std() / brain.mean(), rel=1e-2
    )
    assert found["n_spikes"] == 2


def test_missing_volumes_are_noticed(run) -> None:
    path, _, mask = run
    shards = sorted((path / "bold").rglob("[0-9]*")) or sorted((path / "bold" / "c").rglob("*"))
    next(shard for shard in shards if shard.is_file()).unlink()
    with pytest.raises(ValueError, match="missing"):
        read_course(open_store(path), mask, coarse(mask))


# --- Motion -------------------------------------------------------------------------------------


def write_confounds(path: Path, fd: list[float], **columns: list[float]) -> str:
    table = pd.DataFrame({"framewise_displacement": fd, **columns})
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return str(path)


def test_motion_is_counted_over_the_threshold(tmp_path: Path) -> None:
    path = write_confounds(
        tmp_path / "c.tsv", [np.nan, 0.1, 0.9, 0.5, 0.3], std_dvars=[np.nan, 1, 1.4, 1, 1]
    )
    found = motion_metrics(read_motion(path, 5), 0.5, repetition_time=30, minutes=2.5)
    assert found == pytest.approx(
        {
            "mean_fd": 0.45,
            "median_fd": 0.4,
            "max_fd": 0.9,
            "high_motion": 0.2,
            "minutes_low_motion": 2.0,
            "std_dvars": 1.1,
        }
    )


def test_scrubbed_runs_have_no_more_time_than_they_hold(tmp_path: Path) -> None:
    motion = read_motion(write_confounds(tmp_path / "c.tsv", [0.1] * 10), 10)
    assert motion_metrics(motion, 0.5, 60, minutes=4.0)["minutes_low_motion"] == 4.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("framewise_displacement\n0.1\n0.2\n", "2 rows where the scan has 3 volumes"),
        ("trans_x\n0\n0\n0\n", "no column framewise_displacement"),
        ("framewise_displacement\nn/a\nn/a\nn/a\n", "no number"),
        ("", "not a readable table"),
    ],
)
def test_unknown_motion_is_missing_and_says_why(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "confounds.tsv"
    path.write_text(text)
    motion = read_motion(str(path), 3)
    assert motion.fd is None
    assert words in motion.note
    assert all(np.isnan(value) for value in motion_metrics(motion, 0.5, 2, 1).values())


def test_no_confounds_are_not_no_motion(tmp_path: Path) -> None:
    assert read_motion(None, 3) == Motion(note="the run has no confounds")
    assert "does not exist" in read_motion(str(tmp_path / "gone.tsv"), 3).note
