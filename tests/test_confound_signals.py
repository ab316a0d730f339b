"""Confounds: their formulae in float64, and nilearn's reading of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from nilearn.interfaces.fmriprep import load_confounds

from neuromamba import confound_signals
from neuromamba.confound_signals import (
    cosine_basis,
    dvars,
    expand,
    make_confounds,
    outlier_columns,
    principal_components,
    series_median,
)

N = 90
MOTION = ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"]


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confound_signals, "SLAB_BYTES", 8 * N * 37)


def series(n_voxels: int = 400, seed: int = 0) -> np.ndarray:
    """(time, voxel) with a shared signal, autocorrelation and different means."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((N, n_voxels))
    noise[1:] += 0.5 * noise[:-1]
    shared = np.sin(np.arange(N) / 3)[:, None] * random.uniform(0, 4, n_voxels)
    return (random.uniform(500, 1500, n_voxels) + 5 * noise + shared).astype(np.float32)


def parameters() -> np.ndarray:
    random = np.random.default_rng(1)
    moved = np.cumsum(random.standard_normal((N, 6)), axis=0) * ([0.02] * 3 + [0.0004] * 3)
    moved[40:] += [1.5, 0, 0, 0, 0, 0]
    return moved


def tissues(n_voxels: int = 400) -> dict[str, np.ndarray]:
    number = np.arange(n_voxels)
    return {"csf": number < 120, "white_matter": (number >= 200) & (number < 380)}


def confounds(**options: object) -> tuple[pd.DataFrame, dict]:
    brain = np.arange(400) < 390
    given = {"non_steady": 2, **options}
    return make_confounds(series(), brain, tissues(), parameters(), 2.0, **given)


@pytest.mark.usefixtures("small_slabs")
def test_dvars_is_nichols() -> None:
    data, mask = series(), np.arange(400) != 7
    data[:, 30] = 800  # constant
    plain, standardised = dvars(data, mask)
    kept = data[:, mask & (np.arange(400) != 30)].astype(np.float64)
    change = np.sqrt((np.diff(kept, axis=0) ** 2).mean(axis=1))
    ordered = np.sort(kept, axis=0)
    spread = (ordered[int(0.75 * (N - 1))] - ordered[int(0.25 * (N - 1))]) / 1.349
    centred = kept - kept.mean(axis=0)
    lag1 = np.array([(x[1:] @ x[:-1]) / (x @ x) for x in centred.T])
    expected = (np.sqrt(2 * (1 - lag1)) * spread).mean()
    assert np.isnan([plain[0], standardised[0]]).all()
    np.testing.assert_allclose(standardised[1:], change / expected, rtol=1e-10)
    scale = 1000 / np.median(data[:, mask].astype(np.float64))
    np.testing.assert_allclose(plain[1:], change * scale, rtol=1e-10)


def test_dvars_of_a_constant_series_is_unknown() -> None:
    plain, standardised = dvars(np.ones((5, 3), np.float32), np.ones(3, bool))
    assert np.isnan(plain).all()
    assert np.isnan(standardised).all()


@pytest.mark.parametrize("n_voxels", [1, 40, 401])
def test_the_median_is_exact(n_voxels: int) -> None:
    data = np.random.default_rng(n_voxels).lognormal(3, 2, (N, n_voxels)).astype(np.float32)
    mask = np.arange(n_voxels) % 3 < 2
    assert series_median(data, mask) == np.median(data[:, mask].astype(np.float64))


def test_expansion() -> None:
    table = expand(pd.DataFrame({"a": [1.0, 3.0, 2.0]}))
    assert table.columns.tolist() == ["a", "a_derivative1", "a_power2", "a_derivative1_power2"]
    np.testing.assert_array_equal(table["a_derivative1"], [np.nan, 2, -1])
    np.testing.assert_array_equal(table["a_power2"], [1, 9, 4])
    np.testing.assert_array_equal(table["a_derivative1_power2"], [np.nan, 4, 1])


def test_cosines_are_slower_than_128_s_and_leave_the_start_out() -> None:
    basis = cosine_basis(200, 2.0, non_steady=3)
    assert basis.shape == (200, 6)  # 2 * 197 * 2 s / 128 s
    assert (basis[:3] == 0).all()
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-12)
    assert cosine_basis(20, 2.0).shape == (20, 0)


@pytest.mark.usefixtures("small_slabs")
def test_components_are_those_of_the_singular_value_decomposition() -> None:
    data, mask, cosines = series(), tissues()["csf"], cosine_basis(N, 2.0, 2)
    found, singular, share = principal_components(data, mask, cosines, 2)
    x = data[2:, mask].astype(np.float64)
    design = np.column_stack([cosines[2:], np.ones(N - 2)])
    x -= design @ np.linalg.lstsq(design, x, rcond=None)[0]
    u, s, _ = np.linalg.svd(x / x.std(axis=0), full_matrices=False)
    explained = np.cumsum(s**2) / (s**2).sum()
    n = int((explained < 0.5).sum()) + 1
    assert found.shape == (N, n)
    assert (found[:2] == 0).all()
    np.testing.assert_allclose(np.abs(found[2:].T @ u[:, :n]), np.eye(n), atol=1e-6)
    np.testing.assert_allclose(singular, s[:n], rtol=1e-9)
    np.testing.assert_allclose(share.sum(), explained[n - 1], rtol=1e-9)


