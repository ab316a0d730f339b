"""Contrast and matching of pairs, whatever the two kinds of data are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from neuromamba.models.contrastive import (
    LARGEST_SCALE,
    LogitScale,
    Matcher,
    Pairs,
    Standardise,
    contrast,
    hard_negatives,
    match,
)


def make_pairs(n: int = 6, **changes) -> Pairs:
    drawn = torch.Generator().manual_seed(0)
    first, second = (
        torch.nn.functional.normalize(torch.randn(n, 5, generator=drawn, dtype=torch.float64))
        for _ in range(2)
    )
    there = torch.ones(n, dtype=torch.bool)
    return Pairs(
        **{
            "first": first,
            "second": second,
            "has_first": there,
            "has_second": there,
            "person": torch.arange(n),
            **changes,
        }
    )


def reference(pairs: Pairs, scale: float, rows: list[int], columns: list[list[int]]) -> float:
    """InfoNCE of firsts against the seconds that each may be told from, by its equation."""
    logits = scale * pairs.first.numpy() @ pairs.second.numpy().T
    return float(
        np.mean(
            [
                -math.log(np.exp(logits[i, i]) / np.exp(logits[i, js]).sum())
                for i, js in zip(rows, columns, strict=True)
            ]
        )
    )


def swapped(pairs: Pairs) -> Pairs:
    return Pairs(pairs.second, pairs.first, pairs.has_second, pairs.has_first, pairs.person)


def test_the_contrast_is_that_of_the_equation() -> None:
    pairs, every = make_pairs(), list(range(6))
    found = contrast(pairs, torch.tensor(7.0))["loss"]
    both = [reference(one, 7.0, every, [every] * 6) for one in (pairs, swapped(pairs))]
    assert float(found) == pytest.approx(sum(both) / 2, rel=1e-9)


def test_samples_of_one_person_and_lone_ones_are_treated_as_told() -> None:
    has_first = torch.tensor([True, True, True, True, False, True])
    has_second = torch.tensor([True, True, True, False, True, True])
    person = torch.tensor([0, 1, 0, 3, 4, 5])
    pairs = make_pairs(has_first=has_first, has_second=has_second, person=person)
    found = contrast(pairs, torch.tensor(7.0))["loss"]
    # Number 3 has no second, number 4 no first; 0 and 2 are one person.
    rows = [0, 1, 2, 5]
    firsts = [[0, 1, 4, 5], [0, 1, 2, 4, 5], [1, 2, 4, 5], [0, 1, 2, 4, 5]]
    seconds = [[0, 1, 3, 5], [0, 1, 2, 3, 5], [1, 2, 3, 5], [0, 1, 2, 3, 5]]
    wanted = (
        reference(pairs, 7.0, rows, firsts) + reference(swapped(pairs), 7.0, rows, seconds)
    ) / 2
    assert float(found) == pytest.approx(wanted, rel=1e-9)


def test_without_a_pair_the_loss_is_0_and_so_is_its_gradient() -> None:
    none = torch.zeros(6, dtype=torch.bool)
    pairs = make_pairs(has_second=none)
    first = pairs.first.clone().requires_grad_()
    pairs = Pairs(first, pairs.second, pairs.has_first, none, pairs.person)
    torch.manual_seed(0)
    matcher, drawn = Matcher(5).double(), torch.Generator().manual_seed(0)
    scale = torch.tensor(7.0)
    loss = contrast(pairs, scale)["loss"] + match(pairs, matcher, scale, drawn)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert first.grad is not None
    assert float(first.grad.abs().max()) == 0


def test_who_is_found_first_is_counted() -> None:
    pairs = make_pairs()
    same = Pairs(pairs.first, pairs.first, pairs.has_first, pairs.has_second, pairs.person)
    found = contrast(same, torch.tensor(7.0))
    assert float(found["top1_first"]) == float(found["top1_second"]) == 1
    # Each first is the second of the next one.
    moved = Pairs(pairs.first, pairs.first.roll(1, 0), same.has_first, same.has_second, same.person)
    found = contrast(moved, torch.tensor(7.0))
    assert float(found["top1_first"]) == float(found["top1_second"]) == 0


def test_the_scale_is_learnt_and_clamped() -> None:
    scale = LogitScale(0.07)
    assert float(scale().detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        scale.logarithm.fill_(9.0)
    value = scale()
    assert float(value.detach()) == pytest.approx(LARGEST_SCALE, rel=1e-6)
    value.backward()
    assert scale.logarithm.grad is not None
    assert float(scale.logarithm.grad) == pytest.approx(LARGEST_SCALE, rel=1e-6)


def test_hard_negatives_are_drawn_by_likeness_among_those_allowed() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 5.0]).repeat(4000, 1)
    logits = torch.cat([logits, torch.zeros(4000, 3996)], 1)
    allowed = torch.zeros(4000, 4000, dtype=torch.bool)
    allowed[:, :3] = True
    allowed[-1] = False
    columns, possible = hard_negatives(logits, allowed, torch.Generator().manual_seed(0))
    counts = torch.bincount(columns[:-1], minlength=4) / 3999
    assert torch.allclose(counts[:3], torch.tensor([0.0, 2.0, 1.0]).softmax(0), atol=0.03)
    assert float(counts[3]) == 0
    assert possible.tolist() == [True] * 3999 + [False]


def test_matching_tells_pairs_from_hard_negatives() -> None:
    class Knows(torch.nn.Module):
        """Tells a pair by its embeddings, which are the same."""

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            alike = (first - second).abs().sum(1) < 1e-9
            return torch.stack([~alike, alike], 1).double() * 50

    pairs = make_pairs()
    same = Pairs(pairs.first, pairs.first, pairs.has_first, pairs.has_second, pairs.person)
    found = match(same, Knows(), torch.tensor(7.0), torch.Generator().manual_seed(0))
    assert float(found["accuracy"]) == 1
    assert float(found["loss"]) < 1e-9
    # The negatives of everybody who is the same person as all others do not count.
    alone = Pairs(pairs.first, pairs.second, *[same.has_first] * 2, torch.zeros(6).long())
    found = match(alone, Knows(), torch.tensor(7.0), torch.Generator().manual_seed(0))
    assert float(found["accuracy"]) == 0
    assert float(found["loss"]) == pytest.approx(50, rel=1e-6)


def test_values_are_standardised_by_who_is_there_and_each_by_what_was_settled() -> None:
    drawn = torch.Generator().manual_seed(0)
    values = 100 + 0.01 * torch.randn(8, 5, generator=drawn, dtype=torch.float64)
    there = torch.tensor([True] * 6 + [False] * 2)
    layer = Standardise(5).double()
    found = layer(values, there)
    assert torch.allclose(found[:6].mean(0), torch.zeros(5).double(), atol=1e-6)
    assert torch.allclose(found[:6].std(0, correction=0), torch.ones(5).double(), atol=1e-6)
    assert torch.allclose(layer(values), values)  # nothing has been settled
    layer.settle(values[:6])
    assert torch.allclose(layer(values[:1]), found[:1])
    layer.settle(values[:1])  # of one there is no SD
    assert torch.allclose(layer(values[:1]), found[:1])


def test_what_is_the_same_for_everybody_becomes_0() -> None:
    layer = Standardise(3).train()
    same = torch.full((4, 3), 7.0)
    assert not layer(same, torch.ones(4, dtype=torch.bool)).any()
