"""Two occasions of each test subject: which runs, or which halves of one, are compared.

Design choices
--------------
- A subject's two occasions are its first run and one of another session, of the same task if there
  is such; or else the next run. With one run they are its two halves.
- Between two halves `GAP` seconds are left out: the haemodynamic response to what happens in one
  second goes on for half a minute, and neighbouring volumes share it, so that two halves without a
  gap would know each other by their seam. Drifts over minutes are longer than any gap that a run
  has room for; taking them out is for `volumes.denoise`.
- The windows of an occasion are spread evenly over it, at most `WINDOWS`, and cover it where that
  is enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import nn

from neuromamba.batches import Windows, group_runs, list_runs, make_readers
from neuromamba.config import Config
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.spacing import spaced
from neuromamba.stage import usable_runs
from neuromamba.tables import read_table

GAP = 30.0
"""Seconds between the two halves of a run."""
WINDOWS = 16
"""Largest number of windows of an occasion: more cost as much time as they add data."""
KINDS = ("sessions", "runs", "halves")


@dataclass(frozen=True)
class Occasion:
    """A stretch of a run, from `start` to before `stop`, in time patches."""

    run: str
    start: int
    stop: int

    def starts(self, length: int) -> list[int]:
        """Where its windows of `length` time patches begin."""
        patches = self.stop - self.start
        count = min(WINDOWS, -(-patches // length))
        return [self.start + int(start) for start in spaced(patches - length, count)]


@dataclass(frozen=True)
class Pair:
    """Two occasions of a subject; `kind` is one of `KINDS`."""

    subject: str
    kind: str
    first: Occasion
    second: Occasion


def seen_volumes(
    starts: Sequence[int], volumes: int, time_patch: int, pace: float = 1.0
) -> npt.NDArray[np.intp]:
    """The numbers of the volumes that lie in windows which start at these time patches.

    `pace` is how many volumes of the run go to one of the window's, which may have been resampled.
    """
    seen = np.add.outer(np.array(starts) * time_patch, np.arange(volumes))
    return np.unique(np.floor(seen * pace + 0.5).astype(np.intp))


def open_test_runs(
    config: Config, dataset: str, model: str, network: nn.Module, test: Sequence[str]
) -> tuple[Windows, dict[str, str]]:
    """Windows over the runs of test subjects that have ROI series too, and why others have none."""
    layout = Layout.of(config, dataset)
    runs = list_runs(config, dataset, test, config.models[model].needs)
    manifests = [layout.manifest("rois", batch) for batch in range(config.compute.batches)]
    has_rois = runs["run"].isin(usable_runs(manifests))
    lost = {str(run): "it has no ROI series" for run in runs.loc[~has_rois, "run"]}
    readers = make_readers(network, layout, config.models[model], config.tokens)
    windows = Windows(group_runs(runs[has_rois]), readers, config.compute.max_excluded)
    return windows, {**lost, **windows.left_out}


def choose_pairs(
    config: Config,
    dataset: str,
    windows: Windows,
    length: int,
    test: Sequence[str],
    repetition_time: float | None = None,
) -> tuple[list[Pair], dict[str, str]]:
    """The occasions of each subject, by name, and why a subject has none.

    `length` is that of a window, in time patches. `repetition_time` is that of the volumes of
    windows in s, where these are not the stored ones.

    Raises
    ------
    InputError
        When fewer than two subjects have any.
    """
    index = read_table(Layout.of(config, dataset).index, dtype={"run": str, "subject": str})
    index = index.set_index("run").reindex(columns=["session", "task", "repetition_time"])
    facts = index.to_dict("index")
    resampled = repetition_time or config.volumes.denoise.repetition_time
    # The last of a run's windows ends where the run does.
    patches = {window.run: window.start + length for window in windows.spaced(2)}
    pairs, reasons = [], {}
    for subject in sorted(test):
        runs = windows.runs.get(subject, [])
        if len(runs) > 1:
            kind, second = other_run(runs, facts)
            chosen = [Occasion(run, 0, patches[run]) for run in (runs[0], second)]
            pairs.append(Pair(subject, kind, *chosen))
        elif runs:
            seconds = float(resampled or facts[runs[0]]["repetition_time"])
            gap = math.ceil(GAP / (seconds * config.tokens.time_patch))
            needed = 2 * length + gap
            if patches[runs[0]] >= needed:
                pairs.append(halve(subject, runs[0], patches[runs[0]], gap))
            else:
                reasons[subject] = (
                    f"its one run, {runs[0]}, has {patches[runs[0]]} time patches, and two windows "
                    f"of {length} with {GAP:g} s between them take {needed}"
                )
        else:
            reasons[subject] = "no run of it can be used"
    if len(pairs) < 2:
        told = "; ".join(f"{name}: {reason}" for name, reason in [*reasons.items()][:5])
        raise InputError(
            f"{Layout.of(config, dataset).split}: {len(pairs)} of {len(test)} test subjects can be "
            f"identified, and it takes 2 to tell one from another ({told}); lower the model's "
            "`volumes`, or raise splits.test"
        )
    return pairs, reasons


def halve(subject: str, run: str, patches: int, gap: int) -> Pair:
    """The first and the last part of a run, equally long, at least `gap` time patches apart."""
    half = (patches - gap) // 2
    first, second = Occasion(run, 0, half), Occasion(run, patches - half, patches)
    return Pair(subject, "halves", first, second)


def other_run(runs: Sequence[str], facts: Mapping[Any, Mapping[Any, Any]]) -> tuple[str, str]:
    """What to compare the first run with: another session before the same task before the order."""

    def differs(run: str, what: str) -> bool:
        return str(facts[run][what]) != str(facts[runs[0]][what])

    run = min(runs[1:], key=lambda run: (not differs(run, "session"), differs(run, "task")))
    return "sessions" if differs(run, "session") else "runs", run


def tabulate_pairs(pairs: Sequence[Pair], time_patch: int) -> pd.DataFrame:
    """Rows of `pairs.tsv`: run and volumes (from `start` to before `stop`) of both occasions."""
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {"subject": pair.subject, "pairs": pair.kind}
        for name, of in (("first", pair.first), ("second", pair.second)):
            volumes = {"start": of.start * time_patch, "stop": of.stop * time_patch}
            row |= {name: of.run, **{f"{name}_{key}": value for key, value in volumes.items()}}
        rows.append(row)
    return pd.DataFrame(rows)


def share_read(pairs: Sequence[Pair], length: int) -> float:
    """Share of the occasions' time patches that lie in a window."""
    occasions = [occasion for pair in pairs for occasion in (pair.first, pair.second)]
    read = [len(seen_volumes(occasion.starts(length), length, 1)) for occasion in occasions]
    return sum(read) / sum(occasion.stop - occasion.start for occasion in occasions)
