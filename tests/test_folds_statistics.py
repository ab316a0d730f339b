"""Metrics, intervals and p values under cross-validation, and the corrected resampled t-test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit
from sklearn.metrics import mean_absolute_error, roc_auc_score

from neuromamba.collect import Evaluation
from neuromamba.correction import corrected
from neuromamba.files import InputError
from neuromamba.metrics import compare, compute_metrics, read_predictions
from neuromamba.resampled import held_out_ratio, resampled_t_test
from neuromamba.statistics import correct, p_of_chance, p_of_difference
from neuromamba.tables import write_table

SETTINGS = (300, 0.95, 0, 300)


def classification(
    n: int = 60,
    folds: int = 4,
    repeats: int = 1,
    skill: float = 1.0,
    shift: float = 0.0,
    seed: int = 0,
    name: str = "m",
) -> pd.DataFrame:
    """Scores whose level differs between folds by `shift`, and that are others in each repeat."""
    rng = np.random.default_rng(seed)
    true = np.arange(n) % 2
    rows = []
    for repeat in range(repeats):
        fold = np.random.default_rng(repeat).permutation(n) % folds
        score = skill * true + rng.normal(size=n) + shift * fold
        share = 1 / (1 + np.exp(-score))
        table = pd.DataFrame({"subject": [f"sub-{i:03}" for i in range(n)], "predictor": name})
        table["fold"] = [f"fold-{repeat * folds + k}" for k in fold]
        table["y_true"] = [f"c{k}" for k in true]
        table["y_pred"] = [f"c{k}" for k in (share > 0.5).astype(int)]
        table["prob_c0"], table["prob_c1"] = 1 - share, share
        rows.append(table)
    return pd.concat(rows, ignore_index=True)


def regression(
    n: int = 60,
    folds: int = 4,
    repeats: int = 1,
    noise: float = 1.0,
    seed: int = 0,
    name: str = "m",
) -> pd.DataFrame:
    table = classification(n, folds, repeats)[["subject", "fold"]].assign(predictor=name)
    true = pd.Series(np.random.default_rng(99).normal(40, 10, n), sorted(set(table["subject"])))
    table["y_true"] = table["subject"].map(true)
    error = np.random.default_rng(seed).normal(0, 10, len(table))
    return table.assign(y_pred=table["y_true"] + noise * error)


def repeat_exactly(table: pd.DataFrame, times: int) -> pd.DataFrame:
    """The same folds and predictions again, as repeats of a cross-validation."""
    copies = [table.assign(fold=table["fold"] + f"-repeat-{k}") for k in range(times)]
    return pd.concat(copies, ignore_index=True)


def auroc(part: pd.DataFrame) -> float:
    return float(roc_auc_score(part["y_true"] == "c1", part["prob_c1"]))


def of_metric(table: pd.DataFrame, metric: str) -> pd.Series:
    return table.set_index("metric").loc[metric]


# --- The value ----------------------------------------------------------------------------------


def test_a_metric_is_the_mean_over_folds_and_not_of_pooled_scores() -> None:
    table = classification(shift=3.0)
    by_fold = [auroc(part) for _, part in table.groupby("fold")]
    found = compute_metrics(table, *SETTINGS)
    assert of_metric(found, "auroc")["value"] == pytest.approx(np.mean(by_fold), abs=1e-12)
    assert auroc(table) < np.mean(by_fold) - 0.1
    assert (found["n"] == 60).all()
    numbers = regression(repeats=3)
    errors = [
        mean_absolute_error(part["y_true"], part["y_pred"]) for _, part in numbers.groupby("fold")
    ]
    assert len(errors) == 12
    found = compute_metrics(numbers, *SETTINGS)
    assert of_metric(found, "mae")["value"] == pytest.approx(np.mean(errors), abs=1e-12)
    assert (found["n"] == 60).all()


@pytest.mark.parametrize("make", [classification, regression])
def test_one_fold_gives_to_the_bit_what_a_holdout_gives(make) -> None:
    table = pd.concat([make(folds=1, seed=1, name="a"), make(folds=1, seed=2, name="b")])
    holdout = table.drop(columns="fold")
    pd.testing.assert_frame_equal(
        compute_metrics(table, *SETTINGS), compute_metrics(holdout, *SETTINGS), check_exact=True
    )
    one, other = (compare(each, "a", "b", *SETTINGS) for each in (table, holdout))
    pd.testing.assert_frame_equal(
        one.drop(columns="better"), other.drop(columns="better"), check_exact=True
    )
    assert other["p_resampled"].isna().all()


def test_a_fold_without_both_classes_is_left_out_of_the_auroc_alone() -> None:
    table = classification(folds=4)
    lost = (table["fold"] == "fold-0") & (table["y_true"] == "c0")
    table = table[~lost]
    by_fold = {fold: part for fold, part in table.groupby("fold")}
    expected = np.mean([auroc(part) for fold, part in by_fold.items() if fold != "fold-0"])
    found = compute_metrics(table, *SETTINGS)
    row = of_metric(found, "auroc")
    assert row["value"] == pytest.approx(expected, abs=1e-12)
    assert row["low"] < row["value"] < row["high"]
    assert row["p"] < 0.05
    right = [(part["y_true"] == part["y_pred"]).mean() for part in by_fold.values()]
    assert of_metric(found, "accuracy")["value"] == pytest.approx(np.mean(right), abs=1e-12)


def test_small_folds_that_lose_a_class_in_a_resample_leave_an_interval() -> None:
    found = of_metric(
        compute_metrics(classification(n=40, folds=10, skill=0.5), *SETTINGS), "auroc"
    )
    assert 0 <= found["low"] < found["value"] < found["high"] <= 1
    assert np.isfinite(found["p"])


def test_rows_may_stand_in_any_order() -> None:
    table = pd.concat([classification(repeats=2, seed=s, name=n) for s, n in ((0, "a"), (1, "b"))])
    shuffled = table.sample(frac=1, random_state=0)
    first, second = (
        compute_metrics(each, *SETTINGS).sort_values(["predictor", "metric"], ignore_index=True)
        for each in (table, shuffled)
    )
    pd.testing.assert_frame_equal(first, second)
    pd.testing.assert_frame_equal(
        compare(table, "a", "b", *SETTINGS), compare(shuffled, "a", "b", *SETTINGS)
    )


def test_folds_are_text_also_where_they_look_like_numbers(tmp_path: Path) -> None:
    table = classification(folds=2)
    table["fold"] = table["fold"].str.removeprefix("fold-")
    write_table(tmp_path / "predictions.tsv", table)
    read = read_predictions(tmp_path / "predictions.tsv")
    assert set(read["fold"]) == {"0", "1"}
    pd.testing.assert_frame_equal(
        compute_metrics(read, *SETTINGS), compute_metrics(table, *SETTINGS)
    )


# --- Subjects are what is drawn, shuffled and swapped -------------------------------------------


@pytest.mark.parametrize("make", [classification, regression])
def test_repeats_that_say_the_same_make_nothing_more_certain(make) -> None:
    """Rows that were drawn one by one would narrow the interval, and lower p."""
    table = pd.concat([make(seed=1, name="a"), make(seed=2, name="b")], ignore_index=True)
    again = repeat_exactly(table, 5)
    once, often = (compute_metrics(each, *SETTINGS) for each in (table, again))
    pd.testing.assert_frame_equal(once, often)
    once, often = (compare(each, "a", "b", *SETTINGS) for each in (table, again))
    # The test over folds knows repeats only by their differences: it is another one with each.
    columns = ["p_resampled", "better"]
    pd.testing.assert_frame_equal(once.drop(columns=columns), often.drop(columns=columns))


def test_repeats_that_say_something_else_make_the_interval_narrower() -> None:
    once, often = (
        of_metric(compute_metrics(regression(repeats=k), *SETTINGS), "mae") for k in (1, 10)
    )
    assert often["high"] - often["low"] < 0.6 * (once["high"] - once["low"])


def test_false_positives_are_as_rare_as_alpha_says() -> None:
    chance, paired = [], []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        true = np.arange(80) % 2
        folds = [who for _ in range(2) for who in np.array_split(rng.permutation(80), 4)]
        # As good as each other, and alike in what they get wrong in both repeats.
        shared, own = true + rng.normal(size=80), rng.normal(size=(3, 80))
        score = np.stack([shared + own[0], shared + own[1], own[2]])[:, np.concatenate(folds)]
        score += 0.5 * rng.normal(size=score.shape)
        share = np.stack([1 - expit(score), expit(score)], axis=2)
        paired.append(p_of_difference(true, *share[:2], 99, seed, folds))
        chance.append(p_of_chance(true, share[2], 99, seed, folds))
    for found in (pd.DataFrame(chance), pd.DataFrame(paired)):
        rate = (found <= 0.1).mean()
        assert (rate < 0.17).all()
        assert (rate > 0.03).all()


def test_skill_and_a_real_difference_are_found() -> None:
    table = pd.concat(
        [
            regression(n=100, repeats=2, noise=0.3, name="good", seed=1),
            regression(n=100, repeats=2, noise=1.5, name="bad", seed=2),
        ]
    )
    assert (compute_metrics(table, *SETTINGS)["p"] < 0.01).all()
    found = compare(table, "good", "bad", *SETTINGS)
    assert (found[["p", "p_resampled"]] < 0.01).all(axis=None)
    assert (found["better"] == "good").all()


# --- What is refused ----------------------------------------------------------------------------


def test_tables_that_are_no_cross_validation_are_refused() -> None:
    table = classification()
    twice = pd.concat([table, table.iloc[:1]])
    with pytest.raises(InputError, match=r"predictions of m: fold-\d tests sub-000 twice"):
        compute_metrics(twice, *SETTINGS)
    nowhere = table.assign(fold=table["fold"].where(table.index > 2))
    with pytest.raises(InputError, match=r"3 row\(s\) are of no fold"):
        compute_metrics(nowhere, *SETTINGS)
    changed = repeat_exactly(table, 2)
    changed.loc[5, "y_true"] = "c0"
    with pytest.raises(InputError, match="label of sub-005 differs between folds"):
        compute_metrics(changed, *SETTINGS)


def test_predictors_of_other_folds_are_not_compared() -> None:
    other = classification(name="b")
    other.loc[other["subject"] == "sub-000", "fold"] = "fold-9"
    with pytest.raises(InputError, match="a and b are of other subjects, labels or folds"):
        compare(pd.concat([classification(name="a"), other]), "a", "b", *SETTINGS)


# --- The corrected resampled t-test -------------------------------------------------------------


def test_the_corrected_t_test_is_that_of_repeated_cross_validation() -> None:
    """F = 1 + T K / (K - 1) of Bouckaert and Frank's variance, T repeats of K folds."""
    k, repeats = 5, 4
    differences = np.random.default_rng(0).normal(0.03, 0.05, k * repeats)
    ratio = held_out_ratio([20] * (k * repeats), 100)
    inflation = 1 + repeats * k / (k - 1)
    error = np.sqrt(inflation * differences.var(ddof=1) / len(differences))
    expected = 2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1)
    found = resampled_t_test(differences, ratio)
    assert 0.01 < expected < 0.9
    assert found == pytest.approx(expected, rel=1e-12)
    assert found > stats.ttest_1samp(differences, 0).pvalue
    assert resampled_t_test(-differences, ratio) == found
    assert resampled_t_test([*differences, np.nan], ratio) == found


