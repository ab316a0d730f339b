"""T1w images: which one is taken, nilearn's values on the grid, statistics, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import xarray
from nilearn.image import resample_img
from scans import GRID, affine_8mm, ball, make_config, write_index, write_scan

from neuromamba.anat import PERCENTILES, make_anat, run_anat
from neuromamba.anat_scan import Anatomical, find_anatomicals
from neuromamba.config import Config, Dataset, Volumes
from neuromamba.files import InputError, digest_file
from neuromamba.layout import Layout
from neuromamba.resample import target_affine
from neuromamba.tables import read_table

SPACE = "MNI152NLin2009cAsym"
SETTINGS = Volumes(**GRID)
SHAPE = (20, 24, 21)


def head(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(600, 150, size=shape).astype(np.float32)


def add_t1w(
    root: Path,
    entities: str = "sub-01",
    version: str = f"space-{SPACE}",
    data: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    affine: np.ndarray | None = None,
) -> Path:
    """Write a T1w image and its mask where fMRIPrep does; return the image's path."""
    folders = [part for part in entities.split("_") if part.startswith(("sub-", "ses-"))]
    stem = root.joinpath(*folders, "anat", f"{entities}_{version}")
    data = head() if data is None else data
    mask = ball(data.shape[:3]) if mask is None else mask
    affine = affine_8mm() if affine is None else affine
    write_scan(Path(f"{stem}_desc-brain_mask.nii.gz"), mask.astype(np.uint8), affine)
    return write_scan(Path(f"{stem}_desc-preproc_T1w.nii.gz"), data, affine)


def find(root: Path, **settings: Any) -> list[Anatomical]:
    return find_anatomicals(Dataset(derivatives=str(root), **settings))


def make(root: Path, **kwargs: Any) -> xarray.Dataset:
    add_t1w(root, **kwargs)
    make_anat(find(root)[0], root / "sub-01.zarr", SPACE, SETTINGS)
    return xarray.open_zarr(root / "sub-01.zarr").load()


# --- Which image --------------------------------------------------------------------------------


def test_each_subject_has_an_image_or_a_reason(tmp_path: Path) -> None:
    first = add_t1w(tmp_path, "sub-01")
    add_t1w(tmp_path, "sub-01", "desc-other")
    write_scan(tmp_path / "sub-01" / "anat" / "sub-01_desc-preproc_T1w.nii.gz", head(), np.eye(4))
    add_t1w(tmp_path, "sub-02", "space-MNI152NLin6Asym")
    (tmp_path / "sub-03" / "func").mkdir(parents=True)
    (tmp_path / "sub-04.html").write_text("a report")
    found = find(tmp_path)
    assert [one.subject for one in found] == ["sub-01", "sub-02", "sub-03"]
    assert found[0].t1w == str(first)
    assert found[0].mask == str(first).replace("preproc_T1w", "brain_mask")
    assert (found[0].reason, found[0].note, found[0].session) == (None, None, None)
    assert "sub-02_space-MNI152NLin6Asym_desc-preproc_T1w" in str(found[1].reason)
    assert "there is no T1w image" in str(found[2].reason)
    assert found[1].fingerprint == found[2].fingerprint == ""


def test_of_several_sessions_the_first_is_taken_and_said(tmp_path: Path) -> None:
    for session in ("2", "1", "3"):
        add_t1w(tmp_path, f"sub-01_ses-{session}")
    found = find(tmp_path)[0]
    assert found.session == "1"
    assert found.note == "sub-01_ses-1 taken; there are also sub-01_ses-2, sub-01_ses-3"
    asked = find(tmp_path, entities={"session": ["2", "3"], "task": ["rest"]})[0]
    assert asked.session == "2"
    elsewhere = find(tmp_path, entities={"ses": ["followup"]})[0]
    assert elsewhere.session == "1"
    average = add_t1w(tmp_path, "sub-01")
    assert find(tmp_path)[0].t1w == str(average)


def test_the_resolution_is_the_datasets(tmp_path: Path) -> None:
    add_t1w(tmp_path, version=f"space-{SPACE}_res-2")
    add_t1w(tmp_path, version=f"space-{SPACE}_res-1")
    native = add_t1w(tmp_path, version=f"space-{SPACE}")
    assert "choose by resolution" in str(find(tmp_path)[0].reason)
    assert "_res-2_" in str(find(tmp_path, resolution="2")[0].t1w)
    assert "_res-1_" in str(find(tmp_path, resolution="01")[0].t1w)
    assert find(tmp_path, resolution="native")[0].t1w == str(native)
    assert "res-3" in str(find(tmp_path, resolution="3")[0].reason)


def test_what_is_excluded_is_left_out(tmp_path: Path) -> None:
    for session in ("1", "2"):
        add_t1w(tmp_path, f"sub-01_ses-{session}")
    assert find(tmp_path, exclude=["sub-01_ses-1"])[0].session == "2"
    assert find(tmp_path, exclude=["sub-01"])[0].reason
    assert find(tmp_path, exclude=["sub-01_task-rest"])[0].session == "1"


