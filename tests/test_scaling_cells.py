"""A small scaling study on fake runs: its trainings, what they cost, and what comes of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from fake_runs import FakeStore, make_config, write_dataset

from neuromamba.config import Config
from neuromamba.files import InputError, read_json
from neuromamba.layout import Layout
from neuromamba.pretrain import list_training, make_network, open_windows, run_pretrain
from neuromamba.scaling import run_scaling
from neuromamba.scaling_cells import PF_DAY, read_cells, training_cost
from neuromamba.tables import read_table, write_table


@pytest.fixture
def study(tmp_path, monkeypatch) -> Config:
    """Two widths, two shares, one seed; the manifests tell the tokens of each run."""
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    write_dataset(tmp_path)
    config = make_config(tmp_path)
    small = config.models["tiny"].model_dump(mode="json")
    models = {"narrow": small, "wide": {**small, "width": 16}}
    scaling = {"models": models, "fractions": [0.3, 1.0], "steps": "proportional"}
    raw = {**config.model_dump(mode="json"), "scaling": scaling, "evaluate": {"bootstrap": 20}}
    layout = Layout(tmp_path / "results", "fake")
    poisoned, FakeStore.poisoned = FakeStore.poisoned, set()
    for batch in range(2):
        table = read_table(layout.manifest("tokens", batch), dtype={"reason": str})
        tokens = [FakeStore(Path(f"{run}.zarr")).n_tokens for run in table["run"]]
        write_table(layout.manifest("tokens", batch), table.assign(n_tokens=tokens))
    FakeStore.poisoned = poisoned
    return Config.model_validate(raw)


def train_cells(config: Config) -> Layout:
    for model in config.study().models:
        for fraction in config.scaling.fractions:
            run_pretrain(config.study(), "fake", model, 0, fraction=fraction)
    return Layout(Path(config.results), "fake")


def test_a_study_ends_in_a_table_a_figure_and_a_verdict(study, capsys):
    layout = train_cells(study)
    run_scaling(study, "fake")
    cells = read_table(layout.scaling / "scaling.tsv")
    assert cells["steps"].tolist() == [2, 8, 2, 8]
    assert cells["subjects"].tolist() == [3, 10, 3, 10]
    assert cells["parameters"].nunique() == 2
    assert (cells["pf_days"] * PF_DAY).tolist() == pytest.approx(cells["flops"].tolist())
    for row in cells.to_dict("records"):
        info = read_json(layout.cell(row["model"], row["fraction"], 0) / "model.json")
        assert row["loss"] == pytest.approx(info["best"]["loss"])
        assert row["skill_persistence"] == pytest.approx(info["best"]["skill_persistence"])
    report = read_json(layout.scaling / "fit.json")
    assert not report["power_law_claimed"]
    assert report["verdict"][-1].startswith("No power law can be claimed")
    assert report["verdict"][-1] in capsys.readouterr().out
    assert report["missing"] == []
    assert len(report["points"]) == 4
    assert (layout.scaling / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    figure = (layout.scaling / "scaling.svg").read_text()
    for words in ("training compute C (FLOPs)", "PF-days", "validation loss", "30 % of subjects"):
        assert words in figure
    assert not list(layout.scaling.rglob(".tmp-*"))


def test_all_shares_are_validated_on_the_same_subjects(study):
    layout = train_cells(study)
    small, whole = (
        read_json(layout.cell("narrow", fraction, 0) / "model.json")["subjects"]
        for fraction in (0.3, 1.0)
    )
    assert small["validation"] == whole["validation"]
    assert set(small["train"]) < set(whole["train"])


def test_a_training_of_another_share_or_length_is_not_taken_for_this_one(study):
    run_pretrain(study.study(), "fake", "narrow", 0, fraction=0.3)
    changed = study.model_copy(
        update={"scaling": study.scaling.model_copy(update={"steps": "full"})}
    )
    with pytest.raises(InputError, match=r"pretrain.steps: 2 -> 8"):
        run_pretrain(changed.study(), "fake", "narrow", 0, fraction=0.3)
    layout = Layout(Path(study.results), "fake")
    layout.cell("narrow", 0.3, 0).rename(layout.cell("narrow", 0.31, 0).parent)
    shutil.copytree(layout.cell("narrow", 0.31, 0).parent, layout.cell("narrow", 0.31, 0))
    with pytest.raises(InputError, match=r"fraction: 0.3 -> 0.31"):
        run_pretrain(study.study(), "fake", "narrow", 0, fraction=0.31)


def test_missing_cells_are_named_and_none_at_all_is_an_error(study):
    with pytest.raises(InputError, match="no cell of the scaling study has been trained"):
        run_scaling(study, "fake")
    run_pretrain(study.study(), "fake", "wide", 0, fraction=1.0)
    run_scaling(study, "fake")
    layout = Layout(Path(study.results), "fake")
    report = read_json(layout.scaling / "fit.json")
    assert len(report["missing"]) == 3
    assert report["frontier"] is None
    assert "3 trainings are missing" in " ".join(report["verdict"])


def test_the_cost_is_that_of_the_batches_that_were_read(study):
    """Over whole epochs of subjects with one run each, the expectation is what happens."""
    config, layout = study.study(), Layout(Path(study.results), "fake")
    run_pretrain(config, "fake", "narrow", 0, fraction=1.0)
    info = read_json(layout.cell("narrow", 1.0, 0) / "model.json")
    info["settings"]["pretrain"] |= {"steps": 5, "batch_size": 4}
    subjects, runs = list_training(config, "fake", ["tokens"])
    single = runs.drop_duplicates("subject")
    cost = training_cost(info, single, layout.scaling)
    network = make_network(config, "narrow", 0)
    windows = open_windows(config, "fake", "narrow", network, subjects, single)["train"]
    batches = [windows.training_batch(0, 4 * number, 4) for number in range(5)]
    assert cost["windows"] == 20 == 2 * len(subjects["train"])
    shapes = [batch["tokens"].shape for batch in batches]
    assert cost["tokens"] == pytest.approx(sum(n * t for n, t, _ in shapes))
    assert cost["flops"] == pytest.approx(3 * sum(network.flops(batch) for batch in batches))


def test_curves_end_at_the_whole_cost(study):
    train_cells(study)
    cells, curves, _ = read_cells(study.study(), "fake")
    for row in cells.to_dict("records"):
        curve = curves[row["model"], row["fraction"], row["seed"]]
        assert curve["flops"].iloc[-1] == pytest.approx(row["flops"])
        assert curve["loss"].iloc[-1] == pytest.approx(row["last_loss"])
        assert curve["loss"].min() == pytest.approx(row["loss"])


def test_tokens_that_are_not_known_are_asked_for(study):
    train_cells(study)
    layout = Layout(Path(study.results), "fake")
    for batch in range(2):
        table = read_table(layout.manifest("tokens", batch), dtype={"reason": str})
        write_table(layout.manifest("tokens", batch), table.drop(columns="n_tokens"))
    with pytest.raises(InputError, match="make the tokens again"):
        run_scaling(study, "fake")


def test_a_mixture_counts_its_datasets_by_their_weights(study):
    run_pretrain(study.study(), "fake", "narrow", 0, fraction=1.0)
    layout = Layout(Path(study.results), "fake")
    info = read_json(layout.cell("narrow", 1.0, 0) / "model.json")
    info["subjects"]["train"] = ["a/sub-1", "a/sub-2", "b/sub-1"]
    rows = [("a/sub-1", 10), ("a/sub-1", 30), ("a/sub-2", 60), ("b/sub-1", 100)]
    runs = pd.DataFrame(rows, columns=["subject", "n_tokens"]).astype({"n_tokens": str})
    runs["run"] = [f"run-{k}" for k in range(len(runs))]
    per_window = {}
    for weights in (None, {"a": 0.9, "b": 0.1}):
        info["settings"]["mixture"] = weights
        cost = training_cost(info, runs, layout.scaling)
        per_window[bool(weights)] = cost["tokens"] / cost["windows"] / 4
    assert per_window[False] == pytest.approx((20 + 60 + 100) / 3)
    assert per_window[True] == pytest.approx(0.9 * (20 + 60) / 2 + 0.1 * 100)
