"""Statistics of states: a subject has a row for each of its states, and is drawn as a whole."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from neuromamba.inner_folds import class_folds, grouped_folds
from neuromamba.linear_models import predict_class
from neuromamba.metrics import bootstrap, compare, compute_metrics
from neuromamba.permutations import shuffles, swaps
from neuromamba.predictors import read_predictors

STATES = ["rest", "faces"]


def table(
    subjects: int, signal: float, seed: int = 0, bias: float = 0.0, predictor: str = "m"
) -> pd.DataFrame:
    """Predictions of two states of each subject, with an offset of the subject's own."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(subjects):
        offset = bias * rng.normal()
        for state in STATES:
            score = offset + signal * (state == "faces") + rng.normal()
            share = 1 / (1 + np.exp(-score))
            label = STATES[int(share > 0.5)]
            rows.append((f"sub-{number:02}", state, predictor, state, label, 1 - share, share))
    columns = ["subject", "state", "predictor", "y_true", "y_pred", "prob_rest", "prob_faces"]
    return pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=seed)


def test_labels_are_shuffled_within_people():
    people = np.array([0, 1, 0, 2, 1, 0])
    orders = np.concatenate(list(shuffles(6, 20_000, 0, people)))
    assert orders[0].tolist() == list(range(6))
    assert (people[orders] == people).all()
    assert (np.sort(orders, axis=1) == np.arange(6)).all()
    # All 3! x 2! x 1! arrangements, each about as often.
    counts = pd.Series(map(tuple, orders)).value_counts()
    assert len(counts) == 12
    assert counts.to_numpy() == pytest.approx(20_001 / 12, rel=0.1)


def test_a_person_is_swapped_as_a_whole():
    people = np.array([0, 1, 0, 2, 1, 0])
    found = np.concatenate(list(swaps(6, 2_000, 0, people)))
    assert not found[0].any()
    assert (found[:, [0, 0, 1]] == found[:, [2, 5, 4]]).all()
    assert len({tuple(row) for row in found.tolist()}) == 8


def test_without_people_the_arrangements_are_as_before():
    one, alone = np.zeros(5, dtype=np.int64), np.arange(5)
    assert (next(shuffles(5, 50, 3)) == next(shuffles(5, 50, 3, one))).all()
    assert (next(swaps(5, 50, 3)) == next(swaps(5, 50, 3, alone))).all()


def test_metrics_are_of_samples_and_n_of_subjects():
    rows = table(12, 1.0)
    found = compute_metrics(rows, 50, 0.95, 0, 50).set_index("metric")
    auroc = roc_auc_score(rows["y_true"] == "faces", rows["prob_faces"])
    assert found.loc["auroc", "value"] == pytest.approx(auroc)
    balanced = balanced_accuracy_score(rows["y_true"], rows["y_pred"])
    assert found.loc["balanced_accuracy", "value"] == pytest.approx(balanced)
    assert (found["n"] == 12).all()


def test_resamples_are_of_whole_subjects():
    rows = table(8, 1.0, bias=2.0)
    one = read_predictors(rows)["m"]
    drawn = bootstrap(one.metrics, one.strata, 300, 5)
    rng = np.random.default_rng(5)
    numbers = rng.integers(8, size=(300, 8))
    names = sorted(set(rows["subject"]))
    by_subject = {name: of for name, of in rows.groupby("subject")}
    for k in range(0, 300, 37):
        again = pd.concat([by_subject[names[number]] for number in numbers[k]])
        expected = roc_auc_score(again["y_true"] == "faces", again["prob_faces"])
        assert drawn["auroc"][k] == pytest.approx(expected)


def test_p_against_chance_is_that_of_all_shuffles_within_subjects():
    rows = table(6, 0.3, seed=3, bias=2.0).sort_values(["subject", "state"])
    scores = rows["prob_faces"].to_numpy().reshape(6, 2)  # faces, rest
    areas = []
    for turned in itertools.product([False, True], repeat=6):
        truth = np.array([[0, 1] if turn else [1, 0] for turn in turned])
        areas.append(roc_auc_score(truth.ravel(), scores.ravel()))
    exact = np.mean(np.array(areas) >= areas[0] - 1e-9)
    found = compute_metrics(rows, 10, 0.95, 0, 20_000).set_index("metric")
    assert found.loc["auroc", "p"] == pytest.approx(exact, abs=0.015)
    assert 0.02 < exact < 0.9


def test_what_tells_subjects_but_no_states_is_at_chance():
    """Shuffling freely would not keep the subjects' own offsets, and p would be off."""
    p = [
        compute_metrics(table(10, 0.0, seed, bias=3.0), 2, 0.95, seed, 99)["p"].iloc[0]
        for seed in range(40)
    ]
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) <= 0.1) < 0.25
    # They would all be near a half.
    assert np.std(p) > 0.2


