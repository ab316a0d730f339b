"""Metrics against scikit-learn, intervals against known sampling distributions."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from neuromamba.files import InputError
from neuromamba.metrics import compare, compute_metrics
from neuromamba.weighted_metrics import calibration_error, weighted_auroc


def classification(n: int = 60, classes: int = 2, seed: int = 0, name: str = "m") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    true = rng.integers(classes, size=n)
    true[:classes] = range(classes)
    # Rounded, so that there are ties.
    score = np.round(np.eye(classes)[true] + rng.normal(size=(n, classes)), 1)
    share = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    table = pd.DataFrame({"subject": [f"sub-{i:03}" for i in range(n)], "predictor": name})
    table["y_true"] = [f"c{k}" for k in true]
    table["y_pred"] = [f"c{k}" for k in share.argmax(axis=1)]
    table["y_score"] = share[:, 1] if classes == 2 else np.nan
    for k in range(classes):
        table[f"prob_c{k}"] = share[:, k]
    return table


def regression(n: int = 60, noise: float = 1.0, seed: int = 0, name: str = "m") -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    true = rng.normal(40, 10, size=n)
    return pd.DataFrame(
        {
            "subject": [f"sub-{i:03}" for i in range(n)],
            "predictor": name,
            "y_true": true,
            "y_pred": true + noise * rng.normal(0, 10, size=n),
        }
    )


def values(table: pd.DataFrame, predictor: str = "m") -> dict[str, float]:
    return table[table["predictor"] == predictor].set_index("metric")["value"].to_dict()


@pytest.mark.parametrize("classes", [2, 4])
def test_classification_metrics_are_scikit_learns(classes: int) -> None:
    table = classification(classes=classes)
    probability = table.filter(like="prob_").to_numpy()
    true = table["y_true"].str[1:].astype(int)
    score = probability[:, 1] if classes == 2 else probability
    found = values(compute_metrics(table, 10, 0.95, 0, 200))
    expected = {
        "auroc": reference.roc_auc_score(true, score, multi_class="ovr"),
        "balanced_accuracy": reference.balanced_accuracy_score(table["y_true"], table["y_pred"]),
        "accuracy": reference.accuracy_score(table["y_true"], table["y_pred"]),
        "brier": reference.brier_score_loss(true, score),
    }
    del found["ece"]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_calibration_error_is_that_of_the_reliability_curve() -> None:
    table = classification(n=200)
    true, score = table["y_true"] == "c1", table["prob_c1"].to_numpy()
    share, predicted = calibration_curve(true, score, n_bins=10)
    counts = np.bincount(np.digitize(score, np.linspace(0, 1, 11)[1:-1], right=True))
    expected = np.abs(share - predicted) @ counts[counts > 0] / 200
    assert values(compute_metrics(table, 10, 0.95, 0, 200))["ece"] == pytest.approx(
        expected, abs=1e-12
    )


def test_with_more_classes_the_calibration_error_is_of_the_most_probable_one() -> None:
    table = classification(n=40, classes=3)
    table[["prob_c0", "prob_c1", "prob_c2"]] = [0.75, 0.15, 0.1]
    error = abs(0.75 - (table["y_true"] == "c0").mean())
    assert values(compute_metrics(table, 10, 0.95, 0, 200))["ece"] == pytest.approx(error)


def test_calibrated_probabilities_have_a_small_calibration_error_and_sharpened_ones_have_not() -> (
    None
):
    rng = np.random.default_rng(0)
    share = rng.random(20_000)
    true = (rng.random(20_000) < share).astype(np.int64)
    ones = np.ones((1, 20_000))
    error = calibration_error(true, np.column_stack([1 - share, share]))(ones)[0]
    assert error < 0.02
    sharp = share**3 / (share**3 + (1 - share) ** 3)
    assert calibration_error(true, np.column_stack([1 - sharp, sharp]))(ones)[0] > 0.1


def test_p_is_small_where_there_is_skill_and_one_where_there_is_none() -> None:
    skilled = compute_metrics(classification(n=100), 10, 0.95, 0, 999).set_index("metric")["p"]
    assert (skilled.drop("ece") == 0.001).all()
    assert np.isnan(skilled["ece"])
    constant = classification().assign(prob_c0=0.3, prob_c1=0.7)
    found = compute_metrics(constant, 10, 0.95, 0, 200).set_index("metric")["p"]
    assert (found.drop("ece") == 1).all()


def test_regression_metrics_are_scikit_learns() -> None:
    table = regression()
    true, predicted = table["y_true"], table["y_pred"]
    assert values(compute_metrics(table, 10, 0.95, 0, 200)) == pytest.approx(
        {
            "mae": reference.mean_absolute_error(true, predicted),
            "pearson_r": np.corrcoef(true, predicted)[0, 1],
            "r2": reference.r2_score(true, predicted),
        },
        abs=1e-12,
    )


def test_weights_count_as_copies_of_a_subject() -> None:
    rng = np.random.default_rng(1)
    positive, score = rng.random(30) < 0.4, np.round(rng.normal(size=30), 1)
    weight = rng.integers(0, 4, size=(5, 30))
    found = weighted_auroc(positive, score, weight.astype(float))
    copies = [
        reference.roc_auc_score(np.repeat(positive, row), np.repeat(score, row)) for row in weight
    ]
    assert found == pytest.approx(copies, abs=1e-12)


def test_intervals_cover_the_true_value_as_often_as_they_say() -> None:
    # The scores of the two classes differ by a normal variable of mean 1 and variance 2.
    truth = norm.cdf(1 / np.sqrt(2))
    inside = 0
    for seed in range(200):
        table = classification(n=80, seed=seed)
        accuracy = compute_metrics(table, 200, 0.9, 0, 200).set_index("metric").loc["accuracy"]
        inside += accuracy["low"] <= truth <= accuracy["high"]
    assert 0.83 < inside / 200 < 0.96


def test_the_interval_of_the_calibration_error_is_about_its_value() -> None:
    """Of probabilities that come true nearly as often as they say: resampling adds most to it."""
    share = np.repeat(np.arange(0.05, 1, 0.1), 20)
    occurs = np.tile(np.arange(20), 10) < np.round(20 * share)
    table = classification(n=200)
    table["y_true"] = np.where(occurs, "c1", "c0")
    table["prob_c1"], table["prob_c0"] = share + 0.01, 0.99 - share
    row = compute_metrics(table, 500, 0.95, 0, 200).set_index("metric").loc["ece"]
    assert row["value"] == pytest.approx(0.01)
    assert 0 <= row["low"] < row["value"] < row["high"]
    other = table.assign(predictor="other", prob_c0=0.5, prob_c1=0.5)
    row = compare(pd.concat([table, other]), "m", "other", 500, 0.95, 0, 200)
    row = row.set_index("metric").loc["ece"]
    assert row["low"] < row["difference"] < row["high"]


def test_the_same_seed_gives_the_same_interval_and_another_one_another() -> None:
    table = classification()
    first = compute_metrics(table, 50, 0.95, 0, 200)
    pd.testing.assert_frame_equal(first, compute_metrics(table, 50, 0.95, 0, 200))
    assert not first.equals(compute_metrics(table, 50, 0.95, 1, 200))
    assert (first["low"] < first["value"]).all()
    assert (first["value"] < first["high"]).all()


def test_rows_may_stand_in_any_order() -> None:
    table = classification()
    shuffled = table.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        compute_metrics(table, 50, 0.95, 0, 200), compute_metrics(shuffled, 50, 0.95, 0, 200)
    )


def test_every_resample_has_a_rare_class() -> None:
    table = classification(n=40)
    table["y_true"] = ["c1"] * 2 + ["c0"] * 38
    found = compute_metrics(table, 500, 0.95, 0, 200).set_index("metric").loc["auroc"]
    assert np.isfinite(found[["low", "high"]].astype(float)).all()


def test_what_is_undefined_is_missing() -> None:
    constant = regression().assign(y_pred=37.1)
    found = compute_metrics(constant, 50, 0.95, 0, 200).set_index("metric")
    assert found.loc["pearson_r", ["value", "low", "high"]].isna().all()
    assert found.loc["r2", "value"] == pytest.approx(0, abs=0.2)
    one_class = classification().assign(y_true="c1")
    found = compute_metrics(one_class, 50, 0.95, 0, 200).set_index("metric")
    assert found.loc["auroc", ["value", "low", "high"]].isna().all()
    assert np.isfinite(found.loc["accuracy", "value"])


def test_a_constant_score_has_an_auroc_of_one_half() -> None:
    table = classification().assign(prob_c0=0.3, prob_c1=0.7)
    found = compute_metrics(table, 50, 0.95, 0, 200).set_index("metric").loc["auroc"]
    assert tuple(found[["value", "low", "high"]]) == (0.5, 0.5, 0.5)


def test_a_better_predictor_is_told_from_a_worse_one_and_equals_are_not() -> None:
    table = pd.concat(
        [regression(noise=0.3, name="good"), regression(noise=2, name="bad")], ignore_index=True
    )
    found = compare(table, "good", "bad", 500, 0.95, 0, 200).set_index("metric")
    assert (found["better"] == "good").all()
    assert found.loc["mae", "difference"] < 0 < found.loc["r2", "difference"]
    turned = compare(table, "bad", "good", 500, 0.95, 0, 200).set_index("metric")
    assert (turned["better"] == "good").all()
    same = pd.concat([classification(name="a"), classification(name="b")], ignore_index=True)
    level = compare(same, "a", "b", 500, 0.95, 0, 200).set_index("metric")
    assert level["better"].isna().all()
    assert (level["p"].drop("ece") == 1).all()
    assert (found["p"] < 0.01).all()


def test_a_true_class_without_a_column_is_refused() -> None:
    table = classification()
    table.loc[0, "y_true"] = "other"
    with pytest.raises(InputError, match="no column for class 'other'"):
        compute_metrics(table, 10, 0.95, 0, 200)


def test_two_thousand_resamples_of_five_hundred_subjects_take_seconds() -> None:
    table = classification(n=500)
    start = time.perf_counter()
    compute_metrics(table, 2000, 0.95, 0, 200)
    assert time.perf_counter() - start < 8
