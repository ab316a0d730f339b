"""Which runs of a folder are found, and what they are called."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_bids import SPACE, add_run, write_bold

from neuromamba.bids import INDEX_COLUMNS, index_runs
from neuromamba.config import Dataset
from neuromamba.files import InputError


def test_a_good_folder(tmp_path: Path) -> None:
    bold = add_run(tmp_path, "sub-02_ses-b_task-rest_dir-AP_run-1")
    add_run(tmp_path, "sub-01_task-rest")
    add_run(tmp_path, "sub-01_task-rest", "space-T1w")
    table = index_runs(Dataset(derivatives=str(tmp_path)))
    assert list(table.columns) == INDEX_COLUMNS
    assert list(table["run"]) == ["sub-01_task-rest", "sub-02_ses-b_task-rest_dir-AP_run-1"]
    assert table["reason"].isna().all()
    row = table.iloc[1]
    assert (row["subject"], row["session"], row["task"]) == ("sub-02", "b", "rest")
    assert row["bold"] == str(bold)
    assert Path(row["mask"]).exists()
    assert row["confounds"].endswith("dir-AP_run-1_desc-confounds_timeseries.tsv")
    assert (row["repetition_time"], row["n_volumes"]) == (2.0, 30)
    assert pd.isna(table.iloc[0]["session"])


def test_entities_stand_in_bids_order_whatever_order_the_file_has(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-01_run-1_echo-2_task-rest_part-mag_acq-x")
    table = index_runs(Dataset(derivatives=str(tmp_path)))
    assert list(table["run"]) == ["sub-01_task-rest_acq-x_run-1_echo-2_part-mag"]


def test_filters_by_entity_resolution_and_exclusion(tmp_path: Path) -> None:
    for entities in ("sub-01_task-rest_run-1", "sub-01_task-rest_run-2", "sub-02_task-rest_run-1"):
        add_run(tmp_path, entities, f"space-{SPACE}_res-2")
    add_run(tmp_path, "sub-01_task-nback", f"space-{SPACE}")

    def names(**settings: Any) -> list[str]:
        return list(index_runs(Dataset(derivatives=str(tmp_path), **settings))["run"])

    assert len(names()) == 4
    assert names(resolution="native") == ["sub-01_task-nback"]
    assert len(names(resolution="02")) == 3
    assert names(entities={"task": ["nback"]}) == ["sub-01_task-nback"]
    assert names(exclude=["01"]) == names(exclude=["sub-01"]) == ["sub-02_task-rest_run-1"]
    assert len(names(exclude=["sub-01_task-rest_run-1"])) == 3
    with pytest.warns(UserWarning, match=r"exclude names sub-03"):
        assert len(names(exclude=["sub-03"])) == 4
    with pytest.raises(InputError, match="exclude in the dataset YAML leaves no run"):
        names(exclude=["01", "02"])


def test_the_confounds_of_old_fmriprep_and_of_another_echo(tmp_path: Path) -> None:
    bold = add_run(tmp_path, "sub-01_task-rest_echo-1")
    (bold.parent / "sub-01_task-rest_echo-1_desc-confounds_timeseries.tsv").rename(
        bold.parent / "sub-01_task-rest_desc-confounds_regressors.tsv"
    )
    (found,) = index_runs(Dataset(derivatives=str(tmp_path)))["confounds"]
    assert found.endswith("sub-01_task-rest_desc-confounds_regressors.tsv")


def test_files_that_are_not_named_by_bids(tmp_path: Path) -> None:
    results = tmp_path / "100307" / "MNINonLinear" / "Results"
    for scan in ("rfMRI_REST1_LR", "rfMRI_REST1_RL", "tfMRI_WM_LR"):
        write_bold(results / scan / f"{scan}_hp2000_clean.nii.gz")
        (results / scan / "brainmask_fs.2.nii.gz").touch()
    folder = "{subject}/MNINonLinear/Results/rfMRI_{task}_{direction}/"
    files = {
        "bold": folder + "rfMRI_{task}_{direction}_hp2000_clean.nii.gz",
        "mask": folder + "brainmask_fs.2.nii.gz",
    }
    settings = {"derivatives": str(tmp_path), "files": files, "repetition_time": 0.72}
    table = index_runs(Dataset(**settings))
    assert list(table["run"]) == [
        "sub-100307_task-REST1_dir-LR",
        "sub-100307_task-REST1_dir-RL",
    ]
    assert list(table["subject"]) == ["sub-100307"] * 2
    assert list(table["repetition_time"]) == [0.72] * 2
    assert table["reason"].isna().all()
    table = index_runs(Dataset(**settings, entities={"direction": ["RL"]}))
    assert list(table["run"]) == ["sub-100307_task-REST1_dir-RL"]


def test_labels_that_bids_does_not_allow_are_cleaned(tmp_path: Path) -> None:
    write_bold(tmp_path / "func" / "UM_1_0050272_func.nii.gz")
    write_bold(tmp_path / "mask.nii.gz", (4, 4, 4))
    files = {"bold": r"func/{site,[^/]+}_{subject,\d+}_func.nii.gz", "mask": "mask.nii.gz"}
    dataset = Dataset(derivatives=str(tmp_path), files=files, repetition_time=2)
    assert list(index_runs(dataset)["run"]) == ["sub-0050272_site-UM1"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"bold": "{task}.nii.gz", "mask": "m"}, r"must have the placeholder \{subject\}"),
        ({"bold": "{subject}.nii.gz", "mask": "{session}_m"}, "placeholders that files.bold has"),
        ({"bold": "{subject,[}.nii.gz", "mask": "m"}, "not a valid pattern"),
    ],
)
def test_wrong_patterns(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        index_runs(Dataset(derivatives=str(tmp_path), files=files))


def test_ten_thousand_subjects_take_seconds(tmp_path: Path) -> None:
    first = add_run(tmp_path, "sub-00000_task-rest")
    contents = {path.name: path for path in first.parent.iterdir()}
    for i in range(1, 1000):
        folder = tmp_path / f"sub-{i:05d}" / "func"
        folder.mkdir(parents=True)
        for name, path in contents.items():
            os.link(path, folder / name.replace("00000", f"{i:05d}"))
    start = time.perf_counter()
    table = index_runs(Dataset(derivatives=str(tmp_path)))
    assert len(table) == 1000
    assert time.perf_counter() - start < 3.0  # a tenth of the cohort; 0.2 s on an idle core


def test_an_empty_dataset_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere is not a folder; set derivatives"):
        index_runs(Dataset(derivatives=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match="no file of that form is there; check derivatives"):
        index_runs(Dataset(derivatives=str(tmp_path)))
    add_run(tmp_path, "sub-01_task-rest", "space-MNI152NLin6Asym_res-2")
    with pytest.raises(InputError) as error:
        index_runs(Dataset(derivatives=str(tmp_path), resolution="1", entities={"task": ["nback"]}))
    message = str(error.value)
    assert str(tmp_path) in message
    assert f"space-{SPACE} res-1, task in ['nback']" in message
    assert "space-MNI152NLin6Asym res-2 task-rest (1 files)" in message
