"""Forecasts of the test subjects' runs: who is forecast, what is averaged, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fake_runs import FakeStore, make_config, write_dataset

from neuromamba.checkpoint import load_weights
from neuromamba.cli import main
from neuromamba.config import Config, save_config
from neuromamba.files import InputError, read_json
from neuromamba.forecast import (
    average_errors,
    known_volumes,
    run_forecast,
    summarize,
)
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.pretrain import run_pretrain
from neuromamba.tables import read_table, write_table

STEPS = {"batch_size": 4, "validate_every": 4, "checkpoint_every": 4, "log_every": 2}
OPENED: list[str] = []
ERRORS = ["mse_model", "mse_persistence", "mse_context_mean", "mse_autoregression"]
ERRORS += ["mse_run_mean"]

# --- Averages and intervals ---------------------------------------------------------------------


def test_skills_are_of_mean_errors_with_intervals_over_subjects(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {
            "subject": f"sub-{k:02}",
            "horizon": h,
            **dict(zip(ERRORS, rng.uniform(1, 2, 5), strict=True)),
        }
        for k in range(12)
        for h in (1, 2)
    ]
    errors = pd.DataFrame(rows)
    table = average_errors(errors, make_config(tmp_path)).set_index("horizon")
    assert (table["n"] == 12).all()
    for horizon, of_horizon in errors.groupby("horizon"):
        mean = of_horizon[ERRORS].mean()
        row = table.loc[horizon]
        assert row[ERRORS].to_numpy(float) == pytest.approx(mean.to_numpy())
        for name in ERRORS[1:]:
            skill = name.replace("mse", "skill")
            assert row[skill] == pytest.approx(1 - mean["mse_model"] / mean[name])
            assert row[f"{skill}_low"] < row[skill] < row[f"{skill}_high"]
    same = errors.assign(mse_model=errors["mse_persistence"] / 2)
    row = average_errors(same, make_config(tmp_path)).iloc[0]
    for bound in ("", "_low", "_high"):
        assert row[f"skill_persistence{bound}"] == pytest.approx(0.5)


# --- The stage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a pretrained model."""
    folder = tmp_path_factory.mktemp("forecast")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromamba.batches.TokenStore", FakeStore)
        write_dataset(folder)
        run_pretrain(make_config(folder), "fake", "tiny", 0)
    return folder


@pytest.fixture(autouse=True)
def _fake_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    monkeypatch.setattr(FakeStore, "poisoned", set())
    monkeypatch.setattr(FakeStore, "short", set())


def with_forecast(folder: Path, **changes: object) -> Config:
    raw = make_config(folder).model_dump(mode="json")
    raw["forecast"] |= changes
    raw["evaluate"]["bootstrap"] = 100
    return Config.model_validate(raw)


def folder_of(folder: Path) -> Path:
    return Layout(folder / "results", "fake").forecast("tiny", 0)


@pytest.fixture(scope="module")
def done(made: Path) -> Path:
    """The forecasts of the two test subjects, sub-03 (two runs) and sub-04."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromamba.batches.TokenStore", FakeStore)
        patch.setattr(FakeStore, "poisoned", set())
        FakeStore.opened = []
        run_forecast(with_forecast(made, windows=2), "fake", "tiny", 0)
    OPENED.extend(FakeStore.opened)
    return folder_of(made)


def test_errors_are_averaged_over_windows_then_runs(made: Path, done: Path) -> None:
    """The model's, in full, by one roll-out for each window."""
    config = make_config(made)
    network = build_model(config.models["tiny"], 16)
    load_weights(network, Layout(made / "results", "fake").pretrain("tiny", 0))
    of_runs = []
    for run in ("sub-03_task-rest_run-1", "sub-03_task-rest_run-2"):
        store, of_windows = FakeStore(Path(f"{run}.zarr")), []
        for start in (0, store.n_time_patches - 4):
            values = store.normalized(start, 4, "global").swapaxes(0, 1).copy()
            tokens = torch.from_numpy(values)
            batch = {
                "tokens": tokens,
                "patches": torch.tensor([len(tokens)]),
                "centers": torch.from_numpy(store.center),
            }
            error = network.eval().roll_out(batch, 2) - tokens[:, 2:]
            last = tokens[:, 1:2].unflatten(-1, (2, 8))[:, :, 1:].expand(-1, 2, 2, -1)
            copied, mean = last.flatten(2) - tokens[:, 2:], 1 - tokens[:, 2:]
            of_windows.append([(e**2).mean((0, 2)).numpy() for e in (error, copied, mean)])
        of_runs.append(np.mean(of_windows, axis=0))
    expected = np.mean(of_runs, axis=0)
    errors = read_table(done / "errors.tsv", dtype={"subject": str}).set_index("subject")
    assert list(errors.columns) == ["horizon", *ERRORS]
    for name, values in zip(("model", "persistence", "run_mean"), expected, strict=True):
        found = errors.loc["sub-03", f"mse_{name}"].to_numpy()
        assert found == pytest.approx(values, rel=1e-5)
    assert sorted(set(errors.index)) == ["sub-03", "sub-04"]