def test_p_of_a_difference_is_that_of_all_swaps_of_subjects():
    first = table(7, 2.0, 1, bias=1.0)
    second = table(7, 0.7, 2, bias=1.0, predictor="other")
    rows = pd.concat([first, second])
    loss = {}
    for name, of in rows.groupby("predictor"):
        of = of.sort_values(["subject", "state"])
        truth = (of["y_true"] == "faces").to_numpy(float)
        loss[name] = ((of["prob_faces"] - truth) ** 2).to_numpy().reshape(7, 2).sum(axis=1)
    each = loss["m"] - loss["other"]
    signs = np.array(list(itertools.product([1, -1], repeat=7)))
    exact = np.mean(np.abs(signs @ each) >= abs(each.sum()) - 1e-9)
    found = compare(rows, "m", "other", 100, 0.95, 0, 20_000).set_index("metric")
    assert found.loc["brier", "p"] == pytest.approx(exact, abs=0.015)
    assert found["p_resampled"].isna().all()


def test_folds_and_repeats_have_several_states_of_a_subject():
    parts = []
    for repeat in range(2):
        rows = table(12, 1.5, seed=repeat)
        number = rows["subject"].str[4:].astype(int)
        parts.append(rows.assign(fold=[f"fold-{2 * repeat + n % 2}" for n in number]))
    rows = pd.concat(parts)
    found = compute_metrics(rows, 50, 0.95, 0, 199).set_index("metric")
    areas = [
        roc_auc_score(of["y_true"] == "faces", of["prob_faces"]) for _, of in rows.groupby("fold")
    ]
    assert found.loc["auroc", "value"] == pytest.approx(np.mean(areas))
    assert (found["n"] == 12).all()
    assert found.loc["auroc", "p"] < 0.05
    other = rows.assign(predictor="other", prob_faces=0.5, prob_rest=0.5, y_pred="rest")
    compared = compare(pd.concat([rows, other]), "m", "other", 50, 0.95, 0, 199)
    assert compared["p_resampled"].notna().any()


# --- Inner folds --------------------------------------------------------------------------------


def test_inner_folds_are_of_subjects_where_some_have_several_samples():
    labels = np.arange(12) % 2
    names = [f"sub-{n}" for n in range(12)]
    alone, named = class_folds(labels, None, 4, 0), class_folds(labels, names, 4, 0)
    assert alone is not None
    assert named is not None
    assert len(alone) == len(named) == 4
    for one, other in zip(alone, named, strict=True):
        assert (one[1] == other[1]).all()
        assert set(labels[one[1]]) == {0, 1}
    pairs = class_folds(labels, [f"sub-{n // 2}" for n in range(12)], 4, 0)
    assert pairs is not None
    assert all({n // 2 for n in fit}.isdisjoint(n // 2 for n in score) for fit, score in pairs)
    rare = np.array([1] + [0] * 11)
    assert class_folds(rare, names, 4, 0) is None
    rare[1] = 1
    assert len(class_folds(rare, None, 4, 0) or []) == 2


def test_inner_folds_keep_subjects_together_and_have_all_classes():
    people = [f"sub-{n // 3}" for n in range(36)]
    labels = np.arange(36) % 3
    folds = grouped_folds(labels, people, 5, 0)
    assert folds is not None
    assert len(folds) == 5
    for fitted, scored in folds:
        assert not {people[n] for n in fitted} & {people[n] for n in scored}
        assert set(labels[fitted]) == set(labels[scored]) == {0, 1, 2}
    assert sorted(np.concatenate([scored for _, scored in folds])) == list(range(36))


def test_there_are_fewer_inner_folds_where_few_subjects_have_a_class():
    people = ["a", "a", "b", "b", "c", "d", "e"]
    folds = grouped_folds([0, 1, 0, 1, 0, 0, 0], people, 5, 0)
    assert folds is not None
    assert len(folds) == 2
    assert grouped_folds([0, 1, 0, 0], ["a", "a", "b", "c"], 5, 0) is None


def test_the_penalty_is_not_chosen_by_what_tells_subjects():
    """Subjects' own patterns say much of their other samples, and nothing of new subjects.

    By inner folds that mix them, the weakest penalty looks as good as any.
    """
    rng = np.random.default_rng(0)
    people = [f"sub-{n // 4}" for n in range(40)]
    mine = rng.integers(0, 2, size=10).repeat(4)  # all samples of a subject have one label
    x = rng.normal(size=(10, 30)).repeat(4, axis=0) + 0.1 * rng.normal(size=(40, 30))
    mixed = predict_class(x, mine, x, 5, 0)
    grouped = predict_class(x, mine, x, 5, 0, people=people)
    assert mixed[1] != grouped[1] or not np.allclose(mixed[0], grouped[0])
    # Platt's sigmoid of what is known of others is near a half: there is nothing to know.
    assert np.abs(grouped[0] - 0.5).mean() < np.abs(mixed[0] - 0.5).mean()
