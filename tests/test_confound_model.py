"""The confound model's table: where each column comes from, and what is done about gaps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricate import make_config, make_participants

from neuromamba.config import Config
from neuromamba.confound_model import confounds_of, design
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.tables import read_table, write_table


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Four subjects, the first with two runs, the last without confounds."""
    make_participants(tmp_path, 4)
    config = make_config(tmp_path, compute={"batches": 2})
    layout = Layout.of(config, "toy")
    runs = ["sub-000_run-1", "sub-000_run-2", "sub-001_run-1", "sub-002_run-1", "sub-003_run-1"]
    index = pd.DataFrame({"run": runs, "subject": [run[:7] for run in runs], "n_volumes": 3})
    index["confounds"] = [str(tmp_path / f"{run}.tsv") for run in runs[:4]] + [None]
    index["reason"] = None
    write_table(layout.index, index)
    for k, path in enumerate(index["confounds"][:4]):
        fd = pd.DataFrame({"framewise_displacement": [None, 0.1 * k, 0.3 * k]})
        write_table(path, fd)
    facts = pd.DataFrame({"run": runs, "reason": None, "n_volumes": [10, 12, 20, 20, 20]})
    facts["n_voxels"] = [100, 104, 90, 95, 99]
    rois = pd.DataFrame({"run": runs, "reason": None, "tsnr": [40.0, 50, 60, 70, None]})
    for batch in range(2):
        write_table(layout.manifest("volumes", batch), facts.iloc[batch::2])
        write_table(layout.manifest("rois", batch), rois.iloc[batch::2])
    return config


def runs_of(config: Config) -> pd.DataFrame:
    return read_table(Layout.of(config, "toy").index)[["run", "subject"]]


def test_each_confound_is_where_it_should_be_and_the_target_is_none(config: Config) -> None:
    table = confounds_of(config, "toy", "sex", runs_of(config))
    assert list(table) == ["age", "site", "mean_fd", "tsnr", "n_volumes", "n_voxels"]
    assert list(table["site"]) == ["north", "south"] * 2
    assert table["mean_fd"].to_numpy()[:3] == pytest.approx([0.1, 0.4, 0.6])
    assert np.isnan(table["mean_fd"].iloc[3])
    assert list(table["n_volumes"]) == [22, 20, 20, 20]
    assert table["tsnr"].iloc[0] == 45
    assert table["n_voxels"].iloc[0] == 102
    assert "age" not in confounds_of(config, "toy", "age", runs_of(config))
    assert "sex" in confounds_of(config, "toy", "age", runs_of(config))


def test_a_target_of_another_name_on_the_same_column_is_no_confound(config: Config) -> None:
    target = {"men": {"kind": "classification", "column": "sex", "classes": {"n": "F", "y": "M"}}}
    folder = Path(config.results).parent
    other = make_config(folder, dataset={"targets": target}, compute={"batches": 2})
    assert "sex" not in confounds_of(other, "toy", "men", runs_of(config))


def test_gender_is_sex_and_a_site_column_has_any_name(config: Config) -> None:
    path = Path(config.results).parent / "participants.tsv"
    table = read_table(path).rename(columns={"sex": "Gender", "site": "scanner"})
    write_table(path, table)
    dataset = {
        "participants": {"file": str(path), "site_column": "scanner"},
        "targets": {"age": {"kind": "regression", "column": "age"}},
    }
    other = make_config(path.parent, dataset=dataset, compute={"batches": 2})
    found = confounds_of(other, "toy", "age", runs_of(config))
    assert list(found["sex"]) == ["F", "M", "M", "F"]
    assert list(found["site"]) == ["north", "south"] * 2
    chosen = make_config(
        path.parent,
        dataset=dataset,
        compute={"batches": 2},
        evaluate={"confounds": ["mean_fd", "site"]},
    )
    assert list(confounds_of(chosen, "toy", "age", runs_of(config))) == ["mean_fd", "site"]


def test_motion_does_not_leave_silently_with_its_files(config: Config) -> None:
    (Path(config.results).parent / "sub-001_run-1.tsv").unlink()
    with pytest.raises(InputError, match=r"sub-001_run-1\.tsv is not there.*leave mean_fd out"):
        confounds_of(config, "toy", "sex", runs_of(config))
    others = make_config(
        Path(config.results).parent, compute={"batches": 2}, evaluate={"confounds": ["tsnr"]}
    )
    assert list(confounds_of(others, "toy", "sex", runs_of(config))) == ["tsnr"]


