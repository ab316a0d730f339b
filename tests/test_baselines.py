"""Baselines: what they learn, what they must not see, and what they bear."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray
import zarr
from nilearn.connectome import ConnectivityMeasure
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from neuromamba.baseline_notes import describe_baselines
from neuromamba.baselines import Subjects, no_features, predict_baselines
from neuromamba.config import Evaluate
from neuromamba.connectivity import connectivity
from neuromamba.files import InputError
from neuromamba.linear_models import (
    PENALTIES,
    SVM_PENALTIES,
    Method,
    RegressOut,
    correlate_rows,
    predict_class,
    predict_number,
    rotate,
)
from neuromamba.roi_features import Stores, keep_common
from neuromamba.series_features import complete_covariances, load_moments, load_tangent
from neuromamba.store import finish

METHODS: tuple[Method, ...] = ("linear", "svm", "kernel-ridge")
PENALTIES_OF = {"linear": PENALTIES, "svm": SVM_PENALTIES, "kernel-ridge": PENALTIES}
ALL = ["fc", "fc-partial", "fc-tangent", "fc-svm", "fc-kernel-ridge", "roi-mean", "confounds"]


def features(n: int = 60, p: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, p)).astype(np.float32)
    return values, values[:, :20].sum(axis=1) + rng.normal(size=n)


def test_rotated_features_give_the_same_linear_models() -> None:
    x, signal = features()
    train, test = x[:40], x[40:]
    centred = train - train.mean(axis=0)
    size = np.sqrt((centred**2).sum(axis=1).mean())
    rotated, rotated_test = rotate(train, test)
    assert rotated.shape[1] <= 40
    ridge = Ridge(alpha=0.5).fit(centred / size, signal[:40])
    expected = ridge.predict((test - train.mean(axis=0)) / size)
    found = Ridge(alpha=0.5).fit(rotated, signal[:40]).predict(rotated_test)
    assert found == pytest.approx(expected, abs=1e-4)
    label = signal[:40] > 0
    logistic = LogisticRegression(C=3, tol=1e-8, max_iter=5000)
    expected = logistic.fit(centred / size, label).predict_proba((test - train.mean(axis=0)) / size)
    assert logistic.fit(rotated, label).predict_proba(rotated_test) == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_what_can_be_learnt_is_learnt(method: Method) -> None:
    x, signal = features(n=400, p=60)
    label = (signal > 1).astype(np.int64)
    probability, _ = predict_class(x[:300], label[:300], x[300:], 3, 0, method)
    assert probability.sum(axis=1) == pytest.approx(1)
    # Half of the signal is in the rows' mean, which the correlation of subjects is blind to.
    assert roc_auc_score(label[300:], probability[:, 1]) > (0.75 if "kernel" in method else 0.9)
    scaled = (signal - signal.mean()) / signal.std()
    predicted, _ = predict_number(x[:300], scaled[:300], x[300:], 3, 0, method)
    assert np.corrcoef(predicted, scaled[300:])[0, 1] > (0.7 if "kernel" in method else 0.9)


@pytest.mark.parametrize("method", METHODS)
def test_three_classes_are_told_apart(method: Method) -> None:
    x, _ = features(n=150, p=40)
    label = np.arange(150) % 3
    x[np.arange(150), label] += 4
    probability, _ = predict_class(x[:90], label[:90], x[90:], 3, 0, method)
    assert probability.shape == (60, 3)
    assert balanced_accuracy_score(label[90:], probability.argmax(axis=1)) > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_a_rare_class_is_still_named(method: Method) -> None:
    """More features than subjects, one class in six: nobody would be called by its name."""
    x, signal = features(n=240, p=400)
    label = (signal > np.quantile(signal, 5 / 6)).astype(np.int64)
    probability, _ = predict_class(x[:160], label[:160], x[160:], 4, 0, method)
    named = probability.argmax(axis=1)
    assert named.mean() > 0.15
    assert balanced_accuracy_score(label[160:], named) > 0.6


@pytest.mark.parametrize("method", METHODS)
def test_calibration_does_not_turn_the_order_of_scores(method: Method) -> None:
    """On noise the sigmoid of held-out scores falls about as often as it rises."""
    areas = []
    for seed in range(12):
        x, _ = features(n=40, p=50, seed=seed)
        label = np.arange(40) % 2
        own, _ = predict_class(x[:30], label[:30], x[:30], 3, 0, method)
        areas.append(roc_auc_score(label[:30], own[:, 1]))
    assert min(areas) > 0.9  # of the subjects that it learnt from


@pytest.mark.parametrize("method", METHODS)
def test_few_who_are_told_apart_get_probabilities_that_say_so(method: Method) -> None:
    x, _ = features(n=24, p=30)
    label = np.arange(24) % 2
    x[:, :15] += 8 * label[:, None]
    probability, _ = predict_class(x, label, x, 4, 0, method)
    share = probability[:, 1]
    assert share[label == 1].min() > 0.8
    assert share[label == 0].max() < 0.2


def test_kernel_ridge_is_scikit_learns_with_the_correlation_of_subjects() -> None:
    x, signal = features()
    rows, rows_test = correlate_rows(x[:40], x[40:])
    assert rows_test @ rows.T == pytest.approx(np.corrcoef(x[40:], x[:40])[:20, 20:], abs=1e-6)
    predicted, chosen = predict_number(x[:40], signal[:40], x[40:], 4, 0, "kernel-ridge")
    centre = rows.mean(axis=0)
    size = (((rows - centre) ** 2).sum(axis=1)).mean()
    reference = KernelRidge(alpha=size / chosen).fit(
        rows - centre, signal[:40] - signal[:40].mean()
    )
    expected = reference.predict(rows_test - centre) + signal[:40].mean()
    assert predicted == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_test_subjects_do_not_reach_what_is_learnt(method: Method) -> None:
    x, signal = features(n=60, p=100)
    x[3, 5] = x[50, 7] = np.nan
    label = (signal > 0).astype(np.int64)
    confounds = np.random.default_rng(0).normal(size=(60, 2))
    alone, company = (
        predict_class(
            x[:40], label[:40], x[40:end], 3, 0, method, (confounds[:40], confounds[40:end])
        )
        for end in (44, 60)
    )
    assert alone[1] == company[1]
    assert alone[0] == pytest.approx(company[0][:4], abs=1e-9)


def test_noise_is_not_learnt() -> None:
    scores = []
    for seed in range(10):
        x, _ = features(n=120, seed=seed)
        label = np.random.default_rng(seed + 99).integers(2, size=120)
        probability, _ = predict_class(x[:60], label[:60], x[60:], 3, 0)
        scores.append(roc_auc_score(label[60:], probability[:, 1]))
    assert abs(np.mean(scores) - 0.5) < 0.08


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rare", [1, 2])
def test_a_class_of_one_or_two_subjects_is_enough(rare: int, method: Method) -> None:
    x, _ = features(n=20)
    label = np.array([1] * rare + [0] * (18 - rare), dtype=np.int64)
    probability, chosen = predict_class(x[:18], label, x[18:], 5, 0, method)
    assert probability.shape == (2, 2)
    assert np.isfinite(probability).all()
    assert (chosen == 1.0) if rare == 1 else (chosen in PENALTIES_OF[method])


def test_features_that_do_not_vary_give_the_base_rate() -> None:
    label = np.array([0, 1] * 5, dtype=np.int64)
    probability, _ = predict_class(np.ones((10, 4)), label, np.ones((3, 4)), 5, 0)
    assert probability == pytest.approx(0.5)


def test_pairs_that_many_lack_are_dropped_and_others_filled() -> None:
    values = np.arange(20 * 6, dtype=np.float32).reshape(20, 6)
    values[:5, [0, 1, 2]] = np.nan  # ROI 0, in pairs with 1, 2 and 3, in 5 of 18 subjects
    values[7, 3] = values[19, 4] = np.nan
    found = keep_common(values, 18, 4)
    assert found.train.shape == (18, 3)
    assert (found.n_rois, found.n_dropped) == (3, 1)
    assert found.missing == pytest.approx(2 / 60)
    rotated, rotated_test = rotate(found.train, found.test)
    assert np.isfinite(rotated).all()
    assert np.isfinite(rotated_test).all()
    values[:9] = np.nan
    with pytest.raises(InputError, match="no two of the 4 ROIs"):
        keep_common(values, 18, 4)


def test_guessing_knows_the_training_labels_only() -> None:
    labels = pd.Series(["a", "b", "b", "b"])
    assert no_features(labels, ["a", "b", "c"]) == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert no_features(pd.Series([1.0, 2.0, 6.0]), []) == {"value": 3.0}


def test_five_hundred_subjects_and_an_atlas_of_400_take_seconds() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 76_000), dtype=np.float32)
    label = rng.integers(2, size=500)
    start = time.perf_counter()
    predict_class(x[:450], label[:450], x[450:], 5, 0)
    assert time.perf_counter() - start < 40


# --- Confounds regressed out --------------------------------------------------------------------


def test_what_is_regressed_out_is_unrelated_to_the_confounds() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 3))
    x = rng.normal(size=(50, 8)) + z @ rng.normal(size=(3, 8)) + 5
    adjusted = RegressOut(3).fit_transform(np.hstack([x, z]))
    assert adjusted.shape == (50, 8)
    assert np.abs(z.T @ adjusted).max() < 1e-9
    expected = (
        x
        - np.column_stack([np.ones(50), z])
        @ np.linalg.lstsq(np.column_stack([np.ones(50), z]), x, rcond=None)[0]
    )
    assert adjusted == pytest.approx(expected)
    assert RegressOut().fit_transform(x) == pytest.approx(x - x.mean(axis=0))


def test_a_site_that_was_not_fitted_counts_as_the_mean_of_the_others() -> None:
    """Sites of very unequal size: the constant beside a column for each is not determined."""
    site = np.repeat([0, 1], [90, 10])
    x = np.where(site, 3.0, 1.0)[:, None] + np.zeros((100, 2))
    adjust = RegressOut(2).fit(np.hstack([x, np.eye(2)[site]]))
    new = np.array([[2.0, 2.0, 0, 0], [7.0, -1.0, 0, 0]])
    assert adjust.transform(new) == pytest.approx(np.array([[0.0, 0.0], [5.0, -3.0]]))
    assert adjust.transform(np.hstack([x, np.eye(2)[site]])) == pytest.approx(np.zeros((100, 2)))


def test_regression_before_or_after_the_rotation_is_the_same() -> None:
    x, signal = features(n=60, p=200)
    z = np.random.default_rng(1).normal(size=(60, 2))
    found, chosen = predict_number(
        x[:40].astype(float), signal[:40], x[40:].astype(float), 4, 0, "linear", (z[:40], z[40:])
    )
    adjust = RegressOut(2).fit(np.hstack([x[:40], z[:40]]))
    train, test = (
        adjust.transform(np.hstack([x[part], z[part]])) for part in (slice(40), slice(40, 60))
    )
    centred = x[:40] - x[:40].mean(axis=0)
    ridge = Ridge(alpha=(centred**2).sum(axis=1).mean() / chosen).fit(train, signal[:40])
    assert found == pytest.approx(ridge.predict(test), abs=1e-4)


def test_a_target_that_only_the_confound_carries_is_lost_by_regression() -> None:
    rng = np.random.default_rng(0)
    site = np.arange(200) % 2
    label = np.where(rng.random(200) < 0.85, site, 1 - site)
    x = rng.normal(size=(200, 30)) + site[:, None]
    z = site[:, None].astype(float)
    plain, _ = predict_class(x[:120], label[:120], x[120:], 4, 0)
    adjusted, _ = predict_class(x[:120], label[:120], x[120:], 4, 0, "linear", (z[:120], z[120:]))
    assert roc_auc_score(label[120:], plain[:, 1]) > 0.75
    assert abs(roc_auc_score(label[120:], adjusted[:, 1]) - 0.5) < 0.15


# --- Features of the series ---------------------------------------------------------------------


def write_stores(folder: Path, n: int = 40, rois: int = 6, times: int = 60) -> Stores:
    """ROI stores whose label (odd or even) is in the correlation of ROIs 0 and 1."""
    stores = {}
    for k in range(n):
        rng = np.random.default_rng(k)
        series = rng.normal(size=(times, rois)).astype(np.float32)
        series[:, 1] += (k % 2) * 1.5 * series[:, 0]
        series = series * 10 + 100
        if k % 13 == 5:
            series[:, 4] = np.nan
        if k % 3 == 0:
            series[:, 5] = np.nan  # too many lack it
        variables = {
            name: (("roi", "roi_2"), connectivity(series, kind), {"fisher_z": False})
            for name, kind in (("fc", "pearson"), ("fc_partial", "partial"))
        }
        path = folder / f"sub-{k:03}.zarr"
        data = xarray.Dataset({"timeseries": (("time", "roi"), series), **variables})
        data.to_zarr(path, zarr_format=3, consolidated=False)
        finish(zarr.open_group(path), {"connectivity": ["pearson", "partial"]})
        stores[f"sub-{k:03}"] = [path]
    return stores


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return write_stores(tmp_path_factory.mktemp("stores"))


def people(stores: Stores) -> Subjects:
    names = list(stores)
    labels = pd.Series([["even", "odd"][k % 2] for k in range(len(names))], names)
    return Subjects(["even", "odd"], labels[:30], labels[30:], 0)


def test_tangent_space_is_nilearns_where_no_roi_is_missing(stores: Stores) -> None:
    names = [name for k, name in enumerate(stores) if k % 13 != 5 and k % 3]
    found = load_tangent(stores, names[:10], names[10:16])
    series = []
    for name in names[:16]:
        with xarray.open_zarr(stores[name][0], chunks=None) as store:
            values = store["timeseries"].values.astype(np.float64)
        series.append((values - values.mean(axis=0)) / values.std(axis=0))
    measure = ConnectivityMeasure(kind="tangent", vectorize=True, standardize=False)
    measure.fit(series[:10])
    expected = measure.transform(series)
    assert np.vstack([found.train, found.test]) == pytest.approx(expected, abs=1e-3)
    assert (found.n_rois, found.n_dropped, found.missing) == (6, 0, 0)


def test_the_reference_of_tangent_space_is_of_training_subjects_alone(stores: Stores) -> None:
    names = list(stores)
    few, many = (load_tangent(stores, names[:20], names[20:end]) for end in (24, 40))
    assert (few.train == many.train).all()
    assert (few.test == many.test[:4]).all()
    assert (few.n_rois, few.n_dropped) == (5, 1)
    assert few.missing > 0
    assert np.isfinite(few.train).all()


def test_a_completed_covariance_keeps_what_was_there_and_is_positive_definite() -> None:
    rng = np.random.default_rng(0)
    truth = np.stack(
        [np.cov(rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)), rowvar=False) for _ in range(8)]
    )
    gaps = truth.copy()
    gaps[2, 3] = gaps[2, :, 3] = np.nan
    gaps[7] = np.nan
    complete = complete_covariances(gaps, 6)
    assert (complete[[0, 1, 3]] == truth[[0, 1, 3]]).all()
    have = np.ix_([0, 1, 2, 4], [0, 1, 2, 4])
    assert (complete[2][have] == truth[2][have]).all()
    assert np.linalg.eigvalsh(complete).min() > 0
    mean = np.nanmean(gaps[:6], axis=0)
    assert complete[7] == pytest.approx(mean, rel=1e-6)  # nothing is known of it
    # A subject like the mean is completed to the mean.
    average = np.stack([mean, mean])
    average[1, 3] = average[1, :, 3] = np.nan
    assert complete_covariances(average, 1)[1] == pytest.approx(mean)


def test_moments_are_means_and_sds_in_units_of_the_training_subjects(stores: Stores) -> None:
    names = list(stores)
    found = load_moments(stores, names[:30], names[30:])
    assert found.train.shape == (30, 10)
    assert (found.n_rois, found.n_dropped) == (5, 1)
    assert np.nanmean(found.train, axis=0) == pytest.approx(0, abs=1e-4)
    assert np.nanstd(found.train, axis=0) == pytest.approx(1, abs=1e-4)
    assert np.isnan(found.train[5, [4, 9]]).all()


def test_each_baseline_predicts_the_same_subjects_and_those_that_can_find_the_label(
    stores: Stores,
) -> None:
    settings = Evaluate.model_validate({"baselines": ALL, "inner_folds": 3})
    subjects = people(stores)
    confounds = pd.DataFrame({"age": np.arange(40.0) // 2}, list(stores))
    predicted, notes = predict_baselines(settings, subjects, stores, confounds, 0)
    assert list(predicted) == list(notes) == ALL
    true = subjects.test == "odd"
    areas = {name: roc_auc_score(true, table["prob_odd"]) for name, table in predicted.items()}
    for name, table in predicted.items():
        assert list(table.index) == list(subjects.test.index)
        assert list(table) == ["prob_even", "prob_odd"]
        if name not in ("roi-mean", "confounds"):
            assert areas[name] == 1, name
    assert areas["confounds"] < 0.8
    kinds = [notes[name]["kind"] for name in ALL[:-1]]
    assert kinds == ["pearson", "partial", "tangent", "pearson", "pearson", "mean and SD"]
    assert notes["confounds"]["columns"] == ["age"]


def test_regression_is_noted_and_stands_beside_what_was_not_regressed(stores: Stores) -> None:
    """A model that may use the confounds is held against an FC that may, too."""
    subjects = people(stores)
    label = pd.DataFrame({"age": np.arange(40.0) % 2}, list(stores))
    raw = {"baselines": ["fc", "confounds"], "inner_folds": 3}
    plain, _ = predict_baselines(Evaluate.model_validate(raw), subjects, stores, label, 0)
    settings = Evaluate.model_validate({**raw, "baselines": ["fc", "fc-regress", "confounds"]})
    predicted, notes = predict_baselines(settings, subjects, stores, label, 0)
    assert list(predicted) == settings.baselines
    assert notes["fc"]["confounds_regressed"] == []
    assert notes["fc-regress"]["confounds_regressed"] == ["age"]
    true = subjects.test == "odd"
    # The confound is the label, so nothing is left of it.
    assert roc_auc_score(true, predicted["fc"]["prob_odd"]) == 1
    assert roc_auc_score(true, predicted["fc-regress"]["prob_odd"]) < 0.8
    for name in ("fc", "confounds"):
        assert predicted[name].equals(plain[name])


# --- Sites harmonised ---------------------------------------------------------------------------


COMBAT = Evaluate.model_validate({"baselines": ["fc", "fc-combat"], "inner_folds": 3})


def test_sites_are_harmonised_for_one_baseline_alone_and_what_they_do_not_tell_is_kept(
    stores: Stores,
) -> None:
    subjects = people(stores)
    sites = pd.DataFrame({"site": ["here", "here", "there", "there"] * 10}, list(stores))
    predicted, notes = predict_baselines(COMBAT, subjects, stores, sites, 0)
    true = subjects.test == "odd"
    assert roc_auc_score(true, predicted["fc-combat"]["prob_odd"]) == 1
    assert not predicted["fc-combat"].equals(predicted["fc"])
    assert notes["fc-combat"]["harmonised"] == {"sites": 2, "train_left": 0, "test_left": 0}
    assert "harmonised" not in notes["fc"]
    alone = Evaluate.model_validate({"baselines": ["fc"], "inner_folds": 3})
    assert predict_baselines(alone, subjects, stores, sites, 0)[0]["fc"].equals(predicted["fc"])


def test_what_only_the_site_tells_is_lost_by_harmonising(stores: Stores) -> None:
    """Odd subjects were scanned elsewhere, and look it."""
    subjects = people(stores)
    sites = pd.DataFrame({"site": ["here", "there"] * 20}, list(stores))
    predicted, _ = predict_baselines(COMBAT, subjects, stores, sites, 0)
    true = (subjects.test == "odd").astype(float)
    apart = {name: table["prob_odd"] - true for name, table in predicted.items()}
    assert apart["fc"].abs().max() < 0.4
    assert apart["fc-combat"].abs().min() > 0.45


def test_the_labels_of_test_subjects_and_other_test_subjects_do_not_reach_combat(
    stores: Stores,
) -> None:
    subjects = people(stores)
    sites = pd.DataFrame({"site": ["here", "here", "there", "there"] * 10}, list(stores))
    whole, _ = predict_baselines(COMBAT, subjects, stores, sites, 0)
    turned = subjects.test.map({"odd": "even", "even": "odd"})[:4]
    few, _ = predict_baselines(COMBAT, replace(subjects, test=turned), stores, sites, 0)
    pd.testing.assert_frame_equal(few["fc-combat"], whole["fc-combat"].iloc[:4])


def test_subjects_of_new_sites_are_predicted_and_counted(stores: Stores) -> None:
    subjects = people(stores)
    site = np.array(["here", "here", "there", "there"] * 10, dtype=object)
    site[33:37] = "new"
    site[[3, 38]] = None, np.nan
    sites = pd.DataFrame({"site": site}, list(stores))
    predicted, notes = predict_baselines(COMBAT, subjects, stores, sites, 0)
    assert notes["fc-combat"]["harmonised"] == {"sites": 2, "train_left": 1, "test_left": 5}
    assert np.isfinite(predicted["fc-combat"]).all(axis=None)
    told = describe_baselines({"baselines": notes, "n_train": 30}, True)[1]
    assert told.startswith("FC, sites harmonised: logistic regression on the Fisher z")
    assert "effects of 2 sites taken out of them by ComBat (not of 1 training and 5 test" in told


@pytest.mark.parametrize("table", [{"age": 1.0}, {"site": "here"}])
def test_a_dataset_of_one_site_is_not_harmonised(stores: Stores, table: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"ComBat needs two sites .*leave fc-combat out"):
        predict_baselines(COMBAT, people(stores), stores, pd.DataFrame(table, list(stores)), 0)


def test_without_confounds_the_confound_model_says_so(stores: Stores) -> None:
    same = pd.DataFrame({"age": 30.0}, list(stores))
    with pytest.raises(InputError, match=r"evaluate\.confounds .*none of them is known"):
        predict_baselines(Evaluate(), people(stores), stores, same, 0)
    settings = Evaluate.model_validate({"baselines": ["fc"]})
    assert list(predict_baselines(settings, people(stores), stores, same, 0)[0]) == ["fc"]


def test_a_store_without_partial_correlation_is_named(tmp_path: Path) -> None:
    stores = write_stores(tmp_path, n=4)
    for paths in stores.values():
        del zarr.open_group(paths[0])["fc_partial"]
    settings = Evaluate.model_validate({"baselines": ["fc", "fc-partial"], "confounds": ["age"]})
    age = pd.DataFrame({"age": [1.0, 2, 3, 4]}, list(stores))
    labels = pd.Series(["even", "odd"] * 2, list(stores))
    subjects = Subjects(["even", "odd"], labels[:2], labels[2:], 0)
    with pytest.raises(
        InputError, match=r"sub-000\.zarr.*no partial connectivity.*rois\.connectivity"
    ):
        predict_baselines(settings, subjects, stores, age, 0)
