"""Confounds: nilearn's choice of columns and volumes, and tables that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from confound_tables import MOTION, make_table, mark_moving, mark_unsteady, write_confounds

from neuromamba.config import Denoise
from neuromamba.confounds import Confounds, read_confounds
from neuromamba.files import InputError
from neuromamba.tables import write_table

N = 60


def read(path: Path | None, n_volumes: int = N, **settings: Any) -> Confounds:
    return read_confounds(path, "sub-01", n_volumes, 2.0, Denoise(**settings))


def test_the_strategy_chooses_the_columns(tmp_path: Path) -> None:
    path = write_confounds(tmp_path, make_table(N))
    found = read(path, strategy=["motion", "wm_csf"], motion="derivatives", wm_csf="power2")
    motion = {*MOTION, *(f"{name}_derivative1" for name in MOTION)}
    tissue = {"csf", "csf_power2", "white_matter", "white_matter_power2"}
    assert set(found.columns) == motion | tissue
    assert found.values.shape == (N, 16)
    assert np.isfinite(found.values).all()
    assert found.kept.tolist() == list(range(N))


def test_values_are_the_tables_but_for_the_first_derivative(tmp_path: Path) -> None:
    table = make_table(N)
    found = read(write_confounds(tmp_path, table), strategy=["motion"], motion="derivatives")
    expected = table[found.columns].bfill(limit=1).to_numpy()
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "n", "columns"),
    [
        ("anat_combined", "all", ["a_comp_cor_00", "a_comp_cor_01"]),
        ("anat_combined", 1, ["a_comp_cor_00"]),
        ("anat_separated", "all", ["a_comp_cor_02"]),
    ],
)
def test_compcor_goes_by_the_sidecar(tmp_path: Path, kind: str, n: Any, columns: Any) -> None:
    path = write_confounds(tmp_path, make_table(N))
    found = read(path, strategy=["compcor", "high_pass"], compcor=kind, n_compcor=n)
    assert [name for name in found.columns if "comp" in name] == columns
    assert [name for name in found.columns if "cosine" in name] == [f"cosine0{k}" for k in range(3)]


def test_volumes_are_told_apart_by_why_they_go(tmp_path: Path) -> None:
    table = make_table(N)
    mark_unsteady(table, 2)
    mark_moving(table, [20, 24, 40])
    table.loc[50, "std_dvars"] = 2.0
    path = write_confounds(tmp_path, table)
    found = read(path, strategy=["scrub"], scrub=5)
    assert found.dropped == [0, 1]
    # Between 20 and 24 there are fewer than five volumes.
    assert found.scrubbed == [20, 21, 22, 23, 24, 40, 50]
    assert sorted([*found.kept, *found.dropped, *found.scrubbed]) == list(range(N))
    assert read(path, strategy=["scrub"], scrub=0).scrubbed == [20, 24, 40, 50]
    assert read(path, strategy=["scrub"], scrub=0, fd_threshold=3).scrubbed == [50]
    assert read(path, strategy=["non_steady_state"]).columns == []
    assert read(path, strategy=["motion"]).dropped == [0, 1]


def test_the_files_may_have_any_name(tmp_path: Path) -> None:
    path = write_confounds(tmp_path, make_table(N))
    other = tmp_path / "a folder.tsv" / "regressors of run 1.tsv"
    other.parent.mkdir()
    path.with_suffix(".json").rename(other.with_suffix(".json"))
    path.rename(other)
    assert "a_comp_cor_00" in read(other, strategy=["compcor", "high_pass"]).columns


def drop(*columns: str) -> Any:
    return lambda table: table.drop(columns=list(columns))


def put(column: str, row: int, cell: Any) -> Any:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype({column: object})
        table.loc[row, column] = cell
        return table

    return change


BAD_TABLES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "too long": (
        lambda table: pd.concat([table, table[:1]]),
        {"strategy": ["motion"]},
        rf"has 61 rows, but the scan of sub-01 has {N} volumes",
    ),
    "no motion": (
        drop(*[name for name in make_table(5) if name.startswith(("trans", "rot"))]),
        {"strategy": ["motion"]},
        r"strategy \[motion\].*missing.*motion.*choose another strategy",
    ),
    "no derivative": (
        drop("rot_x_derivative1"),
        {"strategy": ["motion"]},
        r"missing: *\['rot_x_derivative1'\]",
    ),
    "no FD": (
        drop("framewise_displacement"),
        {"strategy": ["scrub"]},
        r"has no column framewise_displacement, which scrubbing goes by",
    ),
    "no cosines": (
        drop("cosine00", "cosine01", "cosine02"),
        {"strategy": ["high_pass"]},
        r"has no cosine columns.*a frequency in Hz instead",
    ),
    "no component": (
        drop("a_comp_cor_01"),
        {"strategy": ["compcor", "high_pass"]},
        r"a_comp_cor_01",
    ),
    "text": (
        put("trans_x", 7, "much"),
        {"strategy": ["motion"]},
        r"column trans_x has 'much' at volume 7 \(counted from 0\)",
    ),
    "text in the first row": (
        put("trans_x_derivative1", 0, "?"),
        {"strategy": ["motion"]},
        r"column trans_x_derivative1 has '\?' at volume 0",
    ),
    "a gap": (
        put("csf", 9, None),
        {"strategy": ["wm_csf"]},
        r"column csf has nothing at volume 9",
    ),
    "infinite": (put("csf", 9, np.inf), {"strategy": ["wm_csf"]}, r"column csf has 'inf'"),
    "FD that is no number": (
        put("framewise_displacement", 5, "x"),
        {"strategy": ["scrub"]},
        r"column framewise_displacement has 'x' at volume 5",
    ),
    "all move": (
        lambda table: table.assign(framewise_displacement=1.0),
        {"strategy": ["scrub"]},
        rf"all {N} volumes are scrubbed \(fd_threshold 0.5 mm, .*raise the thresholds",
    ),
    "old fMRIPrep": (
        lambda table: table.rename(columns={"csf": "WhiteMatter"}),
        {"strategy": ["motion"]},
        r"camel case",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    change, settings, message = BAD_TABLES[name]
    path = write_confounds(tmp_path, make_table(N))
    write_table(path, change(make_table(N)))
    with pytest.raises(InputError, match=message) as error:
        read(path, **settings)
    assert str(path) in str(error.value)


def test_what_is_not_asked_for_may_be_anything(tmp_path: Path) -> None:
    path = write_confounds(tmp_path, put("csf", 9, "x")(make_table(N)).assign(note="fine"))
    assert read(path, strategy=["motion"]).values.shape == (N, 24)


@pytest.mark.parametrize("path", [None, Path("nowhere.tsv")])
def test_a_missing_table_is_named(path: Path | None) -> None:
    with pytest.raises(InputError, match=r"sub-01: has no confounds table .*files.confounds"):
        read(path, strategy=["motion"])


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("{", "is not valid JSON"), ("{}", "compc")]
)
def test_compcor_needs_its_sidecar(tmp_path: Path, content: str | None, message: str) -> None:
    path = write_confounds(tmp_path, make_table(N))
    path.with_suffix(".json").unlink()
    if content is not None:
        path.with_suffix(".json").write_text(content)
    with pytest.raises(InputError, match=message):
        read(path, strategy=["compcor", "high_pass"], compcor="anat_combined")
    assert read(path, strategy=["motion"]).columns