def test_an_image_without_a_mask_has_a_reason(tmp_path: Path) -> None:
    path = add_t1w(tmp_path)
    Path(str(path).replace("preproc_T1w", "brain_mask")).unlink()
    assert "no brain mask" in str(find(tmp_path)[0].reason)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    add_t1w(tmp_path)
    before = find(tmp_path)[0].fingerprint
    assert find(tmp_path)[0].fingerprint == before
    add_t1w(tmp_path, data=head(seed=1))
    after = find(tmp_path)[0].fingerprint
    assert after != before
    add_t1w(tmp_path, data=head(seed=1), mask=np.ones(SHAPE))
    assert find(tmp_path)[0].fingerprint not in (before, after)


def test_file_names_of_their_own_name_no_t1w(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    files = {"bold": "{subject}/bold.nii.gz", "mask": "{subject}/mask.nii.gz"}
    assert "`files`" in str(find(tmp_path, files=files)[0].reason)


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is not a folder"):
        find(tmp_path / "none")


# --- The store ----------------------------------------------------------------------------------


def test_values_are_nilearns_on_the_grid(tmp_path: Path) -> None:
    data = head()
    store = make(tmp_path, data=data)
    image = nibabel.Nifti1Image(data, affine_8mm())
    affine = target_affine(SETTINGS)
    expected = resample_img(
        image, affine, SETTINGS.shape, interpolation="linear", force_resample=True
    ).get_fdata()
    mask = resample_img(
        nibabel.Nifti1Image(ball(SHAPE).astype(np.uint8), affine_8mm()),
        affine,
        SETTINGS.shape,
        interpolation="nearest",
        force_resample=True,
    ).get_fdata()
    brain = store["mask"].values.astype(bool)
    assert store["t1w"].dims == store["mask"].dims == ("z", "y", "x")
    assert (brain == (mask.T > 0)).mean() > 0.999  # voxels halfway between two may differ
    values = store["t1w"].values
    assert (np.isfinite(values) == brain).all()
    assert np.abs(values[brain] - expected.T[brain]).max() < 0.5  # float16, SD 100
    assert store["x"].values[0] == affine[0, 3]
    assert np.asarray(store.attrs["affine"]) == pytest.approx(affine)


def test_a_grid_that_coincides_is_copied(tmp_path: Path) -> None:
    affine = target_affine(SETTINGS)
    data = np.round(head(shape=SETTINGS.shape))
    store = make(tmp_path, data=data, affine=affine)
    brain = store["mask"].values.astype(bool)
    assert (brain == ball(SETTINGS.shape).T).all()
    assert np.abs(store["t1w"].values - data.T)[brain].max() < 0.3


def test_statistics_are_those_of_the_brain(tmp_path: Path) -> None:
    data = head()
    data[~ball(SHAPE)] = 1e6  # a bright scalp changes nothing
    store = make(tmp_path, data=data, affine=target_affine(SETTINGS))
    values = store["t1w"].values[store["mask"].values.astype(bool)]
    assert values.max() < 2000
    attrs = store.attrs
    assert attrs["mean"] == pytest.approx(values.mean(), rel=1e-3)
    assert attrs["sd"] == pytest.approx(values.std(), rel=1e-3)
    assert attrs["n_voxels"] == len(values)
    assert [float(q) for q in attrs["percentiles"]] == list(PERCENTILES)
    expected = np.percentile(values, PERCENTILES)
    assert list(attrs["percentiles"].values()) == pytest.approx(expected, rel=1e-2)


def test_the_source_is_recorded(tmp_path: Path) -> None:
    attrs = make(tmp_path).attrs
    assert attrs["source_sha256"] == digest_file(attrs["source"])
    assert attrs["mask_sha256"] == digest_file(attrs["mask_source"])
    assert (attrs["subject"], attrs["space"]) == ("sub-01", SPACE)
    assert attrs["neuromamba_version"]


def test_scaled_integers_come_in_their_own_units(tmp_path: Path) -> None:
    stored = np.round(head()).astype(np.int16)
    path = add_t1w(tmp_path, data=stored)
    write_scan(path, stored, affine_8mm(), slope=0.5, inter=10)
    make_anat(find(tmp_path)[0], tmp_path / "a.zarr", SPACE, SETTINGS)
    attrs = xarray.open_zarr(tmp_path / "a.zarr").attrs
    assert attrs["mean"] == pytest.approx(0.5 * 600 + 10, rel=0.02)


@pytest.mark.parametrize("problem", ["truncated", "series", "nan", "constant", "mask", "text"])
def test_an_unusable_image_is_refused_and_leaves_nothing(tmp_path: Path, problem: str) -> None:
    data, mask = head(), ball(SHAPE)
    if problem == "nan":
        data[10, 12, 10] = np.nan
    if problem == "constant":
        data[mask] = 700
        data[:] = 700
    if problem == "series":
        data = np.stack([data, data], axis=-1)
    if problem == "mask":
        mask = np.zeros(SHAPE)
    path = add_t1w(tmp_path, data=data, mask=mask)
    if problem == "truncated":
        path.write_bytes(path.read_bytes()[:-2000])
    if problem == "text":
        path.write_text("not an image")
    words = {
        "truncated": "is truncated",
        "series": "series of 2 volumes",
        "nan": "NaN or infinite",
        "constant": "same everywhere",
        "mask": "mask is empty",
        "text": "is not gzip",
    }
    with pytest.raises(InputError, match=words[problem]):
        make_anat(find(tmp_path)[0], tmp_path / "a.zarr", SPACE, SETTINGS)
    assert not list(tmp_path.glob("*a.zarr"))


def test_a_finished_image_is_kept_until_its_source_changes(tmp_path: Path) -> None:
    add_t1w(tmp_path)
    target = tmp_path / "a.zarr"
    first = make_anat(find(tmp_path)[0], target, SPACE, SETTINGS)
    made = target.stat().st_ino
    assert make_anat(find(tmp_path)[0], target, SPACE, SETTINGS) == first
    assert target.stat().st_ino == made
    add_t1w(tmp_path, data=head(seed=1))
    assert make_anat(find(tmp_path)[0], target, SPACE, SETTINGS)["key"] != first["key"]
    assert target.stat().st_ino != made
    coarse = Volumes(**{**GRID, "voxel_size": 9.0})
    assert make_anat(find(tmp_path)[0], target, SPACE, coarse)["n_voxels"] != first["n_voxels"]


# --- The stage ----------------------------------------------------------------------------------


def index(config: Config, runs: dict[str, str | None]) -> Layout:
    rows = [
        {"run": run, "subject": run.split("_")[0], "reason": reason} for run, reason in runs.items()
    ]
    return write_index(config, rows)


def test_a_batch_makes_one_image_a_subject(tmp_path: Path) -> None:
    config = make_config(tmp_path, compute={"max_excluded": 0.5})
    layout = index(
        config,
        {
            "sub-01_task-a": None,
            "sub-01_task-b": None,
            "sub-02_task-a": None,
            "sub-03_task-a": "no brain mask",
        },
    )
    add_t1w(tmp_path, "sub-01_ses-1")
    add_t1w(tmp_path, "sub-01_ses-2")
    (tmp_path / "sub-02").mkdir()
    add_t1w(tmp_path, "sub-03")
    run_anat(config, "toy", 0)
    manifest = read_table(layout.manifest("anat", 0), dtype=str).set_index("run")
    assert list(manifest.index) == ["sub-01", "sub-02"]  # nothing needs sub-03
    assert pd.isna(manifest.loc["sub-01", "reason"])
    assert "sub-01_ses-2" in manifest.loc["sub-01", "note"]
    assert "no T1w image" in manifest.loc["sub-02", "reason"]
    assert len(manifest.loc["sub-01", "sha256"]) == 64
    assert layout.array("anat", "sub-01").is_dir()
    assert not layout.array("anat", "sub-03").exists()


def test_batches_share_the_subjects(tmp_path: Path) -> None:
    config = make_config(tmp_path, compute={"batches": 3})
    names = [f"sub-{k:02}" for k in range(6)]
    layout = index(config, {f"{name}_task-a": None for name in names})
    for name in names:
        add_t1w(tmp_path, name)
    made = []
    for batch in range(3):
        run_anat(config, "toy", batch)
        made += read_table(layout.manifest("anat", batch))["run"].tolist()
    assert sorted(made) == names


def test_too_many_subjects_without_an_image_fail_the_stage(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    index(config, {"sub-01_task-a": None})
    with pytest.raises(InputError, match="has no folder sub-01"):
        run_anat(config, "toy", 0)


def test_a_real_head_on_the_full_grid(tmp_path: Path, real_data: Path) -> None:
    # A raw image of another orientation and voxel size, with a mask by brightness; its place is not
    # that of any template, which the resampling does not ask.
    raw = real_data / "studyforrest_sub02_bids" / "sub-02" / "anat" / "sub-02_T1w.nii.gz"
    data = nibabel.load(raw).get_fdata(dtype=np.float32)
    image = nibabel.Nifti1Image(data, nibabel.load(raw).affine)
    add_t1w(tmp_path, data=data, mask=data > np.percentile(data, 75), affine=image.affine)
    grid = Volumes()
    facts = make_anat(find(tmp_path)[0], tmp_path / "a.zarr", SPACE, grid)
    store = xarray.open_zarr(tmp_path / "a.zarr").load()
    brain = store["mask"].values.astype(bool)
    expected = resample_img(
        image, target_affine(grid), grid.shape, interpolation="linear", force_resample=True
    ).get_fdata(dtype=np.float32)
    assert brain.sum() == facts["n_voxels"] > 50_000
    error = store["t1w"].values[brain] - expected.T[brain]
    assert np.abs(error).max() < 2e-3 * expected.max()
