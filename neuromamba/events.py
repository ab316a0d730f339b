"""Events of task runs: in which state a volume, or a window of volumes, was taken.

Design choices
--------------
- A run's events are those of the nearest `*_events.tsv` whose entities the run has, by the BIDS
  inheritance principle. Tables are not merged, unlike sidecars.
- Volume k is judged by what happened in the middle of it, `lag` seconds before: at
  k x TR + TR / 2 - lag from the start of the run.
- Where events of several states overlap, the one that began last counts, as a long block may hold
  shorter ones; of those that began together, the one that is listed last.
- Events of other values, or of none, are ignored. An event of no duration holds no volume.

Source: BIDS 1.10, "Events" and "The inheritance principle".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba.bids_scan import entities_of
from neuromamba.config import State
from neuromamba.files import InputError
from neuromamba.participants import MISSING, comparable
from neuromamba.sidecars import list_folder, split_name
from neuromamba.tables import read_table

NONE = -1
"""Stands for no state."""
SUFFIX = "events"
NUMBERED = ("run", "echo")
"""Entities whose leading zeros mean nothing."""
MICROSECONDS = 6
"""Decimals that times in s are rounded to, so that an event ends where the next begins."""

Ints = npt.NDArray[np.int64]
Entities = frozenset[tuple[str, str]]


def sample_name(subject: str, state: str) -> str:
    """`sub-01:faces`."""
    return f"{subject}:{state}"


def subject_of(sample: str) -> str:
    """The subject of a sample; a subject's name is its own."""
    return sample.partition(":")[0]


def state_of(sample: str) -> str:
    """The state of a sample."""
    return sample.partition(":")[2]


@dataclass(frozen=True)
class Events:
    """The events of a run that are of a state, by onset.

    Attributes
    ----------
    onset, end
        (event,) s from the start of the run.
    state
        (event,) number of the class.
    """

    onset: npt.NDArray[np.float64]
    end: npt.NDArray[np.float64]
    state: Ints


