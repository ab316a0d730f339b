"""Fingerprints of scans: any other content shows, dates and places do not."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fake_bids import add_run

from neuromamba.config import Dataset
from neuromamba.data_manifest import write_manifest
from neuromamba.files import InputError, read_json
from neuromamba.listing import list_runs_of
from neuromamba.tables import read_table


def prints(folder: Path) -> list[str]:
    return list(list_runs_of(Dataset(derivatives=str(folder)))["fingerprint"])


def test_any_other_content_of_the_same_size_shows_and_dates_and_places_do_not(tmp_path: Path):
    folder = tmp_path / "d"
    for name in ("sub-01_task-rest", "sub-02_task-rest"):
        add_run(folder, name)
    before = prints(folder)
    (bold,) = folder.rglob("sub-02*_desc-preproc_bold.nii.gz")
    os.utime(bold, (0, 0))
    assert prints(folder) == before
    shutil.copytree(folder, tmp_path / "copy")
    assert prints(tmp_path / "copy") == before
    # Stored, not compressed, so that one byte in the midst changes no length.
    content = bytearray(gzip.decompress(bold.read_bytes()))
    bold.write_bytes(gzip.compress(bytes(content), compresslevel=0, mtime=0))
    stored = prints(folder)
    size = bold.stat().st_size
    content[len(content) // 3] ^= 1
    bold.write_bytes(gzip.compress(bytes(content), compresslevel=0, mtime=0))
    assert bold.stat().st_size == size
    assert [a == b for a, b in zip(stored, prints(folder), strict=True)] == [True, False]


@pytest.mark.parametrize("name", ["*_desc-brain_mask.nii.gz", "*_bold.json"])
def test_mask_and_sidecar_count(tmp_path: Path, name: str):
    add_run(tmp_path, "sub-01_task-rest")
    before = prints(tmp_path)
    (path,) = tmp_path.rglob(name)
    path.write_bytes(bytes(np.arange(50, dtype=np.uint8)))
    assert prints(tmp_path) != before


def test_a_file_that_cannot_be_read_is_left_to_the_index(tmp_path: Path):
    add_run(tmp_path, "sub-01_task-rest")
    (bold,) = tmp_path.rglob("*_bold.nii.gz")
    bold.unlink()
    bold.symlink_to(tmp_path / "not-fetched")
    assert len(prints(tmp_path)) == 1


def test_a_manifest_is_for_scans_that_dvc_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    add_run(tmp_path / "elsewhere", "sub-01_task-rest")
    path = write_manifest(Dataset(derivatives=str(tmp_path / "elsewhere")), "large")
    assert path == Path("data/large/manifest.tsv")
    assert list(read_table(path)["run"]) == ["sub-01_task-rest"]
    assert read_json(path.with_name("outside.json")) == {"participants": None, "atlas": None}
    add_run(tmp_path / "data" / "small", "sub-01_task-rest")
    with pytest.raises(InputError, match="dvc add data/small"):
        write_manifest(Dataset(derivatives="data/small"), "small")


def test_what_the_confounds_are_is_part_of_the_fingerprint(tmp_path: Path):
    """It decides which of them are taken out of the signal."""
    bold = add_run(tmp_path, "sub-01_task-rest")
    dataset = Dataset(derivatives=str(tmp_path))
    before = list_runs_of(dataset)["fingerprint"][0]
    beside = bold.with_name("sub-01_task-rest_desc-confounds_timeseries.json")
    beside.write_text('{"a_comp_cor_00": {"Retained": true}}')
    described = list_runs_of(dataset)["fingerprint"][0]
    beside.write_text('{"a_comp_cor_00": {"Retained": false}}')
    assert len({before, described, list_runs_of(dataset)["fingerprint"][0]}) == 3
