"""Targets that are states: from events to samples, models, baselines and metrics."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray
from fabricate import run_both
from state_data import (
    BLOCK,
    TARGET,
    make_state_data,
    shuffle_events,
    state_config,
    write_events,
)

from neuromamba.baseline_predictions import choose_subjects, predict_references
from neuromamba.checkpoint import load_model_info
from neuromamba.excerpts import Excerpt
from neuromamba.files import InputError, read_json
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.keys import Keys
from neuromamba.layout import Layout
from neuromamba.pool import run_pool
from neuromamba.predictor import open_predictor
from neuromamba.pretrain import run_pretrain
from neuromamba.record import seen_subjects
from neuromamba.report import run_report
from neuromamba.roi_features import load_connectivity
from neuromamba.splits import run_splits
from neuromamba.stage_settings import settings_of
from neuromamba.stages import Job
from neuromamba.state_windows import StateWindows
from neuromamba.states import read_states
from neuromamba.tables import read_table, write_table

N = 13
EVALUATE = {
    "baselines": ["fc", "roi-mean", "confounds"],
    "bootstrap": 100,
    "permutations": 200,
    "inner_folds": 3,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of `N` subjects and a pretrained model, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    make_state_data(state_config(folder), folder, N)
    run_pretrain(state_config(folder), "toy", "small", 0)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def metrics_of(config, predictor: str | None = None) -> pd.DataFrame:
    table = read_table(Layout.of(config, "toy").evaluate("small", 0, "side") / "metrics.tsv")
    table = table.set_index(["predictor", "metric"])
    return table if predictor is None else table.loc[predictor]


# --- Samples and windows ------------------------------------------------------------------------


def test_volumes_and_windows_are_labelled_by_the_events(made: Path):
    config = state_config(made)
    states = read_states(config, "toy", "side")
    run = "sub-001_task-view_run-2"
    events = read_table(made / "events/sub-001/func" / f"{run}_events.tsv")
    labels = states.labels[run]
    for k, block in enumerate(events["trial_type"]):
        # 4 s are two volumes.
        of_block = labels[2 + k * BLOCK : 2 + (k + 1) * BLOCK]
        assert (of_block == {"left": 0, "right": 1, "rest": -1}[block]).all()
    samples = states.samples([4])
    assert len(samples) == 2 * N
    assert samples["sub-001:right"] == 1
    # A window as long as a run is of no state.
    assert states.samples([4, 6 * BLOCK]) == {}


def test_only_windows_of_a_state_are_drawn_and_samples_take_turns(made: Path):
    config = state_config(made)
    states = read_states(config, "toy", "side")
    samples = {k: v for k, v in states.samples([4]).items() if k.startswith(("sub-000", "sub-001"))}

    class AnyReader:
        def positions(self, run: str) -> int:
            return 6 * BLOCK // 2 - 1

    runs = {name: states.runs[name] for name in ("sub-000", "sub-001")}
    windows = StateWindows(runs, [AnyReader()], 0.0, states, samples, 4)
    assert windows.subjects == sorted(samples)
    assert windows.people == ["sub-000", "sub-001"]
    drawn = [windows.sample(0, number) for number in range(400)]
    for window in [*drawn, *windows.spaced(5)]:
        inside = states.labels[window.run][2 * window.start : 2 * window.start + 4]
        assert (inside == samples[window.subject]).mean() >= 0.75
        assert window.run.startswith(window.subject.split(":")[0])
    assert pd.Series([window.subject for window in drawn]).value_counts().nunique() == 1
    assert [windows.sample(0, k) for k in range(9)] == drawn[:9]
    every = {(w.run, w.start) for w in windows.spaced(1000, ["sub-001:left"])}
    expected = {
        (run, int(start))
        for run in runs["sub-001"]
        for start in np.flatnonzero(states.windows(run, 4) == 0)
    }
    assert every == expected


def test_a_run_without_events_is_left_out_and_none_at_all_is_an_error(folder: Path):
    config = state_config(folder)
    (folder / "events/sub-001/func/sub-001_task-view_run-2_events.tsv").unlink()
    states = read_states(config, "toy", "side")
    assert "has no *_events.tsv that applies" in states.left_out["sub-001_task-view_run-2"]
    assert states.runs["sub-001"] == ["sub-001_task-view_run-1"]
    shutil.rmtree(folder / "events")
    with pytest.raises(InputError, match="set `events` in the dataset YAML"):
        read_states(config, "toy", "side")


# --- Models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["probe", "head", "full", "adapters"])
def test_a_model_of_each_mode_is_trained_on_states(folder: Path, mode: str):
    config = state_config(folder, {"mode": mode})
    run_finetune(config, "toy", "small", 0, "side")
    model = Layout.of(config, "toy").finetune("small", 0, "side")
    info = load_model_info(model)
    assert info["subjects"]["validation"] == ["sub-008", "sub-009"]
    assert seen_subjects(info, "toy") == {f"sub-{k:03}" for k in range(10)}
    assert info["scaling"] == {"class_weights": [1.0, 1.0]}
    samples = [f"sub-{k:03}:{side}" for k in (10, 11, 12) for side in ("left", "right")]
    found = predict_subjects(config, "toy", "small", 0, "side", samples)
    assert found["subject"].tolist() == samples
    assert found[["prob_left", "prob_right"]].sum(axis=1).to_numpy() == pytest.approx(1)
    alone = predict_subjects(config, "toy", "small", 0, "side", samples[3:4])
    assert alone.iloc[0].tolist() == found.iloc[3].tolist()
    assert not (model / "calibration.json").exists()
    # It is finished, and is not trained again.
    before = (model / "model.json").stat().st_mtime_ns
    run_finetune(config, "toy", "small", 0, "side")
    assert (model / "model.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="which is a state"):
        open_predictor(model)


def test_other_events_are_another_training(folder: Path):
    config = state_config(folder)
    run_finetune(config, "toy", "small", 0, "side")
    write_events(folder, "sub-000_task-view_run-1", ["left", "right"] * 3)
    with pytest.raises(InputError, match="states"):
        run_finetune(config, "toy", "small", 0, "side")


# --- Baselines ----------------------------------------------------------------------------------


def test_an_excerpt_is_of_standardised_runs(made: Path):
    layout = Layout.of(state_config(made), "toy")
    stores = [layout.array("rois", f"sub-001_task-view_run-{k}") for k in (1, 2)]
    taken = [np.arange(6 * BLOCK) % 3 == k for k in (0, 1)]
    found = Excerpt(tuple(zip(stores, taken, strict=True))).read()
    parts = []
    for store, mine in zip(stores, taken, strict=True):
        series = xarray.open_zarr(store)["timeseries"].values.astype(float)
        with np.errstate(invalid="ignore"):
            parts.append(((series - series.mean(0)) / series.std(0))[mine])
    np.testing.assert_allclose(found, np.concatenate(parts), rtol=1e-6, atol=1e-9)
    features = load_connectivity(
        {"s": [Excerpt(tuple(zip(stores, taken, strict=True)))]}, ["s"], []
    )
    kept = np.isfinite(found[0])
    z = np.arctanh(np.corrcoef(found[:, kept].T)[np.triu_indices(kept.sum(), k=1)])
    np.testing.assert_allclose(features.train[0], z, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="run rois again"):
        Excerpt(((stores[0], taken[0][:-1]),)).read()


def test_baselines_predict_each_subject_in_each_state(made: Path):
    names = ["fc", "fc-svm", "fc-kernel-ridge", "fc-tangent", "roi-mean", "fc-combat", "confounds"]
    config = state_config(made, evaluate={"baselines": names, "inner_folds": 3, "bootstrap": 50})
    subjects = choose_subjects(config, "toy", "side")
    assert (len(subjects.train), len(subjects.test)) == (20, 6)
    assert subjects.tested == ["sub-010", "sub-011", "sub-012"]
    predicted, notes = predict_references(config, "toy", "side", subjects)
    # Nothing is known of motion, and sites are the same in all states.
    assert list(predicted) == list(notes) == names[:5]
    assert all(list(table.index) == list(subjects.test.index) for table in predicted.values())
    right = predicted["roi-mean"]["prob_right"]
    assert (right[subjects.test == "right"] > 0.5).all()
    assert (right[subjects.test == "left"] < 0.5).all()


def test_three_states_of_which_one_has_several_cells(made: Path):
    classes = {"side": ["left", "right"], "rest": "rest", "never": "sleep"}
    target = {**TARGET, "classes": classes}
    evaluate = {**EVALUATE, "baselines": ["fc", "roi-mean"]}
    config = state_config(made, dataset={"targets": {"side": target}}, evaluate=evaluate)
    subjects = choose_subjects(config, "toy", "side")
    assert subjects.test.value_counts().to_dict() == {"side": 3, "rest": 3}
    predicted, _ = predict_references(config, "toy", "side", subjects)
    found = predicted["roi-mean"]
    assert (found["prob_never"] == 0).all()
    assert ((found["prob_rest"] > 0.5) == (subjects.test == "rest")).all()


def test_motion_in_the_state_is_the_confound(folder: Path):
    config = state_config(folder, evaluate={"baselines": ["fc", "fc-regress", "confounds"]})
    layout = Layout.of(config, "toy")
    index, states = read_table(layout.index, dtype={"run": str}), read_states(config, "toy", "side")
    for run, labels in states.labels.items():
        noise = np.random.default_rng(len(run)).uniform(0, 0.02, len(labels))
        fd = np.where(labels == 1, 0.3, 0.1) + noise
        fd[0] = np.nan
        columns = {"framewise_displacement": fd, "std_dvars": 1 + noise}
        write_table(folder / f"{run}_confounds.tsv", pd.DataFrame(columns))
    index["confounds"] = [str(folder / f"{run}_confounds.tsv") for run in index["run"]]
    write_table(layout.index, index)
    subjects = choose_subjects(config, "toy", "side")
    predicted, notes = predict_references(config, "toy", "side", subjects)
    assert notes["confounds"]["columns"] == ["mean_fd", "std_dvars"]
    assert notes["fc-regress"]["confounds_regressed"] == ["mean_fd", "std_dvars"]
    said = predicted["confounds"]["prob_right"] > 0.5
    assert (said == (subjects.test == "right")).all()


# --- Evaluation ---------------------------------------------------------------------------------

LEARNING = {"mode": "head", "steps": 60, "learning_rate": 0.01, "warmup_steps": 5}


@pytest.mark.parametrize("finetune", [{"mode": "probe"}, {**LEARNING, "validate_every": 20}])
def test_what_differs_between_states_is_found(folder: Path, finetune: dict):
    config = state_config(folder, finetune, evaluate=EVALUATE)
    run_finetune(config, "toy", "small", 0, "side")
    run_both(config, "toy", "small", 0, "side")
    results = Layout.of(config, "toy").evaluate("small", 0, "side")
    table = read_table(results / "predictions.tsv")
    assert list(table.columns[:4]) == ["subject", "state", "predictor", "y_true"]
    assert (table["state"] == table["y_true"]).all()
    assert list(table["predictor"].unique()) == ["small", "fc", "roi-mean", "majority"]
    assert table.groupby("predictor").size().eq(6).all()
    found = metrics_of(config)
    assert (found["n"] == 3).all()
    assert found.loc[("small", "auroc"), "value"] > 0.9
    assert found.loc[("roi-mean", "auroc"), "value"] > 0.9
    assert found.loc[("majority", "auroc"), "value"] == 0.5
    notes = read_json(results / "notes.json")
    assert (notes["n_train"], notes["n_test"]) == (10, 3)
    assert notes["samples"] == {"train": 20, "test": 6}
    assert notes["baselines_left_out"] == ["confounds"]
    assert notes["seen_subjects"] == []


def test_a_test_subject_that_was_trained_on_is_refused(folder: Path):
    config = state_config(folder, evaluate=EVALUATE)
    run_finetune(config, "toy", "small", 0, "side")
    layout = Layout.of(config, "toy")
    split = read_table(layout.split)
    split["part"] = split["part"].iloc[::-1].to_numpy()
    write_table(layout.split, split)
    with pytest.raises(InputError, match="3 of 3 test subjects were used to train"):
        run_both(config, "toy", "small", 0, "side")


def test_shuffled_events_are_predicted_at_chance(folder: Path):
    """Over some shuffles of all events, the mean AUROC is near a half."""
    areas = []
    for seed in range(3):
        shuffle_events(folder, seed)
        config = state_config(folder, evaluate={**EVALUATE, "baselines": ["fc", "roi-mean"]})
        run_finetune(config, "toy", "small", 0, "side", "restart")
        run_both(config, "toy", "small", 0, "side")
        areas.append(metrics_of(config)["value"].unstack()["auroc"])
    mean = pd.DataFrame(areas).mean()
    assert 0.25 < mean["small"] < 0.75
    assert 0.25 < mean["roi-mean"] < 0.75


def test_all_folds_of_a_cross_validation_are_put_together(folder: Path):
    splits = {"protocol": "k-fold", "folds": 2}
    config = state_config(folder, evaluate=EVALUATE, splits=splits)
    run_splits(config, "toy")
    for name in config.splits.names:
        fold = config.in_fold(name)
        run_pretrain(fold, "toy", "small", 0)
        run_finetune(fold, "toy", "small", 0, "side")
        run_both(fold, "toy", "small", 0, "side")
    run_pool(config, "toy", "small", 0, "side")
    found = metrics_of(config)
    assert (found["n"] == N).all()  # whoever has a run is tested
    assert found.loc[("small", "auroc"), "value"] > 0.9
    assert found.loc[("small", "auroc"), "p"] < 0.05
    results = Layout.of(config, "toy").evaluate("small", 0, "side")
    notes = read_json(results / "notes.json")
    assert notes["n_test"] == N
    assert notes["samples"]["test"] == 2 * N
    compared = read_table(results / "comparison.tsv").set_index(["versus", "metric"])
    assert compared.loc[("majority", "brier"), "better"] == "small"


def test_the_report_tells_what_was_tested(folder: Path):
    config = state_config(folder, evaluate=EVALUATE)
    run_finetune(config, "toy", "small", 0, "side")
    run_both(config, "toy", "small", 0, "side")
    run_report(config)
    page = Layout.of(config, "toy").results / "report" / "index.html"
    text = " ".join(page.read_text().split())
    assert "in which state (left, right) parts of scans were taken, side" in text
    assert "3 subjects are tested, in 6 samples: a sample is a subject in a state." in text
    assert "trained on 20 samples (subjects in a state) of the 10 labelled subjects" in text
    assert "confound model: left out, because" in text
    assert "windows of all its runs (of side, of those that were taken in the state)." in text
    assert "A number, column" not in text
    assert "drawn within each true class" not in text


# --- Keys and settings --------------------------------------------------------------------------


def test_changed_events_make_what_learns_from_them_stale(folder: Path):
    def keys() -> dict[str, str | None]:
        of = Keys(state_config(folder))
        jobs = {"model": "small", "seed": 0, "target": "side"}
        found = {stage: of.key(Job(stage, "toy", **jobs)) for stage in ("finetune", "evaluate")}
        found["baselines"] = of.key(Job("baselines", "toy", target="side"))
        return found | {"pretrain": of.key(Job("pretrain", "toy", model="small"))}

    before = keys()
    assert None not in before.values()
    assert keys() == before
    write_events(folder, "sub-000_task-view_run-1", ["left", "right"] * 3)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {
        *("finetune", "evaluate", "baselines")
    }


def test_a_model_with_other_windows_changes_who_is_tested(tmp_path: Path):
    config = state_config(tmp_path)
    assert settings_of(config, Job("baselines", "toy", target="side"))["windows"] == [4]
    target = settings_of(config, Job("baselines", "toy", target="side"))["target"]
    assert target["classes"] == [["left", ["left"]], ["right", ["right"]]]
    assert target["lag"] == TARGET["lag"]
