"""Evaluation and its baselines: what is predicted, on whom, and what is refused."""

from __future__ import annotations

import shutil
import time
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
)
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from neuromamba import evaluate
from neuromamba.baselines import (
    keep_common,
    no_features,
    predict_class,
    predict_number,
    rotate,
)
from neuromamba.config import Config
from neuromamba.evaluate import FC, choose_subjects, run_evaluate, write_metrics
from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
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
    run_evaluate(config, "toy", "small", 0, "sex")
    predictions = read_table(results(config, "sex") / "predictions.tsv")
    assert list(predictions["predictor"].unique()) == ["small", "fc", "majority"]
    for _, rows in predictions.groupby("predictor"):
        assert list(rows["subject"]) == [f"sub-{i:03}" for i in range(24, 40)]
        assert (rows["y_score"] == rows["prob_male"]).all()
        assert ((rows["y_pred"] == "male") == (rows["prob_male"] > 0.5)).all()
        assert rows[["prob_female", "prob_male"]].sum(axis=1).to_numpy() == pytest.approx(1)
    metrics = read_table(results(config, "sex") / "metrics.tsv")
    assert list(metrics.columns) == ["predictor", "metric", "value", "low", "high", "n"]
    values = metrics.set_index(["predictor", "metric"])["value"]
    assert values["majority", "auroc"] == 0.5
    fc = predictions[predictions["predictor"] == "fc"]
    expected = roc_auc_score(fc["y_true"] == "male", fc["y_score"])
    assert values["fc", "auroc"] == pytest.approx(expected)
    assert values["fc", "auroc"] > 0.8  # the signal carries the sex


def test_numbers_are_predicted_too(config: Config) -> None:
    run_evaluate(config, "toy", "small", 0, "age")
    predictions = read_table(results(config, "age") / "predictions.tsv")
    assert list(predictions["predictor"].unique()) == ["small", "fc", "mean"]
    assert predictions["y_score"].isna().all()
    labels = make_participants(Path(config.results).parent, N).set_index("participant_id")["age"]
    mean = predictions[predictions["predictor"] == "mean"]
    assert mean["y_pred"].to_numpy() == pytest.approx(labels.iloc[:24].mean())
    values = read_table(results(config, "age") / "metrics.tsv")
    values = values.set_index(["predictor", "metric"])["value"]
    assert np.isnan(values["mean", "pearson_r"])
    assert values["fc", "mae"] < values["mean", "mae"]


def test_metrics_come_from_the_predictions_file_alone(config: Config) -> None:
    run_evaluate(config, "toy", "small", 0, "sex")
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
    run_evaluate(config, "toy", "small", 0, "sex")
    notes = read_json(results(config, "sex") / "notes.json")
    assert (notes["n_train"], notes["n_test"], notes["n_unlabelled"]) == (24, 16, 0)
    assert notes["seen_subjects"] == []
    assert notes["classes"] == ["female", "male"]
    assert notes["train_labels"] == {"female": pytest.approx(1 / 3), "male": pytest.approx(2 / 3)}
    assert notes["fc"]["n_rois"] + notes["fc"]["n_rois_dropped"] == 64
    assert notes["fc"]["inverse_penalty"] > 0


def test_the_baseline_is_the_same_beside_every_seed(config: Config) -> None:
    layout = Layout(Path(config.results), "toy")
    shutil.copytree(layout.finetune("small", 0, "sex"), layout.finetune("small", 7, "sex"))
    tables = []
    for seed in (0, 7):
        run_evaluate(config, "toy", "small", seed, "sex")
        metrics = read_table(layout.evaluate("small", seed, "sex") / "metrics.tsv")
        tables.append(metrics.set_index("predictor"))
    pd.testing.assert_frame_equal(tables[0].loc[["fc"]], tables[1].loc[["fc"]])
    assert not tables[0].loc[["small"]].equals(tables[1].loc[["small"]])


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
        run_evaluate(config, "toy", "small", 0, "sex")
    assert not results(config, "sex").exists()


def test_on_request_it_is_and_the_notes_name_them(config: Config) -> None:
    train_on_test_subjects(config, True)
    changed = config.evaluate.model_copy(update={"allow_seen_subjects": True})
    run_evaluate(config.model_copy(update={"evaluate": changed}), "toy", "small", 0, "sex")
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
    run_evaluate(config, "toy", "small", 0, "sex")
    notes = read_json(results(config, "sex") / "notes.json")
    assert (notes["n_train"], notes["n_test"], notes["n_unlabelled"]) == (23, 15, 2)
    predictions = read_table(results(config, "sex") / "predictions.tsv")
    assert "sub-030" not in set(predictions["subject"])


def test_one_class_in_training_is_refused(config: Config) -> None:
    edit_labels(config, sex=["F"] * 24 + ["F", "M"] * 8)
    with pytest.raises(InputError, match=r"participants\.tsv: column 'sex'.*'female'.*24"):
        run_evaluate(config, "toy", "small", 0, "sex")


