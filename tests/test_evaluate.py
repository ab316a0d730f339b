"""Evaluation and its baselines: what is predicted, on whom, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricate import (
    make_config,
    make_data,
    make_model,
    make_participants,
    make_split,
    predict_by_age_and_sex,
    run_both,
)
from sklearn.metrics import roc_auc_score

from neuromamba import evaluate
from neuromamba.baseline_predictions import (
    choose_subjects,
    predict_references,
    read_baselines,
    run_baselines,
)
from neuromamba.config import Config
from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.scoring import write_metrics
from neuromamba.tables import read_table, write_table

N = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, split and finished models of 40 subjects, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    config = make_data(folder, N)
    parts = make_split(config, N, test=16)
    for target in ("sex", "age"):
        make_model(config, parts, target)
    return folder


@pytest.fixture
def config(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(evaluate, "predict_subjects", predict_by_age_and_sex())
    return make_config(tmp_path)


def results(config: Config, target: str) -> Path:
    return Layout(Path(config.results), "toy").evaluate("small", 0, target)


def test_each_predictor_is_scored_on_the_same_test_subjects(config: Config) -> None:
    run_both(config, "toy", "small", 0, "sex")
    predictions = read_table(results(config, "sex") / "predictions.tsv")
    assert list(predictions["predictor"].unique()) == ["small", "fc", "confounds", "majority"]
    for _, rows in predictions.groupby("predictor"):
        assert list(rows["subject"]) == [f"sub-{i:03}" for i in range(24, 40)]
        assert (rows["y_score"] == rows["prob_male"]).all()
        assert ((rows["y_pred"] == "male") == (rows["prob_male"] > 0.5)).all()
        assert rows[["prob_female", "prob_male"]].sum(axis=1).to_numpy() == pytest.approx(1)
    metrics = read_table(results(config, "sex") / "metrics.tsv")
    assert list(metrics.columns) == ["predictor", "metric", "value", "low", "high", "p", "n"]
    values = metrics.set_index(["predictor", "metric"])["value"]
    assert values["majority", "auroc"] == 0.5
    fc = predictions[predictions["predictor"] == "fc"]
    expected = roc_auc_score(fc["y_true"] == "male", fc["y_score"])
    assert values["fc", "auroc"] == pytest.approx(expected)
    assert values["fc", "auroc"] > 0.8  # the signal carries the sex


@pytest.mark.parametrize("target", ["centre", "scanner"])
def test_where_the_target_is_the_site_nothing_is_harmonised(config: Config, target: str) -> None:
    classes = {"up": "north", "down": "south"}
    other = make_config(
        Path(config.results).parent,
        dataset={
            "targets": {target: {"kind": "classification", "column": "site", "classes": classes}}
        },
        evaluate={"baselines": ["fc", "fc-combat"], "inner_folds": 3},
    )
    run_baselines(other, "toy", target)
    subjects = choose_subjects(other, "toy", target)
    predicted, notes = read_baselines(other, "toy", target, subjects)
    assert list(predicted) == list(notes) == ["fc"]


def test_numbers_are_predicted_too(config: Config) -> None:
    run_both(config, "toy", "small", 0, "age")
    predictions = read_table(results(config, "age") / "predictions.tsv")
    assert list(predictions["predictor"].unique()) == ["small", "fc", "confounds", "mean"]
    assert predictions["y_score"].isna().all()
    labels = make_participants(Path(config.results).parent, N).set_index("participant_id")["age"]
    mean = predictions[predictions["predictor"] == "mean"]
    assert mean["y_pred"].to_numpy() == pytest.approx(labels.iloc[:24].mean())
    values = read_table(results(config, "age") / "metrics.tsv")
    values = values.set_index(["predictor", "metric"])["value"]
    assert np.isnan(values["mean", "pearson_r"])
    assert values["fc", "mae"] < values["mean", "mae"]


def test_metrics_come_from_the_predictions_file_alone(config: Config) -> None:
    run_both(config, "toy", "small", 0, "sex")
    folder = results(config, "sex")
    before = {name: (folder / name).read_bytes() for name in ("metrics.tsv", "comparison.tsv")}
    for name in before:
        (folder / name).unlink()
    write_metrics(folder, "small", config)
    assert {name: (folder / name).read_bytes() for name in before} == before
    predictions = read_table(folder / "predictions.tsv")
    predictions["prob_male"] = 1 - predictions["prob_male"]
    predictions["prob_female"] = 1 - predictions["prob_female"]
    write_table(folder / "predictions.tsv", predictions)
    write_metrics(folder, "small", config)
    assert (folder / "metrics.tsv").read_bytes() != before["metrics.tsv"]


def test_notes_tell_how_the_baseline_was_made(config: Config) -> None:
    run_both(config, "toy", "small", 0, "sex")
    notes = read_json(results(config, "sex") / "notes.json")
    assert (notes["n_train"], notes["n_test"], notes["n_unlabelled"]) == (24, 16, 0)
    assert notes["seen_subjects"] == []
    assert notes["classes"] == ["female", "male"]
    assert notes["train_labels"] == {"female": pytest.approx(1 / 3), "male": pytest.approx(2 / 3)}
    fc, confounds = notes["baselines"]["fc"], notes["baselines"]["confounds"]
    assert fc["n_rois"] + fc["n_rois_dropped"] == 64
    assert fc["inverse_penalty"] > 0
    assert fc["confounds_regressed"] == []
    assert confounds["columns"] == ["age", "site", "tsnr"]  # of equal length, without confounds


def test_the_baseline_is_the_same_beside_every_seed(config: Config) -> None:
    layout = Layout(Path(config.results), "toy")
    shutil.copytree(layout.finetune("small", 0, "sex"), layout.finetune("small", 7, "sex"))
    tables = []
    for seed in (0, 7):
        run_both(config, "toy", "small", seed, "sex")
        metrics = read_table(layout.evaluate("small", seed, "sex") / "metrics.tsv")
        tables.append(metrics.set_index("predictor"))
    pd.testing.assert_frame_equal(tables[0].loc[["fc"]], tables[1].loc[["fc"]])
    assert not tables[0].loc[["small"]].equals(tables[1].loc[["small"]])


def test_every_predictor_has_p_and_calibration_and_the_model_is_compared_with_each(
    config: Config,
) -> None:
    run_both(config, "toy", "small", 0, "sex")
    metrics = read_table(results(config, "sex") / "metrics.tsv").set_index(["predictor", "metric"])
    names = ["auroc", "balanced_accuracy", "accuracy", "brier", "ece"]
    assert list(metrics.loc["small"].index) == names
    assert metrics.loc[("fc", "auroc"), "p"] < 0.05  # the signal carries the sex
    assert metrics.loc[("majority", "auroc"), "p"] == 1
    assert metrics.loc[("majority", "brier"), "value"] == pytest.approx(
        (1 / 3) ** 2 * 10 / 16 + (2 / 3) ** 2 * 6 / 16
    )
    compared = read_table(results(config, "sex") / "comparison.tsv")
    assert list(compared.columns) == [
        *[
            "predictor",
            "versus",
            "metric",
            "difference",
            "low",
            "high",
            "p",
            "p_resampled",
            "better",
        ]
    ]
    assert list(compared["versus"].unique()) == ["fc", "confounds", "majority"]
    known = compared[compared["metric"] != "ece"]["p"]
    assert known.between(1 / 5001, 1).all()
    settled = compared[compared["better"].notna()]
    assert (settled["p"] <= 0.05).all()


def test_a_subject_that_has_lost_its_runs_is_not_counted_and_stops_nobody(config: Config) -> None:
    """The split stays when another atlas, say, leaves out all runs of a subject."""
    path = Layout.of(config, "toy").manifest("rois", 0)
    manifest = read_table(path, dtype=str).set_index("run")
    lost = ["sub-003_task-rest", f"{choose_subjects(config, 'toy', 'sex').test.index[0]}_task-rest"]
    manifest.loc[lost, "reason"] = "the atlas does not meet it"
    write_table(path, manifest.reset_index())
    run_both(config, "toy", "small", 0, "sex")
    notes = read_json(results(config, "sex") / "notes.json")
    assert (notes["n_train"], notes["n_test"], notes["n_without_runs"]) == (23, 15, 2)
    predictions = read_table(results(config, "sex") / "predictions.tsv")
    assert not set(predictions["subject"]) & {name.split("_")[0] for name in lost}


def test_the_baselines_are_those_that_the_config_names(config: Config) -> None:
    changes = {
        "baselines": ["fc", "fc-regress", "fc-svm", "roi-mean"],
        "confounds": ["site"],
        "bootstrap": 20,
        "inner_folds": 2,
    }
    chosen = make_config(Path(config.results).parent, evaluate=changes)
    run_both(chosen, "toy", "small", 0, "age")
    predictions = read_table(results(config, "age") / "predictions.tsv")
    names = ["small", "fc", "fc-regress", "fc-svm", "roi-mean", "mean"]
    assert list(predictions["predictor"].unique()) == names
    notes = read_json(results(config, "age") / "notes.json")
    assert notes["baselines"]["fc-regress"]["confounds_regressed"] == ["site"]
    assert notes["baselines"]["fc-svm"]["confounds_regressed"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"baselines": ["fc", "fc-partial"]}}, "fc-partial.*rois.connectivity"),
        ({"evaluate": {"baselines": ["confounds"]}}, "must have fc among them"),
        ({"evaluate": {"baselines": ["fc", "fc"]}}, "names one twice"),
        ({"evaluate": {"confounds": ["handedness"]}}, "handedness|confounds"),
    ],
)
def test_baselines_that_cannot_be_are_refused_early(
    tmp_path: Path, changes: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)
    rois = {"cube": 24.0, "connectivity": ["pearson", "partial"]}
    make_config(tmp_path, evaluate={"baselines": ["fc", "fc-partial"]}, rois=rois)


# --- Whom a model has seen ----------------------------------------------------------------------


def train_on_test_subjects(config: Config, earlier: bool) -> None:
    layout = Layout(Path(config.results), "toy")
    parts = make_split(config, N, test=16)
    leaky = {**parts, "train": parts["train"] + parts["test"][:7]}
    folder = make_model(config, parts if earlier else leaky, "sex")
    if earlier:
        info = read_json(folder / "model.json")
        info["pretrained_from"] = {"subjects": {"train": leaky["train"]}}
        write_json(layout.finetune("small", 0, "sex") / "model.json", info)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_model_is_not_tested_on_whom_it_has_seen(config: Config, earlier: bool) -> None:
    train_on_test_subjects(config, earlier)
    with pytest.raises(InputError, match=r"7 of 16 test subjects.*sub-024, sub-025.*allow_seen"):
        run_both(config, "toy", "small", 0, "sex")
    assert not results(config, "sex").exists()


def test_on_request_it_is_and_the_notes_name_them(config: Config) -> None:
    train_on_test_subjects(config, True)
    changed = config.evaluate.model_copy(update={"allow_seen_subjects": True})
    run_both(config.model_copy(update={"evaluate": changed}), "toy", "small", 0, "sex")
    notes = read_json(results(config, "sex") / "notes.json")
    assert notes["seen_subjects"] == [f"sub-{i:03}" for i in range(24, 31)]


# --- Bad input ----------------------------------------------------------------------------------


def edit_labels(config: Config, **columns: object) -> None:
    path = Path(config.results).parent / "participants.tsv"
    write_table(path, read_table(path).assign(**columns))


def test_subjects_without_a_label_are_left_out_and_counted(config: Config) -> None:
    sex = ["F", "M"] * 20
    sex[0] = sex[30] = "n/a"
    edit_labels(config, sex=sex)
    run_both(config, "toy", "small", 0, "sex")
    notes = read_json(results(config, "sex") / "notes.json")
    assert (notes["n_train"], notes["n_test"], notes["n_unlabelled"]) == (23, 15, 2)
    predictions = read_table(results(config, "sex") / "predictions.tsv")
    assert "sub-030" not in set(predictions["subject"])


def test_one_class_in_training_is_refused(config: Config) -> None:
    edit_labels(config, sex=["F"] * 24 + ["F", "M"] * 8)
    with pytest.raises(InputError, match=r"participants\.tsv: column 'sex'.*'female'.*24"):
        run_both(config, "toy", "small", 0, "sex")


def test_one_class_in_the_test_part_leaves_metrics_undefined(config: Config) -> None:
    edit_labels(config, sex=["F", "M"] * 12 + ["M"] * 16)
    run_both(config, "toy", "small", 0, "sex")
    metrics = read_table(results(config, "sex") / "metrics.tsv").set_index(["predictor", "metric"])
    assert metrics.loc[("fc", "auroc"), ["value", "low", "high"]].isna().all()
    assert metrics.loc[("fc", "accuracy"), "value"] > 0


def test_too_few_labels_are_refused(config: Config) -> None:
    edit_labels(config, sex=["F", "M"] * 12 + ["n/a"] * 16)
    with pytest.raises(InputError, match=r"24 training and 0 test subject\(s\)"):
        choose_subjects(config, "toy", "sex")


def test_a_class_that_training_lacks_gets_no_probability(config: Config) -> None:
    edit_labels(config, sex=["A", "B"] * 18 + ["C"] * 4)
    classes = {"alpha": "A", "beta": "B", "gamma": "C"}
    target = {"kind": "classification", "column": "sex", "classes": classes}
    config = make_config(Path(config.results).parent, dataset={"targets": {"sex": target}})
    subjects = choose_subjects(config, "toy", "sex")
    table = predict_references(config, "toy", "sex", subjects)[0]["fc"]
    assert list(table) == ["prob_alpha", "prob_beta", "prob_gamma"]
    assert (table["prob_gamma"] == 0).all()
    assert table.sum(axis=1).to_numpy() == pytest.approx(1)


def test_predictions_that_are_not_finite_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> pd.DataFrame:
        table = predict_by_age_and_sex()(*args)
        table.loc[3, "prob_male"] = np.nan
        return table

    monkeypatch.setattr(evaluate, "predict_subjects", broken)
    with pytest.raises(InputError, match=r"no finite prediction for sub-027"):
        run_both(config, "toy", "small", 0, "sex")


def test_a_model_that_was_not_trained_is_named(config: Config) -> None:
    with pytest.raises(InputError, match=r"seed-3/finetune/sex/model\.json"):
        run_both(config, "toy", "small", 3, "sex")


def test_a_model_cannot_have_a_baselines_name(config: Config) -> None:
    with pytest.raises(InputError, match="'fc' is the name of a baseline"):
        run_both(config, "toy", "fc", 0, "sex")
