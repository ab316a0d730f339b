"""Ranks, prompts, and the stage that makes them, by embeddings whose neighbours are known."""

from __future__ import annotations

import numpy as np
import pytest

from neuromamba.retrieval import draw_references, prompt, ranks_of, summarize_ranks


def test_a_rank_is_the_place_of_the_own_one_and_ties_count_against_it() -> None:
    similar = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.7, 0.7, 0.7]])
    assert ranks_of(similar).tolist() == [1, 2, 3]
    assert ranks_of(np.zeros((4, 4))).tolist() == [4, 4, 4, 4]


def test_recall_and_mean_rank_have_intervals_and_chance() -> None:
    ranks = np.array([1, 1, 2, 7, 10, 3, 1, 4])
    found = summarize_ranks(ranks, 10, [1, 5, 50], 500, 0.95, 0)
    assert found["n"] == 8
    assert found["choices"] == 10
    assert found["recall_1"] == pytest.approx(3 / 8)
    assert found["recall_5"] == pytest.approx(6 / 8)
    assert found["mean_rank"] == pytest.approx(29 / 8)
    assert (found["recall_1_chance"], found["recall_5_chance"]) == (0.1, 0.5)
    assert found["mean_rank_chance"] == 5.5
    assert "recall_50" not in found
    for name in ("recall_1", "recall_5", "mean_rank"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    # The interval of a share of 3 in 8 by the binomial distribution is about 0.125 to 0.75.
    assert found["recall_1_low"] == pytest.approx(0.125, abs=0.07)
    assert found["recall_1_high"] == pytest.approx(0.75, abs=0.07)


def test_chance_is_what_random_embeddings_get() -> None:
    rng = np.random.default_rng(0)
    ranks = np.concatenate([ranks_of(rng.standard_normal((20, 20))) for _ in range(200)])
    found = summarize_ranks(ranks, 20, [1, 5], 10, 0.95, 0)
    for name in ("recall_1", "recall_5", "mean_rank"):
        assert found[name] == pytest.approx(found[f"{name}_chance"], rel=0.1)


def test_references_are_a_share_of_each_class_of_those_who_may_be_drawn() -> None:
    labels = {f"sub-{i:03d}": int(i < 40) for i in range(100)}
    found = draw_references(labels, 0.1, 2, 0)
    assert [len(one) for one in found] == [6, 4]
    assert all(labels[name] == number for number, names in enumerate(found) for name in names)
    assert found == draw_references(labels, 0.1, 2, 0) != draw_references(labels, 0.1, 2, 1)
    assert [len(one) for one in draw_references(labels, 0.001, 3, 0)] == [1, 1, 0]


def test_a_prompt_is_the_mean_similarity_to_the_means_of_equal_groups() -> None:
    rng = np.random.default_rng(0)
    of_class = rng.standard_normal((7, 4))
    of_class /= np.linalg.norm(of_class, axis=1, keepdims=True)
    person = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    means = [of_class[:3].mean(0), of_class[3:6].mean(0)]  # the seventh is left over
    wanted = np.mean([person @ (mean / np.linalg.norm(mean)) for mean in means], axis=0)
    assert prompt(person, [of_class], 2)[:, 0] == pytest.approx(wanted)
    # More groups than references: each is its own.
    assert prompt(person, [of_class], 20)[:, 0] == pytest.approx((person @ of_class.T).mean(1))


def test_prompts_find_the_class_that_is_nearest() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(3, 6)
    people, classes = [], np.repeat([0, 1, 2], 30)
    for number in classes:
        drawn = centres[number] + 0.3 * rng.standard_normal(6)
        people.append(drawn / np.linalg.norm(drawn))
    people = np.array(people)
    references = [people[classes == number][:10] for number in range(3)]
    told = prompt(people, references, 5).argmax(axis=1)
    assert (told == classes).mean() > 0.9