def test_the_corrected_t_test_without_spread_or_folds() -> None:
    assert np.isnan(resampled_t_test([0.1], 0.25))
    assert np.isnan(resampled_t_test([0.1, np.nan], 0.25))
    assert resampled_t_test([0.0, 1e-12, 0.0], 0.25) == 1.0
    assert resampled_t_test([0.1, 0.1, 0.1], 0.25) == 0.0


def test_compare_hands_the_differences_of_the_folds_to_the_test() -> None:
    table = pd.concat(
        [regression(n=58, repeats=2, seed=s, name=n) for s, n in ((1, "a"), (2, "b"))]
    )
    errors = (table["y_true"] - table["y_pred"]).abs().groupby([table["predictor"], table["fold"]])
    apart = errors.mean()["a"] - errors.mean()["b"]
    sizes = errors.size()["a"]
    assert set(sizes) == {14, 15}
    ratio = (sizes / (58 - sizes)).mean()
    found = of_metric(compare(table, "a", "b", *SETTINGS), "mae")
    assert found["p_resampled"] == pytest.approx(resampled_t_test(apart, ratio))
    assert 0.01 < found["p_resampled"] < 1


def test_a_difference_is_of_the_folds_in_which_both_are_defined() -> None:
    """A predictor that is constant in one fold, where the other is at its worst."""
    one, other = regression(noise=1.0, seed=1, name="a"), regression(noise=0.5, seed=2, name="b")
    bad = other["fold"] == "fold-0"
    other.loc[bad, "y_pred"] = 80 - other.loc[bad, "y_pred"]
    one.loc[one["fold"] == "fold-0", "y_pred"] = 40.0
    r = [
        {fold: np.corrcoef(part["y_true"], part["y_pred"])[0, 1] for fold, part in parts}
        for parts in (table[~bad].groupby("fold") for table in (one, other))
    ]
    apart = [r[0][fold] - r[1][fold] for fold in r[1]]
    found = of_metric(compare(pd.concat([one, other]), "a", "b", *SETTINGS), "pearson_r")
    assert len(apart) == 3
    assert found["difference"] == pytest.approx(np.mean(apart), abs=1e-12)
    assert found["difference"] < -0.05
    assert found["low"] < found["difference"] < found["high"] < 0.2
    values = compute_metrics(pd.concat([one, other]), *SETTINGS).set_index(["predictor", "metric"])
    own, others = (values.loc[(name, "pearson_r"), "value"] for name in "ab")
    assert own - others > 0.1  # of other folds


