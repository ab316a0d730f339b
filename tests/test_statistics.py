"""p values against scipy and statsmodels, and as often below alpha as they say when nothing is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from neuromamba.permutations import shuffles, swaps
from neuromamba.statistics import (
    correct,
    p_of_chance,
    p_of_difference,
)


def classes(n: int, skill: float, seed: int, number: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """True classes, and probabilities that know of them as much as `skill` says."""
    rng = np.random.default_rng(seed)
    true = np.arange(n) % number
    score = skill * np.eye(number)[true] + rng.normal(size=(n, number))
    return true, np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)


def numbers(n: int, skill: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.normal(size=n)
    return true, skill * true + rng.normal(size=n)


# --- Against references -------------------------------------------------------------------------


def test_the_auroc_against_chance_is_the_mann_whitney_test() -> None:
    true, probability = classes(40, 0.5, 1)
    score = probability[:, 1]
    expected = stats.mannwhitneyu(score[true == 1], score[true == 0], alternative="greater").pvalue
    found = p_of_chance(true, probability, 20_000, 0)["auroc"]
    assert 0.005 < expected < 0.5
    assert found == pytest.approx(expected, abs=0.01)


def test_r_and_r2_and_mae_against_chance_are_scipys_permutation_test() -> None:
    true, predicted = numbers(30, 0.4, 3)
    reference = {
        "pearson_r": lambda y: np.corrcoef(y, predicted)[0, 1],
        "mae": lambda y: -np.abs(y - predicted).mean(),
    }
    found = p_of_chance(true, predicted, 20_000, 0)
    for name, statistic in reference.items():
        expected = stats.permutation_test(
            (true,),
            statistic,
            permutation_type="pairings",
            alternative="greater",
            n_resamples=5000,
            rng=np.random.default_rng(1),
        ).pvalue
        assert 0.005 < expected < 0.5
        assert found[name] == pytest.approx(expected, abs=0.02)
    assert found["r2"] == pytest.approx(found["pearson_r"], abs=1e-12)


def test_the_accuracy_of_two_is_mcnemars_test() -> None:
    true, first = classes(60, 1.0, 0)
    _, second = classes(60, 0.6, 7)
    right = [(p.argmax(axis=1) == true) for p in (first, second)]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    expected = stats.binomtest(only[0], sum(only), 0.5).pvalue
    assert 0.01 < expected < 0.9
    found = p_of_difference(true, first, second, 20_000, 0)["accuracy"]
    assert found == pytest.approx(expected, abs=0.01)


def test_the_mae_of_two_is_scipys_paired_permutation_test() -> None:
    true, first = numbers(25, 1.0, 1)
    second = true + 1.5 * np.random.default_rng(8).normal(size=25)
    losses = np.abs(true - first), np.abs(true - second)
    expected = stats.permutation_test(
        losses,
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).pvalue
    assert 0.005 < expected < 0.9
    found = p_of_difference(true, first, second, 20_000, 0)["mae"]
    assert found == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("number", [2, 3])
def test_swaps_of_scores_give_the_p_of_all_arrangements(number: int) -> None:
    true, first = classes(9, 1.2, 0, number)
    _, second = classes(9, 0.0, 5, number)
    ranks = [np.column_stack([stats.rankdata(c) for c in p.T]) for p in (first, second)]

    def difference(swap: np.ndarray) -> tuple[float, float]:
        mixed = [np.where(swap[:, None], b, a) for a, b in (ranks, ranks[::-1])]
        own = [np.where(swap[:, None], b, a) for a, b in ((first, second), (second, first))]
        columns = [1] if number == 2 else range(number)
        areas = [np.mean([roc_auc_score(true == k, m[:, k]) for k in columns]) for m in mixed]
        right = [balanced_accuracy_score(true, p.argmax(axis=1)) for p in own]
        return areas[0] - areas[1], right[0] - right[1]

    every = np.array([difference(np.array(s, dtype=bool)) for s in product([0, 1], repeat=9)])
    expected = (np.abs(every) >= np.abs(every[0]) - 1e-9).mean(axis=0)
    found = p_of_difference(true, first, second, 20_000, 0)
    assert found["auroc"] == pytest.approx(expected[0], abs=0.015)
    assert found["balanced_accuracy"] == pytest.approx(expected[1], abs=0.015)


def test_units_and_scales_do_not_matter_where_the_metric_is_blind_to_them() -> None:
    true, first = classes(50, 1.0, 0)
    _, second = classes(50, 0.3, 4)
    squeezed = second.copy()
    squeezed[:, 1] = 0.4 + 0.01 * second[:, 1]
    squeezed[:, 0] = 1 - squeezed[:, 1]
    plain, other = (p_of_difference(true, first, s, 500, 0)["auroc"] for s in (second, squeezed))
    assert plain == other
    y, a = numbers(50, 1.0, 0)
    _, b = numbers(50, 0.2, 5)
    r = [p_of_difference(y, a, b * scale + 3, 500, 0)["pearson_r"] for scale in (1, 1000)]
    assert r[0] == pytest.approx(r[1])


def test_corrections_are_holms_and_leave_gaps() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, 0.005])
    assert correct(p)[[0, 2, 3, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert np.isnan(correct(p)[1])
    assert np.isnan(correct([np.nan])).all()


def test_corrections_are_those_of_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.round(np.random.default_rng(0).random(50) ** 2, 2)  # with ties and 0
    expected = multitest.multipletests(p, method="holm")[1]
    assert correct(p) == pytest.approx(expected)


# --- What holds always --------------------------------------------------------------------------


def test_p_is_a_count_of_whole_arrangements_and_never_zero() -> None:
    true, probability = classes(80, 5.0, 0)
    found = p_of_chance(true, probability, 99, 0)
    assert set(found) == {"auroc", "balanced_accuracy", "accuracy", "brier"}
    assert set(found.values()) == {0.01}
    _, other = classes(80, -5.0, 1)
    assert p_of_difference(true, probability, other, 99, 0)["auroc"] == 0.01


def test_arrangements_are_seeded_and_come_in_blocks_with_the_observed_one_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = np.concatenate(list(shuffles(10, 50, 3)))
    assert whole.shape == (51, 10)
    assert (whole[0] == np.arange(10)).all()
    assert (np.sort(whole, axis=1) == np.arange(10)).all()
    assert (whole[1:] != np.arange(10)).any(axis=1).all()
    assert (np.concatenate(list(shuffles(10, 50, 3))) == whole).all()
    monkeypatch.setattr("neuromamba.permutations.BLOCK", 70)
    blocks = list(swaps(10, 50, 3))
    assert max(len(block) for block in blocks) == 7
    assert sum(map(len, blocks)) == 51
    assert not blocks[0][0].any()
    assert all(block[1:].any() for block in blocks)


def test_what_is_undefined_has_no_p() -> None:
    true, probability = classes(20, 1.0, 0)
    one_class = np.ones_like(true)
    assert np.isnan(p_of_chance(one_class, probability, 50, 0)["auroc"])
    assert np.isnan(p_of_difference(one_class, probability, probability[::-1], 50, 0)["auroc"])
    y, predicted = numbers(20, 1.0, 0)
    constant = np.full(20, 0.3)
    assert np.isnan(p_of_chance(y, constant, 50, 0)["pearson_r"])
    assert p_of_chance(y, constant, 50, 0)["mae"] == 1.0
    assert np.isnan(p_of_chance(constant, predicted, 50, 0)["r2"])
    assert np.isnan(p_of_difference(y, predicted, constant, 50, 0)["pearson_r"])
    assert p_of_difference(y, predicted, constant, 50, 0)["mae"] < 1


@pytest.mark.parametrize("number", [2, 3])
def test_false_positives_are_as_rare_as_alpha_says_for_classes(number: int) -> None:
    chance, paired = [], []
    for seed in range(200):
        true, first = classes(45, 0.0, seed, number)
        chance.append(p_of_chance(true, first, 199, seed))
        # As good as each other, and alike in what they get wrong.
        _, skilled = classes(45, 1.0, 1000 + seed, number)
        own = np.random.default_rng(2000 + seed).dirichlet(np.ones(number), size=(2, 45))
        paired.append(p_of_difference(true, *(0.6 * skilled + 0.4 * own), 199, seed))
    for found in (chance, paired):
        for name in found[0]:
            rate = np.mean([p[name] <= 0.1 for p in found])
            assert rate < 0.17, name
            # Metrics that take few values have coarse p, which are too large rather than too small.
            assert rate > (0.04 if name in ("auroc", "brier") else 0.01), name


def test_false_positives_are_as_rare_as_alpha_says_for_numbers() -> None:
    chance, paired = [], []
    for seed in range(200):
        true, first = numbers(40, 0.0, seed)
        chance.append(p_of_chance(true, first, 199, seed))
        noise = np.random.default_rng(1000 + seed).normal(size=(2, 40))
        paired.append(p_of_difference(true, *(true + first + noise), 199, seed))
    for found in (chance, paired):
        for name in found[0]:
            assert 0.04 < np.mean([p[name] <= 0.1 for p in found]) < 0.17, name


def test_a_real_difference_is_found() -> None:
    found = []
    for seed in range(40):
        true, good = classes(100, 1.5, seed)
        _, bad = classes(100, 0.0, 500 + seed)
        found.append(p_of_difference(true, good, bad, 199, 0)["auroc"] <= 0.05)
    assert np.mean(found) > 0.9