def test_the_target_is_no_confound_of_itself_under_another_name(config: Config) -> None:
    path = Path(config.results).parent / "participants.tsv"
    table = read_table(path)
    write_table(path, table.assign(gender=table["sex"]))
    found = confounds_of(config, "toy", "sex", runs_of(config))
    assert "sex" not in found
    assert {"age", "site"} <= {*found}


def test_age_and_sex_are_what_the_targets_of_these_names_are_told_by(config: Config) -> None:
    """As in UK Biobank and ABIDE, whose columns have other names."""
    path = Path(config.results).parent / "participants.tsv"
    table = read_table(path).rename(columns={"age": "AGE_AT_SCAN", "sex": "31-0.0"})
    # A column that is called so, and is not what the config says.
    write_table(path, table.assign(site="elsewhere", scanner=table["site"]))
    classes = {"female": "F", "male": "M"}
    dataset = {
        "participants": {"file": str(path), "site_column": "scanner"},
        "targets": {
            "sex": {"kind": "classification", "column": "31-0.0", "classes": classes},
            "age": {"kind": "regression", "column": "AGE_AT_SCAN"},
        },
    }
    other = make_config(path.parent, dataset=dataset, compute={"batches": 2})
    of_sex, of_age = (confounds_of(other, "toy", t, runs_of(config)) for t in ("sex", "age"))
    assert of_sex["age"].notna().all()
    assert "sex" not in of_sex
    assert list(of_age["sex"]) == ["F", "M", "M", "F"]
    assert list(of_age["site"]) == ["north", "south"] * 2
    assert "age" not in of_age


def test_gaps_are_filled_by_training_and_new_sites_are_none() -> None:
    table = pd.DataFrame(
        {
            "age": [20.0, np.nan, 40, 60, np.nan, 1000],
            "site": ["a", "b", None, "a", "c", "b"],
            "tsnr": np.nan,
            "n_volumes": 100.0,
        },
        list("uvwxyz"),
    )
    train, test, used = design(table, list("uvwx"), list("yzq"))
    assert used == ["age", "site"]  # the others do not differ, or are not known
    assert train[:, 0] == pytest.approx((np.array([20, 40, 40, 60]) - 40) / np.sqrt(200))
    assert train[:, 1:].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert test[0].tolist() == [0, 0, 0, 0]
    assert test[1, 1:].tolist() == [0, 1, 0]
    assert test[2].tolist() == [0, 0, 0, 1]  # a subject of whom nothing is known
    again, _, _ = design(table, list("uvwx"), ["y"])
    assert (again == train).all()


def add_motion(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    write_table(path, read_table(path).assign(mean_fd=[0.11, 0.12, 0.13, None]))


def test_mean_fd_comes_from_the_table_of_subjects_only_where_no_run_has_it(
    config: Config, tmp_path: Path
) -> None:
    add_motion(tmp_path)
    measured = confounds_of(config, "toy", "sex", runs_of(config))
    assert measured["mean_fd"].to_numpy()[:3] == pytest.approx([0.1, 0.4, 0.6])
    assert np.isnan(measured["mean_fd"].iloc[3])
    layout = Layout.of(config, "toy")
    write_table(layout.index, read_table(layout.index).assign(confounds=None))
    told = confounds_of(config, "toy", "sex", runs_of(config))
    assert told["mean_fd"].to_numpy()[:3] == pytest.approx([0.11, 0.12, 0.13])
    assert list(told) == ["age", "site", "mean_fd", "tsnr", "n_volumes", "n_voxels"]


def test_motion_that_is_the_target_is_no_confound(config: Config, tmp_path: Path) -> None:
    add_motion(tmp_path)
    settings = config.datasets["toy"].model_dump(mode="json")
    settings["targets"] = {"motion": {"kind": "regression", "column": "mean_fd"}}
    config = make_config(tmp_path, dataset=settings, compute={"batches": 2})
    layout = Layout.of(config, "toy")
    write_table(layout.index, read_table(layout.index).assign(confounds=None))
    assert "mean_fd" not in confounds_of(config, "toy", "motion", runs_of(config))