def test_constant_voxels_take_no_part_in_components() -> None:
    data = series()
    data[:, :5] = 1000
    few, _, _ = principal_components(data, np.arange(400) < 120, np.zeros((N, 0)), 0)
    none = principal_components(data[:, 5:], np.arange(395) < 115, np.zeros((N, 0)), 0)[0]
    np.testing.assert_allclose(few, none, atol=1e-10)
    assert principal_components(data[:, :5], np.ones(5, bool), np.zeros((N, 0)), 0)[0].shape[1] == 0


def test_outliers_by_either_measure_after_the_start() -> None:
    table = pd.DataFrame(
        {
            "framewise_displacement": [np.nan, 0.9, 0.1, 0.6, 0.1],
            "std_dvars": [np.nan, 1.0, 1.0, 1.0, 1.6],
        }
    )
    columns = outlier_columns(table, 2)
    assert list(columns) == [
        "non_steady_state_outlier00",
        "non_steady_state_outlier01",
        "motion_outlier00",
        "motion_outlier01",
    ]
    np.testing.assert_array_equal(np.argmax(columns.to_numpy(), axis=0), [0, 1, 3, 4])
    assert (columns.sum() == 1).all()


def test_volumes_whose_motion_is_unknown_are_outliers() -> None:
    repeated = parameters()
    repeated[[20, 21]] = repeated[19]
    table, columns = make_confounds(
        series(), np.ones(400, bool), {}, repeated, 2.0, 2, unaligned={0: "why", 20: "", 21: ""}
    )
    assert (table["framewise_displacement"][[20, 21]] == 0).all()
    outliers = table.filter(like="motion_outlier")
    assert {20, 21} <= set(np.flatnonzero(outliers.sum(axis=1)))
    assert (table.filter(like="outlier").sum(axis=1) <= 1).all()  # 0 is before the steady state
    assert "could not be aligned" in columns["motion_outlier00"]["Description"]


def test_motion_is_6_or_24_columns() -> None:
    for n in (6, 24):
        table, _ = confounds(n_motion=n)
        assert sum(column.startswith(("trans_", "rot_")) for column in table) == n
        np.testing.assert_array_equal(table[MOTION], parameters())


def test_signals_are_means_of_what_the_run_has() -> None:
    table, _ = confounds()
    np.testing.assert_allclose(table["global_signal"], series()[:, :390].mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(table["csf"], series()[:, :120].mean(axis=1), rtol=1e-6)
    outside = {"csf": np.arange(400) >= 395, "white_matter": tissues()["white_matter"]}
    brain = np.arange(400) < 390
    table, _ = make_confounds(series(), brain, outside, parameters(), 2.0)
    assert "csf" not in table
    assert "white_matter" in table
    assert not any(column.startswith(("a_comp", "c_comp")) for column in table)


@pytest.mark.parametrize("compcor", ["anat_combined", "anat_separated"])
def test_nilearn_loads_every_strategy(tmp_path: Path, compcor: str) -> None:
    table, columns = confounds()
    bold = tmp_path / "sub-01_task-rest_space-MNI152NLin2009aSym_res-2_desc-preproc_bold.nii.gz"
    bold.touch()
    stem = f"{tmp_path}/sub-01_task-rest_desc-confounds_timeseries"
    table.to_csv(f"{stem}.tsv", sep="\t", index=False, na_rep="n/a")
    Path(f"{stem}.json").write_text(json.dumps(columns))
    strategy = ("motion", "wm_csf", "global_signal", "high_pass", "compcor", "non_steady_state")
    loaded, sample = load_confounds(
        str(bold),
        (*strategy, "scrub"),
        motion="full",
        wm_csf="full",
        global_signal="full",
        compcor=compcor,
        n_compcor=3,
    )
    assert loaded.shape[1] == 24 + 8 + 4 + 2 + (3 if compcor == "anat_combined" else 6)
    assert loaded.notna().all(axis=None)
    assert 40 not in sample
    assert {0, 1}.isdisjoint(sample)


def test_the_sidecar_tells_of_every_column() -> None:
    table, columns = confounds()
    assert set(columns) == set(table)
    assert all(value.get("Description") or value.get("Mask") for value in columns.values())
    a = columns["a_comp_cor_00"]
    assert (a["Mask"], a["Retained"], a["Method"]) == ("combined", True, "aCompCor")
    assert {columns["c_comp_cor_00"]["Mask"], columns["w_comp_cor_00"]["Mask"]} == {"CSF", "WM"}
