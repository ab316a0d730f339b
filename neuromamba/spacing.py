"""Evenly spaced choices: of places in a run, and of people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def spaced(last: int, count: int) -> npt.NDArray[np.intp]:
    """At most `count` evenly spaced numbers from 0 to `last`; a single one is in the middle."""
    places = np.linspace(0, last, count) if count > 1 else np.array([last / 2])
    return np.unique(np.floor(places + 0.5).astype(np.intp))


def some_of(names: Sequence[str], count: int | None) -> list[str]:
    """`count` of the names, evenly from the list; all where it is `None` or there are fewer."""
    if count is None or count >= len(names):
        return list(names)
    return [names[int(k)] for k in np.linspace(0, len(names) - 1, count)]
