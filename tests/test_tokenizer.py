"""The tokenizer that is trained here: by whom it is shaped, to the same bits, and what it keeps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray
from fabricate import make_config
from slice_data import EDGE, SIZES, SLICES, write_run

from neuromamba import slice_windows
from neuromamba.codes import run_codes
from neuromamba.config import Config
from neuromamba.files import InputError, digest_file, read_json, write_text
from neuromamba.layout import Layout
from neuromamba.record import ChangedError
from neuromamba.report_training import describe_tokenizer
from neuromamba.slice_windows import SliceWindows
from neuromamba.slices import RunVolumes
from neuromamba.tables import read_table, write_table
from neuromamba.tokenizer import run_tokenizer

SUBJECTS = [f"sub-{number:03}" for number in range(6)]
FOLDS = {"protocol": "k-fold", "folds": 2}


def config_of(folder: Path, splits: Any = None, **slices: Any) -> Config:
    codes = {**SLICES, "slices": {**SIZES, **slices}}
    splits = {"splits": splits} if splits else {}
    return make_config(folder, codes=codes, compute={"device": "cpu"}, **splits)


def write_split(config: Config, test: list[str]) -> None:
    """The first of those who are not tested selects."""
    rest = [name for name in SUBJECTS if name not in test]
    parts = {"validation": rest[:1], "train": rest[1:], "test": test}
    rows = [(name, part) for part, names in parts.items() for name in names]
    table = pd.DataFrame(rows, columns=["subject", "part"])
    write_table(Layout.of(config, "toy").split, table)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of six subjects, with the lists and splits of a holdout and of two folds."""
    folder = tmp_path_factory.mktemp("volumes")
    config = config_of(folder)
    layout = Layout.of(config, "toy")
    runs = [f"{name}_task-rest" for name in SUBJECTS]
    for number, run in enumerate(runs):
        write_run(layout.array("volumes", run), run, seed=number, volumes=8)
    table = pd.DataFrame({"run": runs, "reason": None, "key": runs})
    write_table(layout.index, table.assign(subject=SUBJECTS))
    write_table(layout.manifest("volumes", 0), table)
    write_split(config, SUBJECTS[4:])
    folds = config_of(folder, FOLDS)
    for number, name in enumerate(folds.splits.names):
        write_split(folds.in_fold(name), SUBJECTS[3 * number : 3 * number + 3])
    return folder


@pytest.fixture
def folder(volumes: Path, tmp_path: Path) -> Path:
    return shutil.copytree(volumes, tmp_path / "copy")


def weights_of(config: Config) -> str:
    return digest_file(Layout.of(config, "toy").tokenizer / "model.safetensors")