def test_a_difference_that_not_all_folds_have_is_not_claimed() -> None:
    good, bad = regression(noise=0.4, seed=1, name="a"), regression(noise=1.0, seed=2, name="b")
    turned = good["fold"] == "fold-0"
    good.loc[turned, "y_pred"] += 6 * np.sign(good.loc[turned, "y_pred"] - good["y_true"][turned])
    found = of_metric(compare(pd.concat([good, bad]), "a", "b", *SETTINGS), "mae")
    assert found["high"] < 0
    assert found["p"] < 0.05 < found["p_resampled"]
    assert found["better"] is None


def differences_of_equals(simulations: int, k: int, repeats: int) -> np.ndarray:
    """(simulation, fold) differences in MAE of two regressions that are as good as each other.

    The target is the sum of thirty variables that are alike; each regression sees half of them.
    """
    rng = np.random.default_rng(0)
    n = 60
    x = rng.normal(size=(simulations, n, 30))
    y = x.sum(axis=2) + rng.normal(size=(simulations, n))
    found = []
    for _ in range(repeats):
        for test in np.array_split(rng.permutation(n), k):
            train = np.setdiff1d(np.arange(n), test)
            errors = []
            for seen in (x[:, :, :15], x[:, :, 15:]):
                across = seen[:, train].transpose(0, 2, 1)
                weights = np.linalg.solve(across @ seen[:, train], across @ y[:, train, None])
                errors.append(np.abs(y[:, test] - (seen[:, test] @ weights)[..., 0]).mean(axis=1))
            found.append(errors[0] - errors[1])
    return np.stack(found, axis=1)