def test_one_class_in_the_test_part_leaves_metrics_undefined(config: Config) -> None:
    edit_labels(config, sex=["F", "M"] * 12 + ["M"] * 16)
    run_evaluate(config, "toy", "small", 0, "sex")
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
    table, _ = evaluate.predict_fc(config, "toy", subjects)
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
        run_evaluate(config, "toy", "small", 0, "sex")


def test_a_model_that_was_not_trained_is_named(config: Config) -> None:
    with pytest.raises(InputError, match=r"seed-3/finetune/sex/model\.json"):
        run_evaluate(config, "toy", "small", 3, "sex")


def test_a_model_cannot_have_a_baselines_name(config: Config) -> None:
    with pytest.raises(InputError, match="'fc' is the name of a baseline"):
        run_evaluate(config, "toy", FC, 0, "sex")


# --- Baselines ----------------------------------------------------------------------------------


def features(n: int = 60, p: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, p)).astype(np.float32)
    return values, values[:, :20].sum(axis=1) + rng.normal(size=n)


def test_rotated_features_give_the_same_linear_models() -> None:
    x, signal = features()
    train, test = x[:40], x[40:]
    centred = train - train.mean(axis=0)
    size = np.sqrt((centred**2).sum(axis=1).mean())
    rotated, rotated_test = rotate(train, test)
    assert rotated.shape[1] <= 40
    ridge = Ridge(alpha=0.5).fit(centred / size, signal[:40])
    expected = ridge.predict((test - train.mean(axis=0)) / size)
    found = Ridge(alpha=0.5).fit(rotated, signal[:40]).predict(rotated_test)
    assert found == pytest.approx(expected, abs=1e-4)
    label = signal[:40] > 0
    logistic = LogisticRegression(C=3, tol=1e-8, max_iter=5000)
    expected = logistic.fit(centred / size, label).predict_proba((test - train.mean(axis=0)) / size)
    assert logistic.fit(rotated, label).predict_proba(rotated_test) == pytest.approx(
        expected, abs=1e-4
    )


def test_what_can_be_learnt_is_learnt() -> None:
    x, signal = features(n=500, p=100)
    probability, _ = predict_class(x[:400], (signal[:400] > 0).astype(np.int64), x[400:], 5, 0)
    assert roc_auc_score(signal[400:] > 0, probability[:, 1]) > 0.9
    predicted, _ = predict_number(x[:400], signal[:400], x[400:], 5, 0)
    assert np.corrcoef(predicted, signal[400:])[0, 1] > 0.9


def test_noise_is_not_learnt() -> None:
    scores = []
    for seed in range(10):
        x, _ = features(n=120, seed=seed)
        label = np.random.default_rng(seed + 99).integers(2, size=120)
        probability, _ = predict_class(x[:60], label[:60], x[60:], 5, 0)
        scores.append(roc_auc_score(label[60:], probability[:, 1]))
    assert abs(np.mean(scores) - 0.5) < 0.08


@pytest.mark.parametrize("rare", [1, 2])
def test_a_class_of_one_or_two_subjects_is_enough(rare: int) -> None:
    x, _ = features(n=20)
    label = np.array([1] * rare + [0] * (18 - rare), dtype=np.int64)
    probability, chosen = predict_class(x[:18], label, x[18:], 5, 0)
    assert probability.shape == (2, 2)
    assert chosen == 1.0 if rare == 1 else chosen > 0


def test_features_that_do_not_vary_give_the_base_rate() -> None:
    label = np.array([0, 1] * 5, dtype=np.int64)
    probability, _ = predict_class(np.ones((10, 4)), label, np.ones((3, 4)), 5, 0)
    assert probability == pytest.approx(0.5)


def test_pairs_that_many_lack_are_dropped_and_others_filled() -> None:
    values = np.arange(20 * 6, dtype=np.float32).reshape(20, 6)
    values[:5, [0, 1, 2]] = np.nan  # ROI 0, in pairs with 1, 2 and 3, in 5 of 18 subjects
    values[7, 3] = values[19, 4] = np.nan
    found = keep_common(values, 18, 4)
    assert found.train.shape == (18, 3)
    assert (found.n_rois, found.n_dropped) == (3, 1)
    assert found.missing == pytest.approx(2 / 60)
    rotated, rotated_test = rotate(found.train, found.test)
    assert np.isfinite(rotated).all()
    assert np.isfinite(rotated_test).all()
    values[:9] = np.nan
    with pytest.raises(InputError, match="no two of the 4 ROIs"):
        keep_common(values, 18, 4)


def test_guessing_knows_the_training_labels_only() -> None:
    labels = pd.Series(["a", "b", "b", "b"])
    assert no_features(labels, ["a", "b", "c"]) == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert no_features(pd.Series([1.0, 2.0, 6.0]), []) == {"value": 3.0}


def test_five_hundred_subjects_and_an_atlas_of_400_take_seconds() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 76_000), dtype=np.float32)
    label = rng.integers(2, size=500)
    start = time.perf_counter()
    predict_class(x[:450], label[:450], x[450:], 5, 0)
    assert time.perf_counter() - start < 40
