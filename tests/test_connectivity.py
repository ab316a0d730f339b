"""Functional connectivity: known correlations are found, and missing ROIs stay missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr
from nilearn.connectome import ConnectivityMeasure

from neuromamba.connectivity import LARGEST_R, connectivity, fisher_z, read_z
from neuromamba.files import InputError
from neuromamba.linear_models import rotate
from neuromamba.roi_features import load_connectivity
from neuromamba.store import finish


def chain(n: int = 6, strength: float = 0.4) -> np.ndarray:
    """Precision of ROIs that are only tied to their neighbours; far ROIs still correlate."""
    precision = np.eye(n)
    near = np.arange(n - 1)
    precision[near, near + 1] = precision[near + 1, near] = -strength
    return precision


def draw(precision: np.ndarray, times: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    amplitude = np.geomspace(1, 100, len(precision))
    covariance = np.linalg.inv(precision)
    series = rng.multivariate_normal(np.zeros(len(precision)), covariance, size=times)
    return (500 + amplitude * series).astype(np.float32)


def test_partial_correlation_is_the_known_one() -> None:
    precision = chain()
    scale = np.sqrt(np.diag(precision))
    expected = -precision / np.outer(scale, scale)
    np.fill_diagonal(expected, 1)
    series = draw(precision, 20000)
    found = connectivity(series, "partial")
    assert np.abs(found - expected).max() < 0.03
    assert abs(connectivity(series)[0, 2]) > 0.1  # what partial correlation takes away
    assert abs(found[0, 2]) < 0.03


def test_partial_correlation_is_nilearns_and_does_not_depend_on_amplitudes() -> None:
    series = draw(chain(), 40)
    scaled = (series - series.mean(axis=0)) / series.std(axis=0)
    expected = ConnectivityMeasure(kind="partial correlation").fit_transform([scaled])[0]
    assert np.abs(connectivity(series, "partial") - expected).max() < 1e-4
    louder = series * np.array([1, 1, 1, 1, 1, 50], dtype=np.float32)
    change = connectivity(louder, "partial") - connectivity(series, "partial")
    assert np.abs(change).max() < 1e-4


def test_more_rois_than_volumes_have_a_partial_correlation() -> None:
    found = connectivity(np.random.default_rng(0).normal(size=(20, 60)), "partial")
    assert np.isfinite(found).all()
    assert np.abs(found - np.eye(60)).max() < 1


def test_pearson_correlation_is_numpys() -> None:
    series = draw(chain(), 50)
    assert np.abs(connectivity(series) - np.corrcoef(series.T)).max() < 1e-6


@pytest.mark.parametrize("kind", ["pearson", "partial"])
def test_a_missing_or_constant_roi_has_no_correlation(kind: str) -> None:
    series = draw(chain(), 200)
    series[:, 1] = 5.1
    series[:, 4] = np.nan
    series[:, 5] = np.float32(700) + np.spacing(np.float32(700)) * (np.arange(200) % 2)  # rounding
    fc = connectivity(series, kind)
    lacking = [1, 4, 5]
    others = [0, 2, 3]
    assert np.isnan(fc[lacking]).all()
    assert np.isnan(fc[:, lacking]).all()
    assert np.abs(fc[np.ix_(others, others)] - connectivity(series[:, others], kind)).max() < 1e-6


@pytest.mark.parametrize("kind", ["pearson", "partial"])
def test_one_roi_correlates_with_itself_and_none_with_nothing(kind: str) -> None:
    series = draw(chain(), 30)
    series[:, 1:] = np.nan
    fc = connectivity(series, kind)
    assert fc[0, 0] == pytest.approx(1)
    assert np.isnan(fc).sum() == 35
    series[:] = np.nan
    assert np.isnan(connectivity(series, kind)).all()


def test_fishers_z_is_finite_on_the_diagonal_and_keeps_gaps() -> None:
    z = fisher_z(np.array([[1, 0.5, np.nan], [-1, 0, -0.5]]))
    assert z[0, 0] == -z[1, 0] == pytest.approx(np.arctanh(LARGEST_R))
    assert z[0, 1] == pytest.approx(np.arctanh(0.5))
    assert np.isnan(z[0, 2])
    assert np.isfinite(z).sum() == 5


# --- In the baseline ----------------------------------------------------------------------------


def write_fc(path: Path, fc: np.ndarray, kind: str = "pearson", is_z: bool = False) -> Path:
    variable = {"pearson": "fc", "partial": "fc_partial"}[kind]
    data = (("roi", "roi_2"), fc.astype(np.float32), {"fisher_z": is_z})
    xarray.Dataset({variable: data}).to_zarr(path, zarr_format=3, consolidated=False)
    finish(zarr.open_group(path), {"connectivity": [kind]})
    return path


def symmetric(rng: np.random.Generator, n: int = 5) -> np.ndarray:
    fc = np.eye(n)
    fc[np.triu_indices(n, 1)] = rng.uniform(0.2, 0.8, size=n * (n - 1) // 2)
    return np.maximum(fc, fc.T)


def test_the_baseline_reads_r_and_z_alike(tmp_path: Path) -> None:
    fc = symmetric(np.random.default_rng(0))
    as_r = read_z(write_fc(tmp_path / "r.zarr", fc))
    as_z = read_z(write_fc(tmp_path / "z.zarr", fisher_z(fc), is_z=True))
    assert as_r[0] == as_z[0] == "pearson"
    assert np.abs(as_r[1] - as_z[1]).max() < 1e-2  # of 6.1, the diagonal, in float32
    pairs = np.triu_indices(5, 1)
    assert np.abs(as_r[1] - as_z[1])[pairs].max() < 1e-6
    assert read_z(write_fc(tmp_path / "p.zarr", fc, "partial"))[0] == "partial"


def test_a_store_that_does_not_say_what_it_holds_is_refused(tmp_path: Path) -> None:
    old = xarray.Dataset({"fc": (("roi", "roi_2"), np.eye(2))})
    old.to_zarr(tmp_path / "old.zarr", zarr_format=3, consolidated=False)
    finish(zarr.open_group(tmp_path / "old.zarr"), {})
    for name in ("old.zarr", "none.zarr"):
        with pytest.raises(InputError, match=rf"{name}.*run rois"):
            read_z(tmp_path / name)


def test_what_a_test_subject_lacks_becomes_the_training_mean(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrices = {f"sub-{i}": symmetric(rng) for i in range(13)}
    for name in ("sub-10", "sub-11"):  # both of the test subjects: one ROI, and all but two
        matrices[name][0] = matrices[name][:, 0] = np.nan
    matrices["sub-11"][:3] = matrices["sub-11"][:, :3] = np.nan
    stores = {name: [write_fc(tmp_path / f"{name}.zarr", fc)] for name, fc in matrices.items()}
    train, test = [f"sub-{i}" for i in range(10)], ["sub-10", "sub-11", "sub-12"]
    with pytest.warns(UserWarning, match=r"sub-11 \(90%\)"):
        found = load_connectivity(stores, train, test)
    # No ROI is dropped because of test subjects, nor do they count for what fills the gaps.
    assert (found.n_rois, found.n_dropped, found.kind) == (5, 0, "pearson")
    filled = np.where(np.isnan(found.test), found.train.mean(axis=0), found.test)
    assert np.isnan(found.test[0]).sum() == 4
    expected = rotate(found.train, filled)
    given = rotate(found.train, found.test)
    assert np.abs(given[1] - expected[1]).max() < 1e-4
    assert np.abs(given[0] - expected[0]).max() < 1e-6
    zeros = rotate(found.train, np.nan_to_num(found.test))
    assert np.abs(given[1] - zeros[1]).max() > 0.1
