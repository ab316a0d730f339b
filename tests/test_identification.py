"""Measures of identification, against what is known of data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from neuromamba import identification
from neuromamba.identification import MEASURES, identify, similarity

SETTINGS = (300, 0.95, 0, 300)


def occasions(n: int, identity: float, width: int = 60, seed: int = 0) -> list[np.ndarray]:
    """Twice n subjects: what is a subject's own, and noise of SD 1."""
    rng = np.random.default_rng(seed)
    own = identity * rng.standard_normal((n, width))
    return [own + rng.standard_normal((n, width)) for _ in range(2)]


def test_similarity_is_pearsons_r() -> None:
    first, second = occasions(7, 0.5)
    expected = np.corrcoef(first, second)[:7, 7:]
    assert similarity(first, second) == pytest.approx(expected, abs=1e-12)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = occasions(11, 0.5)
    first[3, 5] = np.nan
    whole = similarity(first, second)
    monkeypatch.setattr(identification, "BLOCK", 4 * first.shape[1])
    assert similarity(first, second) == pytest.approx(whole, abs=1e-11)


def test_missing_features_are_left_out_of_their_pair_alone() -> None:
    first, second = occasions(6, 0.5)
    first[1, :20] = np.nan
    second[4, 10:35] = np.nan
    found = similarity(first, second)
    for i in range(6):
        for j in range(6):
            both = np.isfinite(first[i]) & np.isfinite(second[j])
            assert found[i, j] == pytest.approx(np.corrcoef(first[i, both], second[j, both])[0, 1])


def test_what_has_no_correlation_is_similar_to_nothing() -> None:
    first, second = occasions(4, 0.5)
    first[0], second[1] = 0.1, np.nan
    found = similarity(first, second)
    assert (found[0] == 0).all()
    assert (found[:, 1] == 0).all()
    assert np.isfinite(found).all()


def test_strong_identity_is_found_always() -> None:
    found = identify(similarity(*occasions(40, 3.0)), *SETTINGS)
    assert (found["accuracy"], found["mean_rank"], found["percentile_rank"]) == (1, 1, 100)
    assert found["accuracy_low"] == found["accuracy_high"] == 1
    # An identity of SD 3 in noise of SD 1 correlates by 0.9.
    assert found["idiff"] == pytest.approx(90, abs=3)
    assert found["idiff_low"] < found["idiff"] < found["idiff_high"]
    assert all(found[f"{name}_p"] == pytest.approx(1 / 301) for name in MEASURES)
    assert (found["n"], found["chance"]) == (40, 1 / 40)


def test_noise_is_found_by_chance() -> None:
    n = 50
    many = [
        identify(similarity(*occasions(n, 0, seed=seed)), 50, 0.95, 0, 100) for seed in range(12)
    ]
    mean = {name: np.mean([found[name] for found in many]) for name in MEASURES}
    assert mean["accuracy"] == pytest.approx(1 / n, abs=0.015)
    assert mean["mean_rank"] == pytest.approx((n + 1) / 2, abs=2)
    assert mean["percentile_rank"] == pytest.approx(50, abs=5)
    assert mean["idiff"] == pytest.approx(0, abs=1)
    for name in MEASURES:
        p = [found[f"{name}_p"] for found in many]
        assert 0.2 < np.mean(p) < 0.85, "p of noise is spread over 0 to 1"


def test_by_hand() -> None:
    similar = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.4], [0.0, 0.5, 0.6]])
    found = identify(similar, *SETTINGS)
    # By rows subjects 0 and 2 are found; by columns 0 and 2, too. Ranks of subject 1: 3 and 2.
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["mean_rank"] == pytest.approx((1 + 2.5 + 1) / 3)
    assert found["percentile_rank"] == 100
    own, others = (0.9 + 0.3 + 0.6) / 3, (0.1 + 0.2 + 0.8 + 0.4 + 0.0 + 0.5) / 6
    assert found["idiff"] == pytest.approx(100 * (own - others))


def test_who_cannot_be_told_apart_is_at_chance() -> None:
    found = identify(similarity(np.ones((8, 5)), np.ones((8, 5))), *SETTINGS)
    assert found["accuracy"] == pytest.approx(1 / 8)
    assert (found["mean_rank"], found["percentile_rank"], found["idiff"]) == (4.5, 50, 0)
    assert all(found[f"{name}_p"] == 1 for name in MEASURES)


def test_the_order_of_the_subjects_does_not_matter() -> None:
    first, second = occasions(30, 0.4)
    # Twins in shape: ties must not be broken by the order.
    first[7], second[7] = first[3], second[3]
    order = np.random.default_rng(1).permutation(30)
    one = identify(similarity(first, second), *SETTINGS)
    other = identify(similarity(first[order], second[order]), *SETTINGS)
    assert {name: other[name] for name in MEASURES} == pytest.approx(
        {name: one[name] for name in MEASURES}
    )
    assert 0.1 < one["accuracy"] < 0.95


def test_intervals_hold_what_other_subjects_give() -> None:
    """The interval of one sample is about as wide as other samples of subjects are spread."""
    accuracies = [
        identify(similarity(*occasions(40, 0.45, seed=seed)), 20, 0.95, 0, 10)["accuracy"]
        for seed in range(40)
    ]
    found = identify(similarity(*occasions(40, 0.45, seed=99)), 2000, 0.95, 0, 10)
    width = found["accuracy_high"] - found["accuracy_low"]
    assert width == pytest.approx(2 * 1.96 * np.std(accuracies), rel=0.5)


def test_the_median_of_an_even_number_is_in_the_middle() -> None:
    similar = np.diag([1.0, 1.0, -1.0, -1.0])
    found = identify(similar, *SETTINGS)
    # Ranks 1, 1, 4, 4, of which the median is 2.5.
    assert found["percentile_rank"] == pytest.approx(100 * (4 - 2.5) / 3)
