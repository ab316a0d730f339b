"""ComBat: against a reference, on subjects it was not fitted on, and with gaps."""

from __future__ import annotations

import time

import numpy as np
import pytest

from neuromamba.combat import fit_combat
from neuromamba.files import InputError

COUNTS = (30, 20, 15, 8)


@pytest.fixture(scope="module")
def effects() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base of 400 features, and what four sites add to and multiply their deviations by."""
    rng = np.random.default_rng(0)
    add = 0.5 * rng.normal(size=(4, 400)) + rng.normal(size=(4, 1))
    times = np.exp(0.2 * rng.normal(size=(4, 400)) + 0.4 * rng.normal(size=(4, 1)))
    return rng.normal(size=400), add, times


def scan(
    effects: tuple[np.ndarray, np.ndarray, np.ndarray], counts: tuple[int, ...], seed: int
) -> tuple[np.ndarray, list[str]]:
    """Features of subjects of each site, in random order, and their sites."""
    rng = np.random.default_rng(seed)
    site = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    base, add, times = effects
    values = base + add[site] + times[site] * rng.normal(size=(len(site), 400))
    return values, [f"site {k}" for k in site]


def test_the_effects_are_those_of_pycombat(effects) -> None:
    reference = pytest.importorskip("pycombat")
    (x, sites), (new, sites_new) = scan(effects, COUNTS, 1), scan(effects, (9, 9, 9, 9), 2)
    expected = reference.Combat(conv=1e-9).fit(x, np.array(sites))
    combat = fit_combat(x, sites)
    assert combat.harmonise(x, sites) == pytest.approx(
        expected.transform(x, np.array(sites)), abs=1e-5
    )
    assert combat.harmonise(new, sites_new) == pytest.approx(
        expected.transform(new, np.array(sites_new)), abs=1e-5
    )


def test_sites_are_alike_afterwards_in_subjects_that_were_not_fitted(effects) -> None:
    x, sites = scan(effects, (60, 60, 60, 60), 1)
    new, sites_new = scan(effects, (300, 300, 300, 300), 2)
    harmonised = fit_combat(x, sites).harmonise(new, sites_new)
    where = np.array(sites_new)

    def unlike(values: np.ndarray) -> tuple[float, float]:
        parts = [values[where == name] for name in np.unique(where)]
        means = np.std([part.mean(axis=0) for part in parts], axis=0).mean()
        sds = np.std([np.log(part.std(axis=0)) for part in parts], axis=0).mean()
        return float(means), float(sds)

    before, after = unlike(new), unlike(harmonised)
    assert before[0] > 0.5
    assert before[1] > 0.2
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.4 * before[1]


def test_a_small_site_is_shrunk_towards_what_it_does_to_all_features(effects) -> None:
    """Four subjects tell little of one feature, and much of 400."""
    base, add, times = effects
    alike = base, np.repeat(add.mean(axis=1, keepdims=True), 400, axis=1), np.ones_like(times)
    x, sites = scan(alike, (40, 40, 40, 4), 3)
    combat = fit_combat(x, sites)
    where = np.array(sites)
    raw = x[where == "site 3"].mean(axis=0) - combat.mean
    truth = alike[1][3] - np.average(alike[1], axis=0, weights=(40, 40, 40, 4))
    assert np.abs(combat.shift[3] - truth).mean() < 0.6 * np.abs(raw - truth).mean()


def test_subjects_that_cannot_be_harmonised_stay_as_they_are_and_reach_nothing(effects) -> None:
    x, sites = scan(effects, COUNTS, 1)
    plain = fit_combat(x, sites)
    odd = np.vstack([x, x[:3] + 100])
    with_others = fit_combat(odd, [*sites, "alone", None, float("nan")])
    assert with_others.sites == plain.sites
    assert (with_others.shift == plain.shift).all()
    assert (with_others.scale == plain.scale).all()
    who = ["site 2", "elsewhere", None, float("nan")]
    assert list(plain.knows(who)) == [True, False, False, False]
    found = plain.harmonise(x[:4], who)
    assert (found[1:] == x[1:4].astype(np.float32)).all()
    assert np.abs(found[0] - x[0]).max() > 0.1


def test_a_subject_is_harmonised_the_same_whoever_is_beside(effects) -> None:
    x, sites = scan(effects, COUNTS, 1)
    new, sites_new = scan(effects, (5, 5, 5, 5), 2)
    combat = fit_combat(x, sites)
    together = combat.harmonise(new, sites_new)
    assert (combat.harmonise(new[3:4], sites_new[3:4]) == together[3:4]).all()


def test_gaps_stay_and_say_nothing_of_the_features_beside(effects) -> None:
    x, sites = scan(effects, COUNTS, 1)
    gaps = x.copy()
    where = np.array(sites)
    gaps[::7, 5] = np.nan
    gaps[where == "site 3", 6] = np.nan  # the whole of a site
    gaps[np.flatnonzero(where == "site 2")[1:], 7] = np.nan  # all but one
    whole, combat = fit_combat(x, sites), fit_combat(gaps, sites)
    found = combat.harmonise(gaps, sites)
    assert (np.isnan(found) == np.isnan(gaps)).all()
    others = np.setdiff1d(np.arange(400), [5, 6, 7])
    assert found[:, others] == pytest.approx(whole.harmonise(x, sites)[:, others], abs=0.02)
    assert np.isfinite(combat.shift).all()
    assert (combat.scale > 0).all()
    # What a site lacks is expected to be shifted as its other features are.
    unit = x[:, 6].std()
    assert combat.shift[3, 6] / unit == pytest.approx(whole.shift[3].mean() / unit, abs=0.3)


def test_features_that_do_not_vary_stay(effects) -> None:
    x, sites = scan(effects, COUNTS, 1)
    x[:, 2] = 3.0
    found = fit_combat(x, sites).harmonise(x, sites)
    assert (found[:, 2] == 3.0).all()
    assert np.isfinite(found).all()
    constant = np.ones((20, 4))
    both = ["a"] * 10 + ["b"] * 10
    assert (fit_combat(constant, both).harmonise(constant, both) == 1).all()


@pytest.mark.parametrize("n", [2, 3])
def test_a_site_whose_subjects_are_equal_is_shifted_and_not_stretched(effects, n: int) -> None:
    """A scan that is there twice, or three times, where the mean is rounded."""
    x, sites = scan(effects, (30, 30), 1)
    twins = np.repeat(x[:1] + 3, n, axis=0)
    combat = fit_combat(np.vstack([x, twins]), [*sites, *["twins"] * n])
    assert np.isfinite(combat.shift).all()
    assert combat.scale.min() > 0.1
    new, _ = scan(effects, (9,), 2)
    found = combat.harmonise(new, ["twins"] * 9)
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 30
    assert np.abs(combat.shift[combat.sites.index("twins")]).mean() > 1


@pytest.mark.parametrize("sites", [["a"] * 6, ["a"] * 5 + ["b"], [None] * 6])
def test_fewer_than_two_sites_are_refused(sites: list[str | None]) -> None:
    with pytest.raises(InputError, match=r"ComBat needs two sites .*leave fc-combat out"):
        fit_combat(np.random.default_rng(0).normal(size=(6, 10)), sites)


def test_five_hundred_subjects_and_an_atlas_of_400_take_seconds() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 76_000), dtype=np.float32)
    sites = [f"site {k % 17}" for k in range(500)]
    start = time.perf_counter()
    fit_combat(x, sites).harmonise(x, sites)
    assert time.perf_counter() - start < 40
