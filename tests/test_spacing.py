"""Evenly spaced places and people."""

from __future__ import annotations

import pytest

from neuromamba.spacing import some_of, spaced

NAMES = [f"sub-{k}" for k in range(10)]


def test_subjects_are_taken_evenly():
    assert some_of(NAMES, None) == NAMES
    assert some_of(NAMES, 20) == NAMES
    assert some_of(NAMES, 3) == ["sub-0", "sub-4", "sub-9"]
    assert some_of(NAMES, 1) == ["sub-0"]


@pytest.mark.parametrize("count", [None, 0, 1, 5])
def test_of_nobody_there_is_nobody(count: int | None):
    assert some_of([], count) == []


def test_places_reach_both_ends_or_stand_in_the_middle():
    assert spaced(9, 3).tolist() == [0, 5, 9]
    assert spaced(9, 1).tolist() == [5]
    assert spaced(2, 50).tolist() == [0, 1, 2]
    assert spaced(0, 4).tolist() == [0]
