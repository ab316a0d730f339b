"""Samples of a target that is a state: what there is of each subject in each of the states.

A sample is a subject in a state, `sub-01:faces`: all volumes, or all windows, of the subject's runs
that have it. It stands where a subject stands with other targets, so that a model is trained on it,
and predicts it, in the same ways.

Design choices
--------------
- A sample has at least `MIN_VOLUMES` volumes, of which connectivity can be told, and a window.
- A run without events is left out for this target alone, and its reason is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
import zarr.errors
from tqdm import tqdm

from neuromamba.config import Config, State
from neuromamba.events import (
    EventFiles,
    Events,
    Ints,
    label_volumes,
    label_windows,
    read_events,
    sample_name,
)
from neuromamba.files import InputError, digest_json
from neuromamba.layout import Layout
from neuromamba.qc_rules import left_out
from neuromamba.splits import read_split
from neuromamba.stage import usable_runs
from neuromamba.stages import tested_arrays
from neuromamba.store import get_array
from neuromamba.tables import read_table

MIN_VOLUMES = 10


@dataclass(frozen=True)
class States:
    """What the events of a split's runs tell.

    Attributes
    ----------
    target, time_patch
        What asks, and the step from one window to the next in volumes.
    runs
        By subject, the runs with events, sorted.
    events
        By run, those that are of a state.
    labels
        By run, (volume,) number of the class or `NONE`.
    left_out
        Why a run is not used.
    """

    target: State
    time_patch: int
    runs: dict[str, list[str]]
    events: dict[str, Events]
    labels: dict[str, Ints]
    left_out: dict[str, str]

    def windows(self, run: str, length: int) -> Ints:
        """(start,) number of the class of each window of `length` volumes, or `NONE`."""
        n = len(self.target.classes)
        return label_windows(self.labels[run], length, self.time_patch, self.target.share, n)

    @property
    def digest(self) -> str:
        """Of the labels of all volumes."""
        return digest_json({run: labels.tolist() for run, labels in self.labels.items()})

    def samples(self, lengths: Iterable[int]) -> dict[str, int]:
        """The number of its class by sample, of those that windows of all these `lengths` find."""
        lengths = list(lengths)
        found = {}
        for subject, runs in self.runs.items():
            volumes = np.concatenate([self.labels[run] for run in runs])
            seen = [
                np.concatenate([self.windows(run, length) for run in runs]) for length in lengths
            ]
            for number, name in enumerate(self.target.classes):
                enough = (volumes == number).sum() >= MIN_VOLUMES
                if enough and all((of_length == number).any() for of_length in seen):
                    found[sample_name(subject, name)] = number
        return found


def read_states(config: Config, dataset: str, target: str) -> States:
    """Label the volumes of all runs of a split's subjects by their events.

    Raises
    ------
    InputError
        When no run has events, or a table of events is wrong.
    """
    settings, layout = config.datasets[dataset], Layout.of(config, dataset)
    spec = settings.state_targets[target]
    files = EventFiles(settings.events_folder)
    events: dict[str, Events] = {}
    labels: dict[str, Ints] = {}
    left_out: dict[str, str] = {}
    usable = usable_of(config, dataset)
    for run in tqdm(usable["run"], f"events of {target}", unit="run", delay=2.0, leave=False):
        path = files.find(run)
        if path is None:
            left_out[run] = f"{files.root} has no *_events.tsv that applies to {run}"
            continue
        times, step = _read_times(layout.array("rois", run))
        events[run] = read_events(path, spec)
        labels[run] = label_volumes(times, step, events[run], spec.lag)
    if not labels:
        raise InputError(
            f"{files.root} has no *_events.tsv that applies to any of the {len(left_out)} usable "
            f"runs, such as {min(left_out, default='none')}; set `events` in the dataset YAML to "
            f"the folder that has them, or remove the target {target!r}"
        )
    with_events = usable[usable["run"].isin(labels)]
    runs = {str(name): list(of) for name, of in with_events.groupby("subject")["run"]}
    return States(spec, config.tokens.time_patch, runs, events, labels, left_out)


def usable_of(config: Config, dataset: str) -> pd.DataFrame:
    """The good runs of a split's subjects, sorted: columns `run`, `subject`."""
    split = read_split(Layout.of(config, dataset).split)
    subjects = [name for part in split.values() for name in part]
    runs = good_runs(config, dataset)
    return runs[runs["subject"].isin(subjects)].sort_values(["subject", "run"])


def good_runs(config: Config, dataset: str) -> pd.DataFrame:
    """Runs that have the arrays of their dataset and are good enough: `run`, `subject`."""
    layout = Layout.of(config, dataset)
    index = read_table(layout.index, dtype={"run": str, "subject": str})
    batches = range(config.compute.batches)
    usable = [
        set(usable_runs([layout.manifest(stage, batch) for batch in batches]))
        for stage in tested_arrays(config.datasets[dataset])
    ]
    good = set.intersection(*usable) - set(left_out(config, dataset))
    return index.loc[index["run"].isin(list(good)), ["run", "subject"]]


def _read_times(store: Path) -> tuple[np.ndarray, float]:
    """When each volume of a ROI store begins, and its repetition time, in s."""
    try:
        group = zarr.open_group(store, mode="r")
        times = np.asarray(get_array(group, "time")[...], dtype=np.float64)
        return times, float(str(group.attrs["repetition_time"]))
    except (OSError, KeyError, ValueError, zarr.errors.BaseZarrError) as error:
        raise InputError(f"{store}: not a readable ROI store ({error}); run rois") from None
