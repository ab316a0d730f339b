"""Calibrated probabilities, conformal intervals and sets, and distances from the training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_runs import FakeStore, make_config, write_dataset
from scipy.special import expit, logit
from scipy.stats import chi
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression

from neuromamba import calibrate
from neuromamba.calibrate import learn_level
from neuromamba.calibration import (
    MIN_SUBJECTS,
    Rescaling,
    class_scores,
    fit_rescaling,
    half_width,
    least_subjects,
    p_value,
    prediction_set,
)
from neuromamba.calibration_file import CALIBRATION, TRAINED, load_calibration
from neuromamba.checkpoint import load_model_info
from neuromamba.distributed import World
from neuromamba.files import InputError, digest_file, read_json
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.layout import Layout
from neuromamba.novelty import (
    LEAST_REFERENCE,
    MOST_DIRECTIONS,
    Cloud,
    choose_reference,
    cross_fitted,
    held_patches,
    is_outside,
    percentile,
    place,
    places,
)
from neuromamba.observe import Observed, observe_subjects
from neuromamba.pretrain import run_pretrain

CLASSES = ["female", "male"]


def confident(n: int, slope: float, shift: float = 0.0, seed: int = 0):
    """Two-class labels, and probabilities whose log odds are `slope` times the true ones."""
    rng = np.random.default_rng(seed)
    odds = 1.5 * rng.standard_normal(n)
    labels = (rng.random(n) < expit(odds + shift)).astype(np.int64)
    given = expit(slope * odds)
    return np.stack([1 - given, given], axis=1), labels


# --- Probabilities --------------------------------------------------------------------------------


def test_with_many_subjects_two_classes_are_scaled_as_by_logistic_regression():
    probabilities, labels = confident(20_000, slope=3.0, shift=0.7)
    found = fit_rescaling(probabilities, labels, CLASSES)
    platt = LogisticRegression(C=np.inf).fit(logit(probabilities[:, 1:]), labels)
    expected = platt.predict_proba(logit(probabilities[:, 1:]))
    np.testing.assert_allclose(found.apply(probabilities), expected, atol=2e-3)
    assert found.scale == pytest.approx(1 / 3, rel=0.05)
    assert found.bias[1] - found.bias[0] == pytest.approx(0.7, abs=0.1)
    assert found.log_loss < found.log_loss_unchanged


def test_three_classes_get_back_the_temperature_they_were_blurred_by():
    rng = np.random.default_rng(1)
    logits = 1.5 * rng.standard_normal((20_000, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(3, p=row) for row in true])
    blurred = np.sqrt(true) / np.sqrt(true).sum(axis=1, keepdims=True)
    found = fit_rescaling(blurred, labels, ["a", "b", "c"])
    assert found.scale == pytest.approx(2.0, rel=0.05)
    np.testing.assert_allclose(found.apply(blurred), true, atol=0.03)


def test_probabilities_of_one_subject_are_those_of_it_among_many():
    probabilities, labels = confident(300, slope=3.0)
    found = fit_rescaling(probabilities, labels, CLASSES)
    together = found.apply(probabilities)
    assert (found.apply(probabilities[7]) == together[7]).all()
    assert together.sum(axis=1) == pytest.approx(1)
    sure = found.apply(np.array([0.0, 1.0]))
    assert np.isfinite(sure).all()


def test_few_subjects_change_little_and_fewer_nothing():
    probabilities, labels = confident(15, slope=3.0, seed=2)
    rescaled = fit_rescaling(probabilities, labels, CLASSES)
    assert isinstance(rescaled, Rescaling)
    assert 1 / 3 < rescaled.scale < 1
    few = MIN_SUBJECTS - 1
    assert "9 validation subjects are too few" in fit_rescaling(
        probabilities[:few], labels[:few], CLASSES
    )
    assert fit_rescaling(probabilities, np.zeros(15, int), CLASSES) == (
        "no validation subject is male"
    )


def test_probabilities_that_are_right_already_are_mostly_left_as_they_are():
    left = [
        isinstance(fit_rescaling(*confident(40, slope=1.0, seed=seed), CLASSES), str)
        for seed in range(40)
    ]
    assert np.mean(left) > 0.6


def test_calibration_lowers_the_loss_of_people_it_has_not_seen():
    gains = []
    for seed in range(20):
        fitted = fit_rescaling(*confident(40, slope=3.0, seed=seed), CLASSES)
        probabilities, labels = confident(2000, slope=3.0, seed=1000 + seed)
        rows = np.arange(len(labels))
        before = -np.log(probabilities[rows, labels]).mean()
        after = before
        if not isinstance(fitted, str):
            after = -np.log(fitted.apply(probabilities)[rows, labels]).mean()
        gains.append(before - after)
    assert min(gains) > -0.02
    assert np.mean(gains) > 0.1


# --- Intervals and sets ---------------------------------------------------------------------------


def test_the_half_width_is_the_finite_sample_quantile():
    errors = list(range(1, 20))
    assert half_width(errors, 0.9) == 18  # ceil(20 * 0.9)
    assert half_width(errors, 0.95) == 19
    assert half_width(errors, 0.96) is None
    assert [least_subjects(c) for c in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
    assert half_width(errors[:9], 0.9) == 9
    assert half_width(errors[:8], 0.9) is None


@pytest.mark.parametrize(("n", "confidence"), [(9, 0.9), (30, 0.8), (40, 0.95)])
def test_intervals_hold_as_many_as_they_say(n: int, confidence: float):
    rng = np.random.default_rng(n)
    errors = np.abs(rng.standard_t(3, size=(4000, n + 1)))
    inside = [row[-1] <= half_width(row[:-1].tolist(), confidence) for row in errors]
    exact = np.ceil((n + 1) * confidence) / (n + 1)
    assert exact >= confidence
    assert np.mean(inside) == pytest.approx(exact, abs=0.02)


def test_sets_hold_as_many_of_each_class_as_they_say():
    held: dict[int, list[bool]] = {0: [], 1: []}
    for seed in range(1500):
        probabilities, labels = confident(60, slope=4.0, shift=-1.0, seed=seed)
        scores = class_scores(probabilities[1:], labels[1:], CLASSES)
        of_first = dict(zip(CLASSES, probabilities[0].tolist(), strict=True))
        kept = prediction_set(of_first, scores, 0.8)
        held[int(labels[0])].append(CLASSES[labels[0]] in kept)
    for inside in held.values():
        assert np.mean(inside) == pytest.approx(0.82, abs=0.04)


def test_a_class_of_too_few_subjects_is_never_excluded():
    scores = {"female": [0.1] * 8, "male": [0.1] * 9}
    assert prediction_set({"female": 0.0, "male": 0.0}, scores, 0.9) == ["female"]
    assert prediction_set({"female": 0.9, "male": 0.9}, scores, 0.9) == ["female", "male"]


def test_a_p_value_counts_the_value_itself():
    assert p_value([1.0, 2.0, 3.0], 2.0) == 3 / 4
    assert p_value([1.0, 2.0, 3.0], 9.0) == 1 / 4
    assert p_value([], 9.0) == 1


# --- Distances ------------------------------------------------------------------------------------


def test_distances_of_many_subjects_are_those_of_their_distribution():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4, 4))
    cloud = Cloud.fit(rng.standard_normal((50_000, 4)) @ mixing + 3)
    z = rng.standard_normal((200, 4))
    found = cloud.distances(z @ mixing + 3)
    np.testing.assert_allclose(found, np.linalg.norm(z, axis=1), rtol=0.05)
    assert np.median(found) == pytest.approx(chi(4).median(), rel=0.1)


@pytest.mark.parametrize("features", [5, 90])
def test_distances_are_those_of_the_ledoit_wolf_covariance(features: int):
    rng = np.random.default_rng(0)
    people = rng.standard_normal((40, features)) * np.exp(rng.standard_normal(features)) + 2
    new = rng.standard_normal((10, features))
    known = LedoitWolf().fit(people)
    found = Cloud.fit(people).distances(new)
    np.testing.assert_allclose(found, np.sqrt(known.mahalanobis(new)), rtol=1e-6)


def test_very_wide_embeddings_keep_their_widest_directions():
    """And the mean variance of all others, which leaves the total variance as it is."""
    rng = np.random.default_rng(0)
    people = rng.standard_normal((300, 20_000)) * np.exp(rng.standard_normal(20_000))
    cloud = Cloud.fit(people)
    assert cloud.basis.shape == (MOST_DIRECTIONS, 20_000)
    total = cloud.variances.sum() + (20_000 - MOST_DIRECTIONS) * cloud.rest[0]
    assert total == pytest.approx(people.var(axis=0).sum(), rel=1e-6)
    far, near = people[:5] + 3 * people.std(axis=0), people[:5]
    assert (cloud.distances(far) > cloud.distances(near)).all()


@pytest.mark.parametrize("features", [3, 50])
def test_new_people_are_called_outside_as_often_as_is_said(features: int):
    """Also with more features than subjects, where people are far nearer to their own cloud."""
    outside = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scales = np.exp(rng.standard_normal(features))
        people = rng.standard_normal((40 + 20, features)) * scales
        reference = cross_fitted(people[:40])
        cloud = Cloud.fit(people[:40])
        outside += [is_outside(reference, d) for d in cloud.distances(people[40:])]
        far = cloud.distances(people[40:] + 6 * scales)
        assert all(is_outside(reference, d) for d in far)
    assert np.mean(outside) == pytest.approx(2 / 41, abs=0.02)


def test_features_that_do_not_vary_are_no_obstacle():
    people = np.random.default_rng(0).standard_normal((30, 5))
    people[:, 2] = 1.0
    cloud = Cloud.fit(people)
    assert np.isfinite(cloud.distances(people)).all()
    shifted = people[:1].copy()
    shifted[0, 2] = 11.0
    assert cloud.distances(shifted)[0] > 5 * cloud.distances(people).max()
    same = Cloud.fit(np.ones((30, 5)))
    assert same.distances(np.ones((1, 5)) * 3)[0] == pytest.approx(2 * np.sqrt(5))


def test_a_small_reference_calls_nobody_outside():
    assert not is_outside(list(range(LEAST_REFERENCE - 1)), 1e9)
    assert is_outside(list(range(LEAST_REFERENCE)), 1e9)
    assert percentile([1.0, 2.0, 3.0, 4.0], 2.5) == 50
    assert choose_reference([1.0], [2.0] * LEAST_REFERENCE)[0] == "validation"
    assert choose_reference([1.0], [2.0] * (LEAST_REFERENCE - 1)) == ("training", [1.0])


def test_patches_are_numbered_by_their_centres():
    centers = np.array([[0.25, 0.25, 0.25], [0.75, 0.25, 0.25], [0.25, 0.25, 1.0]], np.float32)
    assert np.flatnonzero(held_patches(centers, (2, 2, 2))).tolist() == [0, 1, 4]


def test_the_place_of_a_brain_is_told_by_what_it_lacks_and_where_else_it_is():
    shares = np.array([1.0, 1.0, 1.0, 0.95, 0.5, 0.0, 0.0])
    whole = np.array([1, 1, 1, 1, 0, 0, 0], dtype=bool)
    assert place(whole, shares) == {"coverage": 1.0, "stray": 0.0}
    shifted = np.array([0, 0, 1, 1, 1, 1, 1], dtype=bool)
    assert place(shifted, shares) == {"coverage": 0.5, "stray": 0.4}
    # A run is compared with the others: what it alone has counts as nowhere else.
    runs = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 1]], dtype=bool)
    assert places(runs) == {"coverage": [1.0, 1.0, 0.5], "stray": [0.0, 0.0, 0.5]}


# --- What a fine-tuning leaves --------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromamba.batches.TokenStore", FakeStore)
        write_dataset(folder)
        run_pretrain(make_config(folder), "fake", "tiny", 0)
    return folder


@pytest.fixture
def folder(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    shutil.copytree(pretrained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(FakeStore, "opened", [])
    return tmp_path


def finetune(folder: Path, target: str = "sex", on_change: str = "refuse") -> Path:
    run_finetune(make_config(folder), "fake", "tiny", 0, target, on_change)
    return Layout(folder / "results", "fake").finetune("tiny", 0, target)


@pytest.mark.parametrize("target", ["sex", "age"])
def test_a_calibration_belongs_to_its_model_and_names_nobody(folder: Path, target: str):
    made = finetune(folder, target)
    info = load_model_info(made)
    assert {"calibration.json", "calibration.safetensors"} <= info["files"].keys()
    calibration, arrays = load_calibration(made, info)
    assert calibration.weights == digest_file(made / "model.safetensors")
    assert calibration.subjects == {"train": 10, "validation": 2}
    assert (calibration.dataset, calibration.target) == ("fake", target)
    assert calibration.space == "MNI152NLin2009cAsym"
    assert calibration.ranges["repetition_time"] == (1.5, 1.5)
    assert "sub-" not in (made / CALIBRATION).read_text()
    assert arrays["run.mean"].shape == (8,)
    assert arrays["patches"].shape == (2, 2, 2)
    of_run = calibration.levels["run"]
    assert len(of_run.distances["training"]) == 10
    if target == "sex":
        assert calibration.classes == CLASSES
        assert "2 validation subjects are too few" in of_run.note
        assert [len(of_run.scores[name]) for name in CLASSES] == [1, 1]
    else:
        assert len(of_run.scores["value"]) == 2
        assert of_run.scores["value"] == sorted(of_run.scores["value"])
        assert of_run.scores["value"][0] > 0
    assert not (made / TRAINED).exists()


def test_what_is_calibrated_is_what_the_evaluation_predicts(folder: Path):
    made = finetune(folder, "age")
    calibration, _ = load_calibration(made, load_model_info(made))
    subjects = ["sub-01", "sub-02"]
    table = predict_subjects(make_config(folder), "fake", "tiny", 0, "age", subjects)
    truth = np.array([20.0, 23.0])  # as `write_dataset` writes them
    expected = np.sort(np.abs(table["value"].to_numpy() - truth))
    assert calibration.levels["subject"].scores["value"] == expected.tolist()


def test_only_training_and_validation_subjects_are_opened(folder: Path):
    finetune(folder)
    assert FakeStore.poisoned
    assert not {run.split("_")[0] for run in FakeStore.opened} & FakeStore.poisoned


def test_a_calibration_that_was_stopped_goes_on_without_training_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    reference = finetune(folder)
    names = ("model.safetensors", "calibration.json", "calibration.safetensors")
    expected = {name: digest_file(reference / name) for name in names}
    info = read_json(reference / "model.json")
    for path in reference.iterdir():
        path.unlink()

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "learn", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(folder)
    # Until it is whole there is no model, which is also how a workflow would leave it.
    assert (reference / TRAINED).exists()
    with pytest.raises(InputError, match="training has not finished"):
        load_model_info(reference)
    with monkeypatch.context() as patch:
        patch.setattr("neuromamba.finetune.train_and_save", stop)
        finetune(folder)
    assert {name: digest_file(reference / name) for name in names} == expected
    assert read_json(reference / "model.json") == info
    assert not (reference / TRAINED).exists()


def test_a_stopped_calibration_of_other_settings_is_not_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "learn", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            finetune(folder)
    people = (folder / "participants.tsv").read_text().replace("\tF\t", "\tX\t")
    people = people.replace("\tM\t", "\tF\t").replace("\tX\t", "\tM\t")
    (folder / "participants.tsv").write_text(people)
    with pytest.raises(InputError, match=r"inputs\.labels"):
        finetune(folder)
    made = finetune(folder, on_change="restart")
    assert "calibration.json" in load_model_info(made)["files"]


def test_a_finished_model_is_left_as_it_is(folder: Path):
    made = finetune(folder)
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    finetune(folder)
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_a_changed_calibration_is_refused(folder: Path):
    made = finetune(folder)
    content = json.loads((made / CALIBRATION).read_text())
    content["subjects"]["validation"] = 500
    (made / CALIBRATION).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"calibration\.json differs from the digest"):
        load_model_info(made)


def test_many_training_subjects_are_represented_by_some(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calibrate, "MOST_TRAINING", 4)
    made = finetune(folder)
    calibration, arrays = load_calibration(made, load_model_info(made))
    assert calibration.subjects == {"train": 4, "validation": 2}
    assert calibration.levels["run"].distances == {"training": [], "validation": []}
    assert set(arrays) == {"patches"}  # four are too few for a covariance


def test_processes_that_share_the_subjects_find_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def keep(*arguments: Any) -> list[Observed]:
        asked.append(arguments)
        return observe_subjects(*arguments)

    monkeypatch.setattr(calibrate, "observe_subjects", keep)
    finetune(folder)
    *arguments, alone = asked[0]
    assert alone.size == 1

    class OneOfTwo(World):
        def gather(self, value: Any) -> list[Any]:
            told[self.rank] = json.dumps(value)
            return [json.loads(text) for text in told.values()]

    told: dict[int, str] = {}
    observe_subjects(*arguments, OneOfTwo(0, 2))
    together = observe_subjects(*arguments, OneOfTwo(1, 2))
    expected = observe_subjects(*arguments, World())
    assert len(json.loads(told[0])) < len(together) == len(expected) == 15
    for one, other in zip(together, expected, strict=True):
        assert (one.subject, one.run) == (other.subject, other.run)
        assert torch.equal(one.values, other.values)
        assert (one.features == other.features).all()
        assert (one.held == other.held).all()


def test_a_model_that_has_diverged_is_not_calibrated():
    units = {"sub-1": ([np.nan, 0.5], np.zeros(3)), "sub-2": ([0.5, 0.5], np.zeros(3))}
    with pytest.raises(InputError, match="no finite predictions"):
        learn_level(units, units, {"sub-1": 0, "sub-2": 1}, CLASSES)
