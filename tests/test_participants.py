"""The participants table."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from neuromamba.config import Dataset
from neuromamba.files import InputError
from neuromamba.participants import read_participants

TARGETS = {
    "sex": {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}},
    "age": {"kind": "regression", "column": "age"},
}


def participants(tmp_path: Path, text: str, name: str = "participants.tsv", **more: Any) -> Dataset:
    file = tmp_path / name
    file.write_text(text)
    settings: dict[str, Any] = {"participants": {"file": str(file)}, "targets": TARGETS, **more}
    if "table" in settings:
        settings["participants"] |= settings.pop("table")
    return Dataset(derivatives=str(tmp_path), **settings)


def test_labels_numbers_and_sites(tmp_path: Path) -> None:
    dataset = participants(
        tmp_path,
        "participant_id\tsex\tage\tsite\nsub-01\tF\t20.5\tX\n0050649\tM\tn/a\tn/a\nsub-03\tn/a\t7\tY\n",
        table={"site_column": "site"},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = read_participants(dataset)
    assert list(table.index) == ["sub-01", "sub-0050649", "sub-03"]
    assert list(table["sex"][:2]) == ["female", "male"]
    assert list(table["age"].dropna()) == [20.5, 7.0]
    assert list(table["site"].isna()) == [False, True, False]
    assert pd.isna(table.loc["sub-03", "sex"])
    assert table["age"].dtype == float


def test_numeric_codes_match_however_they_are_written(tmp_path: Path) -> None:
    classes = {"female": "2", "male": "1"}
    dataset = participants(
        tmp_path,
        "SUB_ID,SEX\n50002,1\n50003,2.0\n",
        name="phenotype.csv",
        table={"id_column": "SUB_ID"},
        targets={"sex": {"kind": "classification", "column": "SEX", "classes": classes}},
    )
    assert list(read_participants(dataset)["sex"]) == ["male", "female"]


def test_a_value_of_no_class_is_missing_and_is_reported_once(tmp_path: Path) -> None:
    dataset = participants(
        tmp_path, "participant_id\tsex\tage\nsub-01\tF\t1\nsub-02\tX\t2\nsub-03\tX\t3\n"
    )
    with pytest.warns(UserWarning, match=r"'X' \(2 x\) is no class of targets.sex") as caught:
        table = read_participants(dataset)
    assert len(caught) == 1
    assert list(table["sex"].isna()) == [False, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("participant_id\tage\nsub-01\t1\n", r"no column 'sex' \(targets.sex.column.*has: part"),
        ("id\tsex\tage\nsub-01\tF\t1\n", "no column 'participant_id'"),
        ("participant_id\tsex\tage\nsub-01\tF\told\n", r"line 2 \(sub-01\), column 'age': 'old'"),
        ("participant_id\tsex\tage\nsub-01\tF\tinf\n", "'inf' is not a number"),
        ("participant_id\tsex\tage\nsub-01\tF\t1\n01\tF\t1\n", "more than one row for sub-01"),
        ("participant_id\tsex\tage\nn/a\tF\t1\n", "line 2: 'participant_id' is empty"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_participants(participants(tmp_path, text))


def test_targets_without_a_table_and_no_targets_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set participants\.file"):
        read_participants(Dataset(derivatives=".", targets=TARGETS))
    assert read_participants(Dataset(derivatives=".")).empty
