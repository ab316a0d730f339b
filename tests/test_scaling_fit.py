"""Power laws of loss against compute: what is found, how sure it is, and what is claimed."""

from __future__ import annotations

import numpy as np
import pytest

from neuromamba.scaling_fit import choose_law, count_below, fit_points, frontier, judge

LAW = {"a": 40.0, "b": 0.12}


def losses_at(flops: np.ndarray, noise: float, seeds: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    exact = LAW["a"] * flops ** -LAW["b"]
    return exact[:, None] * np.exp(noise * rng.standard_normal((len(flops), seeds)))


GRID = np.outer([1, 2, 4, 8], [1, 3, 10, 30, 100]).ravel() * 1e12
"""Sizes times shares."""


@pytest.mark.parametrize("on_frontier", [True, False])
def test_a_known_exponent_is_found_and_its_interval_is_right(on_frontier):
    found, covered, widths = [], [], []
    for seed in range(30):
        fit = fit_points(GRID, losses_at(GRID, 0.02, 2, seed), on_frontier, 100, 0.95, seed)
        found.append(fit.law.exponent)
        covered.append(fit.low <= LAW["b"] <= fit.high)
        widths.append(fit.high - fit.low)
    assert np.median(found) == pytest.approx(LAW["b"], abs=0.002)
    assert np.mean(covered) >= 0.8
    assert np.median(widths) < 0.02


def test_without_noise_the_law_is_exact():
    fit = fit_points(GRID, losses_at(GRID, 0.0, 1, 0), True, 50, 0.95)
    assert fit.law.exponent == pytest.approx(LAW["b"])
    assert np.exp(fit.law.log_coefficient) == pytest.approx(LAW["a"])
    assert fit.law.floor == 0
    assert fit.r_squared == pytest.approx(1)
    np.testing.assert_allclose(fit.law(fit.flops), fit.loss)
    assert judge(fit, fit, len(fit.flops), 0)[0]


def test_points_off_the_frontier_do_not_bend_its_fit():
    """Small models that were trained too long: much compute, no better loss."""
    flops = np.r_[GRID, GRID * 40]
    losses = losses_at(GRID, 0.001, 2, 0)
    losses = np.concatenate([losses, 1.01 * losses])
    fit = fit_points(flops, losses, True, 200, 0.95)
    assert fit.low <= LAW["b"] <= fit.high
    assert fit_points(flops, losses, False, 200, 0.95).law.exponent < 0.8 * LAW["b"]


def test_a_floor_is_found_where_there_is_one_and_enough_points_tell():
    flops = np.geomspace(1e12, 1e16, 12)
    loss = 2e3 * flops**-0.25 + 0.3
    law = choose_law(flops, loss * np.exp(1e-3 * np.random.default_rng(0).standard_normal(12)))
    assert law.floor == pytest.approx(0.3, abs=0.02)
    assert law.exponent == pytest.approx(0.25, abs=0.02)
    assert choose_law(flops[::3], loss[::3]).floor == 0


def test_the_frontier_is_what_no_cheaper_training_reaches():
    flops = np.array([4.0, 1.0, 2.0, 2.0, 3.0, 5.0])
    loss = np.array([0.7, 1.0, 0.9, 0.8, 0.8, 0.75])
    assert flops[frontier(flops, loss)].tolist() == [1.0, 2.0, 4.0]
    assert loss[frontier(flops, loss)].tolist() == [1.0, 0.8, 0.7]


DEGENERATE = {
    "one point": ([1e12], [1.0], "fewer than 3 different amounts"),
    "two points": ([1e12, 1e13], [1.0, 0.9], "fewer than 3 different amounts"),
    "one amount of compute": ([1e12] * 8, list(np.linspace(1, 0.5, 8)), "fewer than 3 different"),
    "few points": ([1e12, 1e13, 1e14], [1.0, 0.9, 0.81], "3 point(s) on the frontier"),
    "a narrow span": (np.geomspace(1e12, 3e12, 6), np.linspace(1, 0.9, 6), "spans 0.48 decades"),
    "more is worse": (np.geomspace(1e12, 1e15, 6), np.linspace(0.5, 1, 6), "grows with compute"),
    "a sudden fall": (np.geomspace(1e12, 1e15, 6), [9, 1, 0.99, 0.98, 0.97, 0.96], "explains 0."),
    "always the same": (np.geomspace(1e12, 1e15, 6), [1.0] * 6, "1 point(s) on the frontier"),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_what_shows_no_power_law_is_said_to_show_none(case):
    flops, loss, words = DEGENERATE[case]
    flops, loss = np.asarray(flops, float), np.asarray(loss, float)
    best, every = (fit_points(flops, loss[:, None], where, 100, 0.95) for where in (True, False))
    n = len(frontier(flops, loss))
    claimed, text = judge(best, every, n, 0)
    assert not claimed
    assert text.startswith("No power law can be claimed")
    assert words in text


def test_a_frontier_through_noise_is_not_taken_for_a_power_law():
    """It falls by construction; the interval over all points must show that nothing is there."""
    flops = np.geomspace(1e12, 1e15, 30)
    claims = []
    for seed in range(20):
        noise = np.random.default_rng(seed).lognormal(0, 0.1, (30, 1))
        best, every = (fit_points(flops, noise, on, 100, 0.95) for on in (True, False))
        assert best is None or best.law.exponent > 0
        claims.append(judge(best, every, len(frontier(flops, noise[:, 0])), 0)[0])
    assert np.mean(claims) <= 0.1


def test_a_frontier_that_trainings_pass_below_is_none():
    fit = fit_points(GRID, losses_at(GRID, 0.01, 1, 0), True, 100, 0.95)
    flops = np.geomspace(GRID.min(), GRID.max(), 7)
    assert count_below(fit, flops, fit.law(flops)) == 0
    assert count_below(fit, flops, 0.9 * fit.law(flops)) == 7
    assert count_below(fit, flops * 1e6, 0.9 * fit.law(flops * 1e6)) == 0
    assert judge(fit, fit, len(fit.flops), 0)[0]
    claimed, text = judge(fit, fit, len(fit.flops), 7)
    assert not claimed
    assert "7 validation(s) on the way" in text


def test_points_may_differ_in_how_many_seeds_they_have():
    losses = losses_at(GRID, 0.01, 3, 0)
    losses[::2, 1:] = np.nan
    fit = fit_points(GRID, losses, False, 100, 0.95)
    assert fit.low <= LAW["b"] <= fit.high
