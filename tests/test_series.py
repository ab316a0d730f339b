"""Tables of ROI series: which are found, what the index tells of them, how they are read."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray
from fake_series import REGIONS, add_series, make_series

from neuromamba.bids import index_runs
from neuromamba.bids_scan import find_runs
from neuromamba.config import Dataset, Rois
from neuromamba.files import InputError
from neuromamba.listing import fingerprint
from neuromamba.series_rois import make_series as make_store
from neuromamba.series_scan import find_series
from neuromamba.series_table import glimpse_table, read_table_of_series

STAGES = ("index", "rois", "excluded", "splits", "baselines")


def dataset_at(root: Path, **settings: Any) -> Dataset:
    return Dataset.model_validate({"derivatives": str(root), "series": {}, **settings})


def reason_of(root: Path, **settings: Any) -> str:
    """The reason of the only run that cannot be used."""
    (reason,) = index_runs(dataset_at(root, **settings))["reason"].dropna()
    return reason


# --- Which tables ---------------------------------------------------------------------------------


def test_tables_are_found_by_old_and_new_names_and_those_of_confounds_are_not(tmp_path: Path):
    add_series(tmp_path, "sub-01_ses-1_task-rest_run-2_space-MNI_seg-A_stat-mean", make_series(0))
    add_series(tmp_path, "sub-02_task-rest_atlas-A", make_series(1), end="timeseries.tsv.gz")
    motion = add_series(tmp_path, "sub-02_task-rest_desc-confounds", make_series(2))
    found = {run.name: run for run in find_series(dataset_at(tmp_path))}
    assert list(found) == ["sub-01_ses-1_task-rest_run-2", "sub-02_task-rest"]
    assert found["sub-02_task-rest"].confounds == str(motion)
    assert find_series(dataset_at(tmp_path, entities={"session": ["1"]})) == [
        found["sub-01_ses-1_task-rest_run-2"]
    ]
    with pytest.raises(InputError, match="no runs: looked for"):
        find_runs(Dataset(derivatives=str(tmp_path)))


def test_the_motion_that_xcpd_writes_belongs_to_the_run(tmp_path: Path):
    series = add_series(tmp_path, "sub-01_task-rest_space-MNI_seg-A_stat-mean", make_series(0))
    motion = series.with_name("sub-01_task-rest_motion.tsv")
    motion.write_text("framewise_displacement\n0.1\n")
    (run,) = find_series(dataset_at(tmp_path))
    before = fingerprint([run])
    assert run.confounds == str(motion)
    motion.write_text("framewise_displacement\n0.2\n")
    assert fingerprint([run]) != before


def test_of_several_segmentations_one_must_be_chosen(tmp_path: Path):
    for name in ("CC400", "Schaefer100"):
        add_series(tmp_path, f"sub-01_task-rest_seg-{name}", make_series(0))
    with pytest.raises(InputError, match=r"CC400 \(1 files\), Schaefer100 \(1 files\); choose one"):
        find_series(dataset_at(tmp_path))
    (run,) = find_series(dataset_at(tmp_path, series={"segmentation": "CC400"}))
    assert run.entities["seg"] == "CC400"
    with pytest.raises(InputError, match=r"seg-AAL.*there are the segmentations CC400"):
        find_series(dataset_at(tmp_path, series={"segmentation": "AAL"}))


def test_two_tables_of_one_run_are_not_used(tmp_path: Path):
    for space in ("MNI152NLin6Asym", "T1w"):
        add_series(tmp_path, f"sub-01_task-rest_space-{space}_seg-A", make_series(0))
    add_series(tmp_path, "sub-02_task-rest_space-T1w_seg-A", make_series(1))
    assert "duplicate run: 2 files" in reason_of(tmp_path)
    chosen = index_runs(dataset_at(tmp_path, entities={"space": ["T1w"]}))
    assert chosen["reason"].isna().all()


# --- What the index tells -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sidecar", "above", "expected"),
    [
        ({"RepetitionTime": 2.5, "SamplingFrequency": 1.0}, "{}", 2.5),
        ({"SamplingFrequency": 0.5}, '{"RepetitionTime": 9}', 2.0),
        ({}, '{"SamplingFrequency": 0.4}', 2.5),
        ({}, "{}", 3.0),
    ],
)
def test_the_repetition_time_is_the_nearest_sidecars(
    tmp_path: Path, sidecar: dict[str, float], above: str, expected: float
):
    add_series(tmp_path, "sub-01_task-rest_seg-A", make_series(0), sidecar=sidecar)
    (tmp_path / "task-rest_timeseries.json").write_text(above)
    (tmp_path / "task-rest_bold.json").write_text('{"RepetitionTime": 7}')
    table = index_runs(dataset_at(tmp_path, repetition_time=3.0))
    assert list(table["repetition_time"]) == [expected]
    assert list(table["n_volumes"]) == [30]


@pytest.mark.parametrize("frequency", [0, -1, "0.5", None, True, 0.001])
def test_a_frequency_that_cannot_be(tmp_path: Path, frequency: Any):
    sidecar = {"SamplingFrequency": frequency}
    add_series(tmp_path, "sub-01_task-rest_seg-A", make_series(0), sidecar=sidecar)
    assert "RepetitionTime must be seconds" in reason_of(tmp_path)


def test_no_repetition_time_at_all(tmp_path: Path):
    add_series(tmp_path, "sub-01_task-rest_seg-A", make_series(0), sidecar={})
    assert "has RepetitionTime or SamplingFrequency; set repetition_time" in reason_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda names: names[::-1], "has not its columns in the same order"),
        (lambda names: [*names[:-1], "other"], "has a column 'other'"),
        (lambda names: names[:-1], "has 5 columns, not 6"),
    ],
)
def test_a_table_with_other_regions_than_most_is_left_out(
    tmp_path: Path, change: Callable[[list[str]], list[str]], words: str
):
    odd = change(REGIONS)
    add_series(tmp_path, "sub-01_task-rest_seg-A", make_series(0)[:, : len(odd)], odd)
    for name in ("sub-02", "sub-03"):
        add_series(tmp_path, f"{name}_task-rest_seg-A", make_series(1))
    table = index_runs(dataset_at(tmp_path)).set_index("run")
    assert words in table.loc["sub-01_task-rest", "reason"]
    assert table["reason"].notna().sum() == 1


# --- Reading a table ------------------------------------------------------------------------------


def test_a_table_is_read_to_the_last_bit_with_its_gaps(tmp_path: Path):
    values = make_series(0)
    values[3, 2] = np.nan
    for end in ("timeseries.tsv", "timeseries.tsv.gz"):
        path = add_series(tmp_path, "sub-01_task-rest_seg-A", values, end=end)
        regions, series = read_table_of_series(str(path))
        assert regions == REGIONS
        np.testing.assert_array_equal(series, values)
        assert glimpse_table(str(path)) == (REGIONS, 30)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("a\tb\n", "has no volumes"),
        ("a\tb\n1\t2\n3\n", "line 3: has 1 cells where line 1 names 2 regions"),
        ("a\tb\n1\t2\t3\n", "line 2: has 3 cells where line 1 names 2 regions"),
        ("a\tb\n1\tlow\n", "line 2, column 'b': 'low' is not a number"),
        ("a\tb\n1\tinf\n", "line 2, column 'b': 'inf' is not a number"),
        ("a\tb\n1\t1e50\n", "'1e50' is not a number"),
        ("0.5\t1.5\n1\t2\n", "line 1: has numbers where the names"),
        ("a\ta\n1\t2\n", "names the region 'a' twice"),
        ("\ta\n0\t2\n", "line 1: column 1 has no name"),
        ("a\tb\n1\t\ufffd\xff\n", "is not a number"),
    ],
)
def test_what_is_wrong_with_a_table_is_told_with_its_line(tmp_path: Path, text: str, words: str):
    path = tmp_path / "sub-01_seg-A_timeseries.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as caught:
        read_table_of_series(str(path))
    assert str(path) in str(caught.value)


def test_names_of_regions_may_be_whole_numbers_quoted_or_behind_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "table.tsv"
    path.write_bytes(b'\xef\xbb\xbf"1"\t"17"\r\n0.5\tn/a\r\n')
    regions, series = read_table_of_series(str(path))
    assert regions == ["1", "17"]
    np.testing.assert_array_equal(series, [[0.5, np.nan]])


def test_a_broken_file_is_told_of_and_stops_nobody_else(tmp_path: Path):
    end = "timeseries.tsv.gz"
    cut = add_series(tmp_path, "sub-01_task-rest_seg-A", make_series(0, 300), end=end)
    cut.write_bytes(cut.read_bytes()[:-200])
    text = add_series(tmp_path, "sub-02_task-rest_seg-A", make_series(1), end=end)
    text.write_bytes(gzip.decompress(text.read_bytes()))
    link = add_series(tmp_path, "sub-03_task-rest_seg-A", make_series(2), end=end)
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    latin = add_series(tmp_path, "sub-04_task-rest_seg-A", make_series(3))
    latin.write_bytes(latin.read_bytes().replace(b"region-0", b"r\xe9gion-0"))
    add_series(tmp_path, "sub-05_task-rest_seg-A", make_series(4))
    table = index_runs(dataset_at(tmp_path))
    assert table["reason"].str.contains("cannot be read").tolist()[:4] == [True] * 4
    assert pd.isna(table["reason"].iloc[4])


# --- The stores -----------------------------------------------------------------------------------


def store_of(path: Path, folder: Path, repetition_time: float = 2.0, **rois: Any) -> dict[str, Any]:
    names = {"run": "sub-01_task-rest", "subject": "sub-01"}
    return make_store(str(path), folder / "s.zarr", names, repetition_time, Rois(**rois))


def test_a_store_holds_the_series_and_their_connectivity(tmp_path: Path):
    values = make_series(0)
    values[:, 1] = 7.0
    values[4, 3] = np.nan
    path = add_series(tmp_path, "sub-01_task-rest_space-T1w_seg-A", values)
    facts = store_of(path, tmp_path, connectivity=["pearson", "partial"])
    assert (facts["n_rois"], facts["n_missing"], facts["n_volumes"]) == (4, 2, 30)
    with xarray.open_zarr(tmp_path / "s.zarr") as store:
        missing = np.isin(np.arange(6), [1, 3])
        assert np.isnan(store["timeseries"].values[:, missing]).all()
        np.testing.assert_array_equal(store["timeseries"].values[:, ~missing], values[:, ~missing])
        np.testing.assert_allclose(store["time"].values, 2.0 * np.arange(30))
        assert list(store["roi"].values) == REGIONS
        assert np.isnan(store["coverage"].values).all()
        expected = np.corrcoef(values[:, ~missing].astype(np.float64), rowvar=False)
        fc = store["fc"].values
        np.testing.assert_allclose(fc[np.ix_(~missing, ~missing)], expected, atol=1e-6)
        assert np.isnan(fc[missing]).all()
        assert np.isnan(fc[:, missing]).all()
        assert "fc_partial" in store
        assert store.attrs["atlas"] == "A"
        assert store.attrs["space"] == "T1w"


def test_a_store_is_made_again_only_when_what_it_is_made_of_changes(tmp_path: Path):
    path = add_series(tmp_path, "sub-01_task-rest_seg-A", make_series(0))
    made = store_of(path, tmp_path)["key"]
    inode = (tmp_path / "s.zarr").stat().st_ino
    assert store_of(path, tmp_path)["key"] == made
    assert (tmp_path / "s.zarr").stat().st_ino == inode
    assert store_of(path, tmp_path, repetition_time=3.0)["key"] != made
    assert store_of(path, tmp_path, fisher_z=True)["key"] != made
    assert store_of(path, tmp_path, cube=12.0)["key"] == made
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert store_of(path, tmp_path)["key"] != made


def test_a_run_without_any_signal_is_refused(tmp_path: Path):
    values = make_series(0)
    values[4] = np.nan
    path = add_series(tmp_path, "sub-01_task-rest_seg-A", values)
    with pytest.raises(InputError, match=r"no region has a signal.*\(1 volumes have no value"):
        store_of(path, tmp_path)
    assert not (tmp_path / "s.zarr").exists()
