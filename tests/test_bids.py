"""What the index says of each run, and when it refuses."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from fake_bids import SPACE, add_run

from neuromamba.bids import INDEX_COLUMNS, index_runs, run_index
from neuromamba.config import Dataset, build_config
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.participants import check_participants
from neuromamba.tables import read_table


def reason_of(root: Path, **settings: Any) -> str:
    """The reason of the only run that cannot be used."""
    table = index_runs(Dataset(derivatives=str(root), **settings))
    (reason,) = table["reason"].dropna()
    return reason


# --- Repetition time ----------------------------------------------------------------------------


def test_the_repetition_time_comes_from_the_nearest_sidecar(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-01_task-rest", sidecar={})
    (tmp_path / "task-nback_bold.json").write_text('{"RepetitionTime": 9}')
    settings = Dataset(derivatives=str(tmp_path), repetition_time=3.0)
    assert list(index_runs(settings)["repetition_time"]) == [3.0]
    (tmp_path / "task-rest_bold.json").write_text('{"RepetitionTime": 2.5}')
    assert list(index_runs(settings)["repetition_time"]) == [2.5]
    (tmp_path / "sub-01" / "sub-01_bold.json").write_text('{"RepetitionTime": 2.2}')
    assert list(index_runs(settings)["repetition_time"]) == [2.2]


def test_no_repetition_time_at_all(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-01_task-rest", sidecar={"TaskName": "rest"})
    assert "missing TR" in reason_of(tmp_path)
    assert "set repetition_time in the dataset YAML" in reason_of(tmp_path)
    assert "(the NIfTI header says 1.5 s)" in reason_of(tmp_path)


@pytest.mark.parametrize("value", [2000, 0, -1, "2", None, True])
def test_a_repetition_time_that_cannot_be(tmp_path: Path, value: Any) -> None:
    add_run(tmp_path, "sub-01_task-rest", sidecar={"RepetitionTime": value})
    assert "must be seconds" in reason_of(tmp_path)


def test_a_broken_sidecar(tmp_path: Path) -> None:
    bold = add_run(tmp_path, "sub-01_task-rest")
    bold.with_name(bold.name.replace(".nii.gz", ".json")).write_text("{")
    assert "desc-preproc_bold.json is not valid JSON" in reason_of(tmp_path)


# --- Runs that cannot be used -------------------------------------------------------------------


def test_a_bad_run_does_not_stop_the_others(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-01_task-rest")
    add_run(tmp_path, "sub-02_task-rest", shape=(4, 4, 4))
    table = index_runs(Dataset(derivatives=str(tmp_path))).set_index("run")
    assert pd.isna(table.loc["sub-01_task-rest", "reason"])
    assert "is 3D (shape (4, 4, 4))" in table.loc["sub-02_task-rest", "reason"]


def test_one_volume_is_no_series_and_five_dimensions_are_no_bold(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-01_task-rest", shape=(4, 4, 4, 1))
    assert "is 3D" in reason_of(tmp_path)
    add_run(tmp_path, "sub-01_task-rest", shape=(4, 4, 4, 1, 5))
    assert "is 3D" in reason_of(tmp_path)
    add_run(tmp_path, "sub-01_task-rest", shape=(4, 4, 4, 2, 5))
    assert "has 5 dimensions" in reason_of(tmp_path)


def test_no_mask(tmp_path: Path) -> None:
    bold = add_run(tmp_path, "sub-01_task-rest")
    mask = bold.with_name(bold.name.replace("preproc_bold", "brain_mask"))
    mask.unlink()
    assert f"no brain mask: {mask} does not exist" in reason_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no readable NIfTI header (0 bytes"),
        (gzip.compress(b"\x5c\x01\x00\x00" + bytes(90)), "no readable NIfTI header (94 bytes"),
        (gzip.compress(bytes(5000)), "no readable NIfTI header"),
        (b"not gzip at all" * 100, "damaged or not gzip"),
    ],
    ids=["empty", "truncated", "zeros", "not gzip"],
)
def test_a_header_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    bold = add_run(tmp_path, "sub-01_task-rest")
    bold.write_bytes(content)
    assert message in reason_of(tmp_path)
    assert str(bold) in reason_of(tmp_path)


def test_content_that_was_not_fetched(tmp_path: Path) -> None:
    bold = add_run(tmp_path, "sub-01_task-rest")
    bold.unlink()
    bold.symlink_to(tmp_path / "annex" / "object")
    assert "datalad get" in reason_of(tmp_path)


def test_nifti_2_and_the_other_byte_order_are_read(tmp_path: Path) -> None:
    for i, kind in enumerate((nib.Nifti2Image, nib.Nifti1Image)):
        bold = add_run(tmp_path, f"sub-0{i}_task-rest")
        image = kind(np.zeros((4, 4, 4, 30), ">i2"), np.eye(4), nib.Nifti1Header(endianness=">"))
        nib.save(image, bold)
    assert list(index_runs(Dataset(derivatives=str(tmp_path)))["n_volumes"]) == [30, 30]


def test_two_files_for_one_run(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-01_task-rest", f"space-{SPACE}_res-1")
    add_run(tmp_path, "sub-01_task-rest", f"space-{SPACE}_res-2")
    add_run(tmp_path, "sub-02_task-rest", f"space-{SPACE}_res-2")
    table = index_runs(Dataset(derivatives=str(tmp_path)))
    assert list(table["run"]) == ["sub-01_task-rest", "sub-02_task-rest"]
    assert "duplicate run: 2 files" in reason_of(tmp_path)
    assert index_runs(Dataset(derivatives=str(tmp_path), resolution="2"))["reason"].isna().all()


# --- The stage ----------------------------------------------------------------------------------


def with_table(tmp_path: Path, rows: str) -> Dataset:
    file = tmp_path / "participants.tsv"
    file.write_text(f"participant_id\tage\n{rows}")
    return Dataset(
        derivatives=str(tmp_path),
        participants={"file": str(file)},
        targets={"age": {"kind": "regression", "column": "age"}},
    )


def config_of(tmp_path: Path, dataset: Dataset) -> Any:
    raw = {
        "results": str(tmp_path / "results"),
        "datasets": {"d": dataset.model_dump()},
        "models": {"m": {"family": "neuromamba"}},
    }
    return build_config(raw, tmp_path, "test")


def test_the_index_on_disk(tmp_path: Path) -> None:
    for i in range(1, 7):
        add_run(tmp_path, f"sub-0{i}_task-rest", shape=(4, 4, 4) if i == 6 else (4, 4, 4, 30))
    rows = "".join(f"sub-0{i}\t{i}\n" for i in range(1, 6))
    config = config_of(tmp_path, with_table(tmp_path, rows))
    subjects = run_index(config, "d")
    with pytest.warns(UserWarning, match="no row for 1 of 6 subjects: sub-06"):
        check_participants(config.datasets["d"], subjects)
    table = read_table(Layout(tmp_path / "results", "d").index, dtype=str)
    assert list(table.columns) == INDEX_COLUMNS
    assert list(table["reason"].isna()) == [True] * 5 + [False]
    assert list(table["n_volumes"][:5]) == ["30"] * 5
    whole, part = (Layout(tmp_path / "results", "d").root / name for name in ("index.tsv", "index"))
    assert (part / "batch-0.tsv").read_text() == whole.read_text()


def test_too_many_bad_runs_stop_the_stage(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-01_task-rest")
    add_run(tmp_path, "sub-02_task-rest", shape=(4, 4, 4))
    config = config_of(tmp_path, Dataset(derivatives=str(tmp_path)))
    with pytest.raises(InputError, match="1 of 2 runs cannot be used"):
        run_index(config, "d")
    assert not Layout(tmp_path / "results", "d").index.exists()


def test_a_table_about_other_subjects_is_refused(tmp_path: Path) -> None:
    add_run(tmp_path, "sub-0050649_task-rest")
    dataset = with_table(tmp_path, "50649\t1\n")
    with pytest.raises(InputError, match=r"a row for none of the 1 subjects.*leading zeros"):
        check_participants(dataset, run_index(config_of(tmp_path, dataset), "d"))


def test_real_derivatives(real_data: Path) -> None:
    table = index_runs(Dataset(derivatives=str(real_data / "derivatives_antsdemo")))
    (row,) = table.to_dict("records")
    assert row["run"] == "sub-02_task-oneback_run-1"
    assert (row["repetition_time"], row["n_volumes"]) == (2.0, 24)
    assert pd.isna(row["reason"])
    assert pd.isna(row["confounds"])