@pytest.mark.parametrize("repeats", [1, 10])
def test_the_plain_t_test_claims_too_much_and_the_corrected_one_does_not(repeats: int) -> None:
    differences = differences_of_equals(1000, 5, repeats)
    ratio = held_out_ratio([12] * 5 * repeats, 60)
    plain = np.mean(stats.ttest_1samp(differences, 0, axis=1).pvalue <= 0.05)
    rate = np.mean([resampled_t_test(row, ratio) <= 0.05 for row in differences])
    assert plain > (0.08 if repeats == 1 else 0.4)
    assert 0.01 < rate < 0.085


# --- Correction for the number of comparisons ---------------------------------------------------


def evaluation(seed: int, p: list[float], p_resampled: list[float]) -> Evaluation:
    comparison = pd.DataFrame({"predictor": "m", "versus": "fc", "metric": ["auroc", "accuracy"]})
    comparison = comparison.assign(p=p, p_resampled=p_resampled, better="m")
    metrics = pd.DataFrame({"predictor": "m", "metric": ["auroc", "accuracy"], "p": [0.01, 0.04]})
    predictions = pd.DataFrame({"fold": ["fold-0", "fold-1"]})
    return Evaluation("d", "m", seed, "t", metrics, comparison, predictions, {})


def test_the_larger_p_is_what_holm_corrects() -> None:
    first = evaluation(0, [0.001, 0.030], [0.020, 0.002])
    second = evaluation(1, [0.040, 0.001], [0.010, 0.001])
    found = corrected([first, second])
    holm = [list(each.comparison["p_holm"]) for each in found]
    assert [holm[0][0], holm[1][0]] == pytest.approx(correct([0.020, 0.040]))
    assert [holm[0][1], holm[1][1]] == pytest.approx(correct([0.030, 0.001]))
    assert list(found[0].metrics["p_holm"]) == pytest.approx([0.02, 0.08])
    without = [replace(e, predictions=pd.DataFrame()) for e in (first, second)]
    plain = [list(each.comparison["p_holm"]) for each in corrected(without)]
    assert [plain[0][0], plain[1][0]] == pytest.approx(correct([0.001, 0.040]))


def test_over_folds_nothing_is_claimed_where_one_of_the_two_p_is_missing() -> None:
    first = evaluation(0, [0.001, 0.030], [np.nan, 0.002])
    second = evaluation(1, [0.040, np.nan], [0.010, 0.001])
    found = [each.comparison for each in corrected([first, second])]
    assert np.isnan([found[0]["p_holm"][0], found[1]["p_holm"][1]]).all()
    assert [found[1]["p_holm"][0], found[0]["p_holm"][1]] == pytest.approx([0.040, 0.030])
    assert [list(table["better"].fillna("")) for table in found] == [["", "m"], ["m", ""]]
