"""Denoising over time: nilearn's results block by block, known signals, and other sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confound_tables import (
    MOTION,
    REPETITION_TIME,
    by_nilearn,
    header_of,
    make_table,
    mark_moving,
    mark_unsteady,
    write_confounds,
)

from neuromamba.config import Denoise
from neuromamba.denoise import Denoiser
from neuromamba.files import InputError

N = 120
SCRUBBED = [30, 31, 50, 70]
"""No two of them as far from one end as from the other, which nilearn would not bridge."""


def noise(n_volumes: int = N, n_voxels: int = 11) -> np.ndarray:
    """(volume, voxel) about 100 +- 10, with a trend."""
    random = np.random.default_rng(3)
    values = 100 + 10 * random.standard_normal((n_volumes, n_voxels))
    return (values + 0.05 * np.arange(n_volumes)[:, None]).astype(np.float32)


def sinusoids(hertz: list[float], seconds: np.ndarray) -> np.ndarray:
    return 50 + np.sin(2 * np.pi * np.outer(seconds, hertz) + 0.4)


def denoiser(confounds: Path | None = None, n_volumes: int = N, **settings: Any) -> Denoiser:
    denoise = Denoise(**settings)
    return Denoiser(header_of(n_volumes), "sub-01", REPETITION_TIME, confounds, denoise, 20)


# --- As nilearn does ------------------------------------------------------------------------------

COMBINATIONS: list[dict[str, Any]] = [
    {"detrend": True},
    {"low_pass": 0.1},
    {"high_pass": 0.01},
    {"low_pass": 0.1, "high_pass": 0.01, "detrend": True},
    {"strategy": ["motion"]},
    {"strategy": ["motion", "wm_csf", "global_signal"], "motion": "basic", "low_pass": 0.1},
    {"strategy": ["motion", "wm_csf"], "detrend": True, "low_pass": 0.15, "high_pass": 0.01},
    {"strategy": ["compcor", "high_pass", "wm_csf"], "wm_csf": "power2"},
    {"strategy": ["scrub"]},
    {"strategy": ["scrub", "motion"], "detrend": True},
    {"strategy": ["scrub", "motion"], "motion": "derivatives", "low_pass": 0.1, "high_pass": 0.01},
    {"strategy": ["scrub", "motion"], "scrub": 0, "low_pass": 0.2, "detrend": True},
    {"strategy": ["scrub"], "high_pass": 0.01, "detrend": True},
]


@pytest.mark.parametrize("settings", COMBINATIONS, ids=str)
def test_it_is_nilearns_result_with_the_mean_kept(tmp_path: Path, settings: dict[str, Any]) -> None:
    table, series = make_table(N), noise()
    mark_moving(table, SCRUBBED)
    path = write_confounds(tmp_path, table)
    ours = denoiser(path, **settings)
    result = ours.apply(series)
    expected = by_nilearn(series, path, Denoise(**settings))
    np.testing.assert_allclose(result - result.mean(0), expected - expected.mean(0), atol=5e-5)
    kept = np.round(ours.times / REPETITION_TIME).astype(int)
    np.testing.assert_allclose(result.mean(0), series[kept].mean(0), rtol=1e-6)
    removed = set(range(N)) - set(kept)
    if "scrub" in settings.get("strategy", []):
        assert set(SCRUBBED) <= removed
        assert ours.attributes["denoise"]["scrubbed"] == sorted(removed)
        assert ours.attributes["n_scrubbed"] == len(removed)
    else:
        assert not removed


def test_volumes_before_the_steady_state_are_cut_off(tmp_path: Path) -> None:
    table, series = make_table(N), noise()
    mark_unsteady(table, 4)
    series[:4] += 500
    settings = {"strategy": ["motion", "non_steady_state"], "low_pass": 0.1}
    ours = denoiser(write_confounds(tmp_path / "whole", table), **settings)
    result = ours.apply(series)
    late = write_confounds(tmp_path / "late", table.iloc[4:])
    expected = by_nilearn(series[4:], late, Denoise(strategy=["motion"], low_pass=0.1))
    np.testing.assert_allclose(result - result.mean(0), expected - expected.mean(0), atol=5e-5)
    assert ours.times[0] == 4 * REPETITION_TIME
    assert ours.attributes["n_dropped"] == 4
    assert ours.attributes["n_scrubbed"] == 0
    assert ours.attributes["time_is_regular"]


@pytest.mark.parametrize("moving", [[30, 89], [0, 1, 2, 3, 60], [60, 117, 118, 119]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"detrend": True}, {"low_pass": 0.1}], ids=str)
def test_nothing_of_a_scrubbed_volume_is_left(
    tmp_path: Path, moving: list[int], settings: dict[str, Any]
) -> None:
    table, series = make_table(N), noise()
    mark_moving(table, moving)
    spoilt = table.copy()
    spoilt.loc[moving, MOTION] += 1e3
    strategy = {"strategy": ["scrub", "motion"], "motion": "basic", **settings}
    clean = denoiser(write_confounds(tmp_path / "clean", table), **strategy).apply(series)
    series[moving] += 1e4
    result = denoiser(write_confounds(tmp_path / "spoilt", spoilt), **strategy).apply(series)
    np.testing.assert_array_equal(result, clean)


def test_a_result_does_not_depend_on_the_voxels_beside_it(tmp_path: Path) -> None:
    table, series = make_table(N), noise(n_voxels=40)
    mark_moving(table, SCRUBBED)
    settings = {"strategy": ["scrub", "motion"], "low_pass": 0.1, "repetition_time": 2.5}
    ours = denoiser(write_confounds(tmp_path, table), **settings)
    apart = [ours.apply(series[:, k : k + 7]) for k in range(0, 40, 7)]
    np.testing.assert_allclose(np.hstack(apart), ours.apply(series), rtol=2e-7)


# --- Known signals --------------------------------------------------------------------------------


def test_a_band_keeps_what_is_in_it_and_takes_the_rest() -> None:
    n_volumes = 400
    seconds = np.arange(n_volumes) * REPETITION_TIME
    hertz = [0.002, 0.03, 0.05, 0.07, 0.2]
    result = denoiser(None, n_volumes, low_pass=0.1, high_pass=0.01).apply(
        sinusoids(hertz, seconds).astype(np.float32)
    )
    middle = slice(50, -50)
    power = result[middle].std(axis=0) / sinusoids(hertz, seconds)[middle].std(axis=0)
    np.testing.assert_allclose(power[[1, 2, 3]], 1, atol=0.03)
    assert (power[[0, 4]] < 0.02).all()


def test_a_planted_confound_is_taken_out_and_the_signal_stays(tmp_path: Path) -> None:
    table = make_table(N)
    motion = table[MOTION].to_numpy()
    motion = motion - motion.mean(axis=0)
    signal = 100 + noise() - noise().mean(axis=0)
    # What of the signal looks like motion goes too, so there is none in it.
    signal -= motion @ np.linalg.lstsq(motion, signal, rcond=None)[0]
    planted = signal + motion @ np.random.default_rng(5).standard_normal((6, signal.shape[1]))
    ours = denoiser(write_confounds(tmp_path, table), strategy=["motion"], motion="basic")
    np.testing.assert_allclose(ours.apply(planted.astype(np.float32)), signal, atol=5e-5)
    assert sorted(ours.attributes["denoise"]["columns"]) == sorted(MOTION)
    assert ours.attributes["dof"] == N - 7


# --- Another repetition time ----------------------------------------------------------------------


@pytest.mark.parametrize("new", [1.0, 1.5, 2.3, 3.0, 4.0, 5.7])
def test_slow_signals_are_the_same_at_another_repetition_time(new: float) -> None:
    seconds = np.arange(300) * REPETITION_TIME
    hertz = [0.01, 0.03, 0.05]
    ours = denoiser(None, 300, repetition_time=new)
    result = ours.apply(sinusoids(hertz, seconds).astype(np.float32))
    np.testing.assert_allclose(np.diff(ours.times), new, rtol=1e-9)
    assert seconds[-1] - new < ours.times[-1] <= seconds[-1]
    error = np.abs(result - sinusoids(hertz, ours.times))
    assert error[15:-15].max() < 0.005
    # The filter starts and ends on a mirror image of the series.
    assert error.max() < 0.05
    assert ours.attributes["repetition_time"] == new
    assert ours.attributes["denoise"]["source_repetition_time"] == REPETITION_TIME


def test_what_the_new_repetition_time_cannot_hold_is_gone_and_not_folded() -> None:
    seconds = np.arange(400) * REPETITION_TIME
    # At 4 s the Nyquist frequency is 0.125 Hz; these would look like 0.11, 0.1 and 0.05 Hz.
    series = sinusoids([0.14, 0.15, 0.2], seconds).astype(np.float32)
    result = denoiser(None, 400, repetition_time=4.0).apply(series)
    assert result[40:-40].std(axis=0).max() < 0.01 * series.std()


def test_times_without_gaps_at_the_scans_repetition_time_are_the_scans(tmp_path: Path) -> None:
    series = noise()
    ours = denoiser(None, repetition_time=REPETITION_TIME)
    np.testing.assert_allclose(ours.apply(series), series, rtol=2e-7)
    assert ours.attributes["time_is_regular"]


def test_no_volume_is_made_up_within_a_gap(tmp_path: Path) -> None:
    table, series = make_table(N), noise()
    mark_moving(table, [40, 41, 42])
    path = write_confounds(tmp_path, table)
    ours = denoiser(path, strategy=["scrub"], repetition_time=1.5)
    # From volume 39 (78 s) to volume 43 (86 s) there is nothing.
    all_times = np.arange(159) * 1.5
    expected = all_times[(all_times <= 78) | (all_times >= 86)]
    np.testing.assert_allclose(ours.times, expected)
    assert not ours.attributes["time_is_regular"]
    assert ours.apply(series).shape == (len(expected), series.shape[1])
    slow = sinusoids([0.02], np.arange(N) * REPETITION_TIME).astype(np.float32)
    slow[40:43] = 1e6
    np.testing.assert_allclose(ours.apply(slow), sinusoids([0.02], expected), atol=0.02)


# --- What cannot be done --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low_pass": 0.25}, r"low_pass = 0.25 Hz is not below the Nyquist frequency, 0.25 Hz"),
        ({"high_pass": 0.3}, r"high_pass = 0.3 Hz is not below .* repetition time of 2 s; lower"),
        ({"high_pass": 0.2, "repetition_time": 3.0}, r"high_pass = 0.2 Hz .* 0.16"),
        ({"repetition_time": 0.9}, r"= 0.9 s is less than half the scan's 2 s.* at least 1"),
        ({"high_pass": 0.01, "low_pass": 0.0105}, r"no degrees of freedom: of 120 .*keeps 0\.2"),
        ({"repetition_time": 30.0}, r"8 of 120 volumes are left .*min_volumes = 20"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        denoiser(**settings)


def test_more_confounds_than_volumes_are_refused_with_the_numbers(tmp_path: Path) -> None:
    path = write_confounds(tmp_path, make_table(24))
    message = r"of 24 volumes the filter keeps 24.0, and 24 confounds \(rank 2\d\).*fewer confounds"
    with pytest.raises(InputError, match=message):
        denoiser(path, 24, strategy=["motion"])


def test_a_run_too_short_for_the_filter_is_refused() -> None:
    with pytest.raises(InputError, match=r"is too short for the filter .*padlen"):
        denoiser(None, 30, low_pass=0.1, high_pass=0.01)


def test_a_run_with_too_little_left_is_refused(tmp_path: Path) -> None:
    table = make_table(N)
    mark_moving(table, range(10, N))
    path = write_confounds(tmp_path, table)
    message = r"10 of 120 volumes are left after 0 .* and 110 scrubbed ones, .*: fewer than .*= 20"
    with pytest.raises(InputError, match=message):
        denoiser(path, strategy=["scrub"])