class EventFiles:
    """The event tables of a folder, each of whose folders is listed once."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._levels: dict[Path, list[tuple[Entities, Path]]] = {}

    def find(self, run: str) -> Path | None:
        """The table that applies to a run (`sub-01_task-rest`), if there is one.

        Raises
        ------
        InputError
            When two tables of one folder apply alike.
        """
        entities = entities_of(run)
        of_run = _comparable(entities)
        for folder in self._folders(entities):
            found = [one for one in self._level(folder) if one[0] <= of_run]
            most = max((len(needed) for needed, _ in found), default=0)
            nearest = [path for needed, path in found if len(needed) == most]
            if len(nearest) > 1:
                raise InputError(
                    f"{nearest[0]} and {nearest[1].name} both apply to {run}; keep one, or give "
                    "one more entities in its name"
                )
            if nearest:
                return nearest[0]
        return None

    def _folders(self, entities: dict[str, str]) -> list[Path]:
        """Where events of a run may be, the nearest first."""
        folder = self.root / f"sub-{entities.get('sub', '')}"
        folders = [self.root, folder]
        if "ses" in entities:
            folders.append(folder / f"ses-{entities['ses']}")
        return [folders[-1] / "func", *reversed(folders)]

    def _level(self, folder: Path) -> list[tuple[Entities, Path]]:
        if folder not in self._levels:
            names = list_folder(folder)[0] if folder.is_dir() else []
            split = [(name, *split_name(name)) for name in names if name.endswith(".tsv")]
            self._levels[folder] = [
                (_comparable(entities_of(stem)), folder / name)
                for name, stem, suffix in split
                if suffix == SUFFIX
            ]
        return self._levels[folder]


def _comparable(entities: dict[str, str]) -> Entities:
    """Entities among which `run-01` and `run-1` are the same."""
    return frozenset(
        (key, (value.lstrip("0") or "0") if key in NUMBERED else value)
        for key, value in entities.items()
    )


def read_events(path: Path, target: State) -> Events:
    """Read the events of a table that are of a state.

    Raises
    ------
    InputError
        When a column is missing, such an event has no time (with the line, and what to do), or a
        cell means two classes.
    """
    table = read_table(path, dtype=str, na_values=MISSING)
    table.columns = table.columns.str.strip()
    for column in ("onset", "duration", target.column):
        if column not in table:
            raise InputError(
                f"{path} has no column {column!r}; it has: {', '.join(table.columns)}; correct it, "
                "or name another column in the target"
            )
    number = _number_of_cell(target)
    state = table[target.column].map(comparable, na_action="ignore").map(number)
    rows = table[state.notna()]
    onset, duration = (_seconds(rows[name], path) for name in ("onset", "duration"))
    if (negative := np.flatnonzero(duration < 0)).size:
        line = int(rows.index[negative[0]]) + 2
        raise InputError(f"{path}, line {line}: duration is below 0; correct it")
    order = np.argsort(onset, kind="stable")
    end = np.round(onset + duration, MICROSECONDS)
    states = np.asarray(state[state.notna()], dtype=np.int64)[order]
    return Events(onset[order], end[order], states)


def _number_of_cell(target: State) -> dict[str, int]:
    """The number of its class by cell, made comparable."""
    number: dict[str, int] = {}
    for k, (name, cells) in enumerate(target.classes.items()):
        for cell in cells:
            other = number.setdefault(comparable(cell), k)
            if other != k:
                raise InputError(
                    f"the target by column {target.column!r}: classes "
                    f"{target.class_names[other]!r} and {name!r} have the same cell {cell!r}, "
                    "written in two ways; leave one out"
                )
    return number


def _seconds(cells: pd.Series, path: Path) -> npt.NDArray[np.float64]:
    numbers = pd.to_numeric(cells.str.strip(), errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        line, cell = int(cells.index[wrong[0]]) + 2, cells.iloc[wrong[0]]
        raise InputError(
            f"{path}, line {line}: {cells.name} is {'n/a' if pd.isna(cell) else repr(cell)}, not "
            "a number of seconds; fill it in, or delete the line"
        )
    return np.round(numbers, MICROSECONDS)


def label_volumes(times: npt.ArrayLike, repetition_time: float, events: Events, lag: float) -> Ints:
    """The state of each volume.

    Parameters
    ----------
    times
        (volume,) when each begins, in s from the start of the run.
    repetition_time, lag
        In s.

    Returns
    -------
    (volume,) int64
        Number of the class, or `NONE`.
    """
    middle = np.asarray(times, dtype=np.float64) + repetition_time / 2 - lag
    middle = np.round(middle, MICROSECONDS)
    labels = np.full(middle.shape, NONE, dtype=np.int64)
    for onset, end, state in zip(events.onset, events.end, events.state, strict=True):
        labels[(middle >= onset) & (middle < end)] = state
    return labels


def label_windows(labels: Ints, window: int, step: int, share: float, n_classes: int) -> Ints:
    """The state of each window of a run.

    Parameters
    ----------
    labels
        (volume,) of `label_volumes`.
    window, step
        Length of a window and from one to the next, in volumes; `step` divides `window`.
    share
        Least share of a window's volumes that have its state.
    n_classes
        Number of classes.

    Returns
    -------
    (start,) int64
        Number of the class that most volumes have, or `NONE`: where too few have it, or as many
        have another.
    """
    starts = max(len(labels) // step - window // step + 1, 0)
    seen = np.zeros((len(labels) + 1, n_classes), dtype=np.int64)
    seen[1:] = np.cumsum(labels[:, None] == np.arange(n_classes), axis=0)
    first = np.arange(starts) * step
    counts = seen[first + window] - seen[first]
    most = counts.max(axis=1, initial=0)
    alone = (counts == most[:, None]).sum(axis=1) == 1
    enough = most >= share * window - 1e-9
    return np.where(alone & enough & (most > 0), counts.argmax(axis=1), NONE).astype(np.int64)