def test_test_subjects_are_not_opened_and_others_shape_each_fold(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[str] = set()

    class Watched(RunVolumes):
        def __init__(self, path: Path, normalization: Any) -> None:
            super().__init__(path, normalization)
            opened.add(self.run.split("_")[0])

    monkeypatch.setattr(slice_windows, "RunVolumes", Watched)
    folds = config_of(folder, FOLDS)
    found = {}
    for number, name in enumerate(folds.splits.names):
        opened.clear()
        run_tokenizer(folds.in_fold(name), "toy")
        assert opened == set(SUBJECTS) - set(SUBJECTS[3 * number : 3 * number + 3])
        run_codes(folds.in_fold(name), "toy", 0)
        found[name] = weights_of(folds.in_fold(name))
    assert len(set(found.values())) == 2
    root = folder / "results" / "toy"
    for name, sha256 in found.items():
        # Codes of every subject, the fold's test subjects too, by that fold's tokenizer.
        for subject in SUBJECTS:
            store = root / "codes" / name / f"{subject}_task-rest.zarr"
            attrs = read_json(store / "zarr.json")["attributes"]
            assert attrs["tokenizer"]["sha256"] == sha256
        assert (root / "codes" / name / "batch-0.tsv").exists()
    assert not (root / "codes" / "batch-0.tsv").exists()


def test_what_it_trained_is_what_encodes_and_is_told(folder: Path) -> None:
    config = config_of(folder)
    run_tokenizer(config, "toy")
    run_codes(config, "toy", 0)
    layout = Layout.of(config, "toy")
    info = read_json(layout.tokenizer / "model.json")
    assert info["subjects"] == {"train": SUBJECTS[1:4], "validation": SUBJECTS[:1]}
    codes = xarray.open_zarr(layout.array("codes", "sub-005_task-rest"), chunks=None)
    assert codes["values"].shape == (8, 27, EDGE * 4)
    expected = {"kind": "slices", "sha256": weights_of(config), "revision": None, "channels": 4}
    assert codes.attrs["tokenizer"] == expected
    table = read_table(layout.tokenizer / "quality.tsv")
    assert table["code"].tolist() == ["slices", "pca", "dct"]
    assert (table["values"] == 36).all()
    assert table[["mse", "explained", "explained_changes"]].notna().all(axis=None)


def test_the_report_tells_what_the_codes_keep_as_means_over_folds(folder: Path) -> None:
    folds = config_of(folder, FOLDS)
    assert describe_tokenizer(folds, "toy") == []
    for name, explained in zip(folds.splits.names, (0.5, 0.7), strict=True):
        place = Layout.of(folds.in_fold(name), "toy").tokenizer
        write_text(place / "model.json", "{}")
        rows = [("slices", 0.1, explained, 0.25, 36), ("pca", 0.1, 1 - explained, 0.5, 36)]
        columns = ["code", "mse", "explained", "explained_changes", "values"]
        write_table(place / "quality.tsv", pd.DataFrame(rows, columns=columns))
    first, second = describe_tokenizer(folds, "toy")
    assert first == {
        "code": "the tokenizer",
        "values": "36",
        "explained": "0.600",
        "explained_changes": "0.250",
    }
    assert second["explained"] == "0.400"
    assert describe_tokenizer(make_config(folder), "toy") == []


def test_a_seed_gives_the_same_bits_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    again = shutil.copytree(folder, tmp_path / "again")
    found = []
    for config in (config_of(folder), config_of(again), config_of(again, seed=1)):
        run_tokenizer(config, "toy", "restart")
        found.append(weights_of(config))
    assert found[0] == found[1] != found[2]


def test_it_is_trained_once_and_refuses_other_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder)
    run_tokenizer(config, "toy")
    monkeypatch.setattr("neuromamba.tokenizer.fit", None)
    run_tokenizer(config, "toy")
    with pytest.raises(ChangedError, match=r"slices\.steps: 4 -> 5"):
        run_tokenizer(config_of(folder, steps=5), "toy")


def test_training_makes_the_error_smaller(folder: Path) -> None:
    config = config_of(folder, steps=120, learning_rate=0.003)
    run_tokenizer(config, "toy")
    rows = pd.read_json(Layout.of(config, "toy").tokenizer / "metrics.jsonl", lines=True)
    losses = rows.loc[rows["split"] == "validation", "loss"].tolist()
    assert min(losses) < 0.5 * losses[0]


def test_samples_are_a_function_of_their_number(folder: Path) -> None:
    layout = Layout.of(config_of(folder), "toy")
    runs = {name: [f"{name}_task-rest"] for name in SUBJECTS[:3]}

    def windows() -> SliceWindows:
        return SliceWindows(runs, lambda run: layout.array("volumes", run), "maximum")

    whole = windows().training_batch(3, 0, 48)
    for first, size in ((40, 8), (5, 7), (0, 1)):
        part = windows().training_batch(3, first, size)
        np.testing.assert_array_equal(part["slices"], whole["slices"][first : first + size])
        assert part["run"] == whole["run"][first : first + size]
    # Each subject once in an epoch of volumes, and no slice without brain.
    assert {run for run in whole["run"][:24]} == {run for one in runs.values() for run in one}
    assert (whole["slices"].amax((1, 2)) > -1).all()
    assert not np.array_equal(whole["slices"], windows().training_batch(4, 0, 48)["slices"])


def test_runs_that_cannot_be_read_are_left_out_and_none_at_all_is_an_error(folder: Path) -> None:
    layout = Layout.of(config_of(folder), "toy")
    shutil.rmtree(layout.array("volumes", "sub-000_task-rest"))
    runs = {name: [f"{name}_task-rest"] for name in SUBJECTS[:2]}

    def open_all(some: dict[str, list[str]]) -> SliceWindows:
        return SliceWindows(some, lambda run: layout.array("volumes", run), "maximum")

    windows = open_all(runs)
    assert windows.people == SUBJECTS[1:2]
    assert "damaged" in windows.left_out["sub-000_task-rest"]
    with pytest.raises(InputError, match="none of the 1 subjects has volumes"):
        open_all({SUBJECTS[0]: runs[SUBJECTS[0]]})


def test_published_weights_are_not_trained(folder: Path) -> None:
    config = make_config(folder, codes={"weights": "./dcae"})
    with pytest.raises(InputError, match="dc-ae, which is not trained here"):
        run_tokenizer(config, "toy")