def test_the_table_has_a_row_for_each_horizon(done: Path) -> None:
    table = read_table(done / "forecast.tsv")
    assert table["horizon"].tolist() == [1, 2]
    assert table["volumes"].tolist() == [2, 4]
    assert table["seconds"].tolist() == [3.0, 6.0]
    assert table["n"].tolist() == [2, 2]
    # White noise around a mean: copying is worse than the mean of the context.
    assert (table["mse_persistence"] > table["mse_context_mean"]).all()


def test_the_autoregression_never_opens_a_test_subject(made: Path, done: Path) -> None:
    facts = read_json(done / "forecast.json")
    assert facts["autoregression"]["subjects"] == {"train": 10, "validation": 2}
    assert facts["autoregression"]["order"] <= 3
    assert (facts["n_subjects"], facts["n_runs"], facts["known_volumes"]) == (2, 3, 4)
    assert facts["seconds"] > 0
    assert facts["seen_subjects"] == []
    opened = list(dict.fromkeys(run.split("_")[0] for run in OPENED))
    assert opened[-2:] == ["sub-03", "sub-04"], "the test subjects come last"


def test_table_and_figure_come_from_the_errors_alone(made: Path, done: Path, tmp_path) -> None:
    write_table(tmp_path / "errors.tsv", read_table(done / "errors.tsv", dtype={"subject": str}))
    summarize(tmp_path, with_forecast(made, windows=2), "fake", "tiny")
    for name in ("forecast.tsv", "forecast.svg"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()
    figure = (done / "forecast.svg").read_text()
    for words in ("persistence", "context mean", "autoregression", "known volume (s)", "95%"):
        assert words in figure


def test_different_repetition_times_have_no_seconds(made: Path, done: Path, tmp_path) -> None:
    index = Layout(made / "results", "fake").index
    before = index.read_bytes()
    table = read_table(index)
    table.loc[table["subject"] == "sub-04", "repetition_time"] = 2.0
    write_table(index, table)
    try:
        write_table(tmp_path / "errors.tsv", read_table(done / "errors.tsv"))
        summarize(tmp_path, with_forecast(made), "fake", "tiny")
    finally:
        index.write_bytes(before)
    assert read_table(tmp_path / "forecast.tsv")["seconds"].isna().all()
    assert "known volume (volumes)" in (tmp_path / "forecast.svg").read_text()


def test_the_command_and_its_bound(made: Path, tmp_path: Path, capsys) -> None:
    save_config(tmp_path / "config.yaml", with_forecast(made, windows=1, max_subjects=1))
    assert main(["forecast", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "1 subjects, 2 runs forecast in" in capsys.readouterr().err
    facts = read_json(folder_of(made) / "forecast.json")
    assert (facts["n_subjects"], facts["n_test_subjects"]) == (1, 2)


# --- What is refused ----------------------------------------------------------------------------


def test_a_model_that_has_seen_a_test_subject_is_refused(made: Path) -> None:
    split = Layout(made / "results", "fake").split
    before = split.read_bytes()
    split.write_bytes(before.replace(b"sub-14\ttrain", b"sub-14\ttest"))
    try:
        with pytest.raises(InputError, match=r"1 of 3 test subjects.*sub-14.*allow_seen"):
            run_forecast(with_forecast(made), "fake", "tiny", 0)
    finally:
        split.write_bytes(before)


@pytest.mark.parametrize("context", [3, 8, 10])
def test_the_context_fits_the_window(made: Path, context: int) -> None:
    with pytest.raises(InputError, match=rf"forecast\.context is {context}; .*\(2\) below the 8"):
        run_forecast(with_forecast(made, context=context), "fake", "tiny", 0)


@pytest.mark.parametrize(("volumes", "known"), [(8, 4), (6, 2), (4, 2)])
def test_half_of_the_window_is_known_by_default(tmp_path: Path, volumes: int, known: int) -> None:
    assert known_volumes(make_config(tmp_path, volumes=volumes), "tiny") == known


def test_a_model_without_units_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    FakeStore.poisoned = set()
    config = make_config(tmp_path, target="patch", pretrain={"steps": 4, **STEPS})
    run_pretrain(config, "fake", "tiny", 0)
    with pytest.raises(InputError, match="only one with `target: raw` can be rolled out"):
        run_forecast(config, "fake", "tiny", 0)
    assert not folder_of(tmp_path).exists()


def test_other_settings_than_the_models_are_refused(made: Path) -> None:
    config = make_config(made, normalization="voxel")
    with pytest.raises(InputError, match="normalization: global -> voxel"):
        run_forecast(config, "fake", "tiny", 0)
