"""The synthetic signal: what is known about it is true."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neuromamba import demo_signal
from neuromamba.demo_brain import NETWORKS, load_brain
from neuromamba.demo_signal import SITES, Connectivity, Site, Subject

QUIET = Site(0.0, 0.0, 1.0, 0.5, 0.5)
PERSON = Subject("sub-01", "F", 50, "birch")


def series(
    connectivity: Connectivity, volumes: int, seed: int, site: Site = QUIET, size: float = 8.0
) -> np.ndarray:
    """Voxel series (volume, voxel) as fractions of the voxel's mean."""
    brain, rng = load_brain(size), np.random.default_rng(seed)
    anatomy = demo_signal.draw_anatomy(brain, rng)
    run = demo_signal.draw_run(brain, PERSON, connectivity, anatomy, volumes, 2.0, rng)
    run = replace(run, site=site)
    return np.concatenate(list(run.blocks(rng))) / (site.scale * anatomy) - 1


def same_everywhere(coherence: float, shared: float) -> Connectivity:
    networks = len(NETWORKS)
    return Connectivity(np.full(networks, coherence), np.full(networks, shared), 0.0)


def parcel_means(x: np.ndarray, size: float = 8.0) -> np.ndarray:
    parcel = load_brain(size).parcel
    counts = np.bincount(parcel)
    return np.stack([np.bincount(parcel, volume) / counts for volume in x])


def test_coherence_changes_what_voxels_share_and_not_how_much_they_vary() -> None:
    low = series(same_everywhere(0.1, 0.1), 300, seed=0)
    high = series(same_everywhere(0.8, 0.7), 300, seed=0)
    assert high.var(axis=0).mean() == pytest.approx(low.var(axis=0).mean(), rel=0.05)
    low, high = parcel_means(low), parcel_means(high)
    assert high.var(axis=0).mean() > 2 * low.var(axis=0).mean()

    def within(x: np.ndarray) -> float:
        network = load_brain(8.0).network
        return float(
            np.corrcoef(x.T)[(network[:, None] == network) & ~np.eye(80, dtype=bool)].mean()
        )

    assert within(high) == pytest.approx(0.8, abs=0.1)
    assert within(low) < 0.25


def test_the_courses_are_slow_and_standardised() -> None:
    course = demo_signal.band_limited((300, 50), 2.0, np.random.default_rng(0))
    assert np.allclose(course.mean(axis=0), 0)
    assert np.allclose(course.std(axis=0), 1)
    power = (np.abs(np.fft.rfft(course, axis=0)) ** 2).mean(axis=1)
    frequency = np.fft.rfftfreq(300, 2.0)
    in_band = (frequency >= 0.008) & (frequency <= 0.11)
    assert power[in_band].sum() > 0.9 * power.sum()


def test_smooth_noise_goes_on_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_signal, "BLOCK", 5)
    monkeypatch.setattr(demo_signal, "DRIFT", 0.0)
    monkeypatch.setattr(demo_signal, "SPIKE", 0.0)
    x = series(same_everywhere(0.5, 0.0), 40, seed=0)
    lagged = [np.corrcoef(x[t], x[t + 1])[0, 1] for t in range(39)]
    assert np.allclose(lagged, np.exp(-2 / demo_signal.NOISE_SECONDS), atol=0.15)


def test_sudden_motion_leaves_a_mark() -> None:
    rng = np.random.default_rng(3)
    motion = np.zeros((40, 6))
    motion[20:] = [0.5, 0.5, 0.5, 0, 0, 0]
    brain = load_brain(8.0)
    run = demo_signal.draw_run(
        brain, PERSON, same_everywhere(0.5, 0.5), demo_signal.draw_anatomy(brain, rng), 40, 2.0, rng
    )
    x = np.concatenate(list(replace(run, motion=motion).blocks(rng))) / run.anatomy
    change = np.sqrt((np.diff(x, axis=0) ** 2).mean(axis=1))
    assert change[19] > 1.1 * np.median(change)
    assert np.argmax(change) in (19, 20)


def test_sites_differ_in_noise_and_sex_ratio() -> None:
    people = demo_signal.draw_subjects(200, seed=0)
    assert sum(person.sex == "F" for person in people) == 100
    ages = np.array([person.age for person in people])
    assert (ages.min(), ages.max()) == (20, 79)
    women = {site: np.mean([p.sex == "F" for p in people if p.site == site]) for site in SITES}
    assert women["amber"] > 0.6 > women["birch"] > 0.4 > women["cedar"]
    sds = [
        series(same_everywhere(0.4, 0.4), 60, seed=0, site=site).std() for site in SITES.values()
    ]
    assert sds == sorted(sds)
    assert sds[-1] > 1.15 * sds[0]


def test_the_known_effects_are_in_the_connectivity() -> None:
    """Sex in networks A and D, age in C, and neither in the others, on parcels of 40 subjects."""
    brain = load_brain(12.0)
    people = demo_signal.draw_subjects(40, seed=0)
    coherence = np.empty((len(people), len(NETWORKS)))
    for i, person in enumerate(people):
        rng = np.random.default_rng([0, 1, i])
        connectivity = demo_signal.draw_connectivity(person, rng)
        x = parcel_means(series(connectivity, 120, i, SITES[person.site], 12.0), 12.0)
        fc = np.corrcoef(x.T)
        for k in range(len(NETWORKS)):
            members = np.flatnonzero(brain.network == k)
            block = fc[np.ix_(members, members)]
            coherence[i, k] = block[np.triu_indices(len(members), 1)].mean()
    sex = np.array([person.sex == "M" for person in people])
    age = np.array([person.age for person in people])
    with_sex = np.array([np.corrcoef(c, sex)[0, 1] for c in coherence.T])
    with_age = np.array([np.corrcoef(c, age)[0, 1] for c in coherence.T])
    expected_sex = np.array([np.sign(demo_signal.SEX.get(k, 0)) for k in NETWORKS])
    expected_age = np.array([np.sign(demo_signal.AGE.get(k, 0)) for k in NETWORKS])
    assert (with_sex * expected_sex)[expected_sex != 0].min() > 0.4
    assert (with_age * expected_age)[expected_age != 0].min() > 0.4
    assert np.abs(with_sex[expected_sex == 0]).max() < 0.4
    assert np.abs(with_age[expected_age == 0]).max() < 0.4
