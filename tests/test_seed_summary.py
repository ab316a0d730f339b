"""The summary over seeds: means, spread, and the same subjects for all of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_folds_statistics import classification, regression

from neuromamba.collect import Evaluation
from neuromamba.files import InputError
from neuromamba.metrics import compare, compute_metrics
from neuromamba.resampled import held_out_ratio, resampled_t_test
from neuromamba.seed_summary import summarize_seeds

SETTINGS = (400, 0.95, 0, 400)


def evaluate(seeds: int, folds: int = 4, repeats: int = 1) -> list[Evaluation]:
    """A model with other predictions for each seed, and an FC baseline that has the same."""
    shape = {"folds": max(folds, 1), "repeats": repeats}
    baseline = classification(skill=0.5, seed=100, name="fc", **shape)
    found = []
    for seed in range(seeds):
        own = classification(skill=1.5, seed=seed, name="model", **shape)
        table = pd.concat([own, baseline], ignore_index=True)
        table = table if folds else table.drop(columns="fold")
        nothing = pd.DataFrame()
        found.append(Evaluation("d", "model", seed, "t", nothing, nothing, table, {}))
    return found


def by_metric(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index("metric")


@pytest.mark.parametrize("folds", [0, 4])
def test_the_mean_and_the_sd_are_over_the_seeds_metrics(folds: int) -> None:
    evaluations = evaluate(3, folds)
    found = by_metric(summarize_seeds(evaluations, *SETTINGS))
    each = [compute_metrics(e.predictions, *SETTINGS) for e in evaluations]
    own = pd.concat([by_metric(t[t["predictor"] == "model"])["value"] for t in each], axis=1)
    fc = by_metric(each[0][each[0]["predictor"] == "fc"])["value"]
    assert (found["value"] - own.mean(axis=1)).abs().max() < 1e-12
    assert (found["sd"] - own.std(axis=1, ddof=1)).abs().max() < 1e-12
    assert (found["difference"] - (own.mean(axis=1) - fc)).abs().max() < 1e-12
    assert set(found["n_seeds"]) == {3}
    assert set(found["n"]) == {60}
    assert set(found["versus"]) == {"fc"}
    assert ((found["low"] < found["value"]) & (found["value"] < found["high"])).all()
    assert found["p_resampled"].drop("ece").notna().all() == (folds > 0)


@pytest.mark.parametrize("folds", [0, 4])
def test_seeds_that_say_the_same_are_as_good_as_one(folds: int) -> None:
    """The resamples and the swaps are of subjects: the same for all seeds."""
    first = evaluate(1, folds, repeats=max(1, folds // 2))[0]
    found = by_metric(summarize_seeds([replace(first, seed=k) for k in (3, 5, 8)], *SETTINGS))
    one = compute_metrics(first.predictions, *SETTINGS)
    one = by_metric(one[one["predictor"] == "model"])
    pair = by_metric(compare(first.predictions, "model", "fc", *SETTINGS))
    for ours, theirs in (
        ("value", one["value"]),
        ("low", one["low"]),
        ("high", one["high"]),
        ("p_chance", one["p"]),
        ("difference", pair["difference"]),
        ("difference_low", pair["low"]),
        ("difference_high", pair["high"]),
        ("p", pair["p"]),
        ("p_resampled", pair["p_resampled"]),
    ):
        pd.testing.assert_series_equal(found[ours], theirs, check_names=False, rtol=1e-9)
    assert list(found["better"].fillna("")) == list(pair["better"].fillna(""))
    assert found["sd"].abs().max() < 1e-12


def test_the_test_over_folds_is_of_differences_averaged_over_seeds() -> None:
    evaluations = evaluate(3, 5, repeats=2)
    right = []
    for e in evaluations:
        table = e.predictions
        hits = (table["y_true"] == table["y_pred"]).groupby([table["predictor"], table["fold"]])
        right.append(hits.mean()["model"] - hits.mean()["fc"])
    expected = resampled_t_test(np.mean(right, axis=0), held_out_ratio([12] * 10, 60))
    found = by_metric(summarize_seeds(evaluations, *SETTINGS)).loc["accuracy"]
    assert 1e-6 < expected < 0.9
    assert found["p_resampled"] == pytest.approx(expected)


def test_a_better_model_is_named_and_an_equal_one_is_not() -> None:
    found = by_metric(summarize_seeds(evaluate(3, 4, repeats=3), *SETTINGS))
    assert (found.loc[["auroc", "brier"], "better"] == "model").all()
    level = []
    for e in evaluate(3):
        table = e.predictions[e.predictions["predictor"] == "model"]
        level.append(replace(e, predictions=pd.concat([table, table.assign(predictor="fc")])))
    found = by_metric(summarize_seeds(level, *SETTINGS))
    assert found["better"].isna().all()
    assert (found["difference"] == 0).all()
    assert (found[["p", "p_resampled"]].drop("ece") == 1).all(axis=None)


def test_numbers_are_summarised_too() -> None:
    evaluations = []
    for seed in range(2):
        own = regression(noise=0.3, seed=seed, name="model")
        table = pd.concat([own, regression(noise=1.0, seed=9, name="fc")])
        nothing = pd.DataFrame()
        evaluations.append(Evaluation("d", "model", seed, "t", nothing, nothing, table, {}))
    found = by_metric(summarize_seeds(evaluations, *SETTINGS))
    assert list(found.index) == ["mae", "pearson_r", "r2"]
    assert found.loc["mae", "difference_high"] < 0
    assert found.loc["mae", "better"] == "model"


@pytest.mark.parametrize("folds", [1, 4])
def test_a_seed_without_a_value_leaves_nothing_to_claim(folds: int) -> None:
    """One training collapsed: it names one number for everybody."""
    evaluations = []
    for seed in range(3):
        own = regression(folds=folds, noise=0.2, seed=seed, name="model")
        own = own if seed else own.assign(y_pred=40.0)
        table = pd.concat([own, regression(folds=folds, noise=1.5, seed=9, name="fc")])
        table = table if folds > 1 else table.drop(columns="fold")
        nothing = pd.DataFrame()
        evaluations.append(Evaluation("d", "model", seed, "t", nothing, nothing, table, {}))
    found = by_metric(summarize_seeds(evaluations, *SETTINGS)).loc["pearson_r"]
    assert pd.isna(found["better"])
    told = found.drop(["n_seeds", "n", "versus", "better"]).astype(float)
    assert told.isna().all()
    others = by_metric(summarize_seeds(evaluations[1:], *SETTINGS)).loc["pearson_r"]
    assert others["better"] == "model"


def test_what_is_no_set_of_seeds_is_refused() -> None:
    evaluations = evaluate(2)
    with pytest.raises(InputError, match=r"two seeds or more, each once; .* seeds \[0\]"):
        summarize_seeds(evaluations[:1], *SETTINGS)
    with pytest.raises(InputError, match=r"seeds \[1, 1\]"):
        summarize_seeds([evaluations[1], evaluations[1]], *SETTINGS)
    with pytest.raises(InputError, match="one model and target"):
        summarize_seeds([evaluations[0], replace(evaluations[1], target="u")], *SETTINGS)
    other = evaluations[1].predictions
    fewer = replace(evaluations[1], predictions=other[other["subject"] != "sub-003"])
    with pytest.raises(InputError, match=r"model, seed 0 and model, seed 1 are of other subjects"):
        summarize_seeds([evaluations[0], fewer], *SETTINGS)
    lacking = replace(evaluations[1], predictions=other[other["predictor"] == "model"])
    with pytest.raises(InputError, match="seed 1: there is no fc among them"):
        summarize_seeds([evaluations[0], lacking], *SETTINGS)
    nobody = replace(evaluations[0], predictions=other[other["predictor"] == "fc"])
    with pytest.raises(InputError, match="seed 0: there is no model among them"):
        summarize_seeds([nobody, evaluations[1]], *SETTINGS)
