"""Windows of runs, in an order that is a pure function of the seed, collated into batches.

Design choices
--------------
- Sample number n of a training depends on (seed, n) alone, so a training that was stopped goes on
  with the sample it would have seen, whatever it held in its queues.
- Subjects take turns: each appears once in every epoch, however many and however long its runs
  are. The run and the start of the window within it are drawn at random. Of several datasets, the
  one to take a sample from is drawn by weight first; its subjects then take turns in the same way,
  in turns that are left out where the draw fell on another dataset.
- Names of several datasets are qualified: `dataset/sub-01`, `dataset/sub-01_task-rest`.
- Windows for validation and prediction are evenly spaced, and so the same each time.
- A batch is a dictionary of named tensors. Each name in a model's `needs` has one reader, which
  cuts windows and collates them; nothing after the readers knows what the tensors mean.
- Windows with different numbers of tokens are packed one after the other: there is no padding, and
  nothing of a run's own numbers depends on which runs share its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.code_windows import CodeWindows
from neuromamba.config import STORES, Cinp, Config, Model, NeuroMamba, RoiModel, Tablet, Tokens
from neuromamba.contents import CONTENT_COLUMNS
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.paired_windows import ImageWindows, NetworkWindows
from neuromamba.qc_rules import left_out
from neuromamba.roi_windows import RoiWindows, Sample
from neuromamba.spacing import spaced
from neuromamba.stage import refuse_if_too_many_excluded
from neuromamba.tables import read_table
from neuromamba.token_store import Normalization, TokenStore

Batch = dict[str, Any]
"""Tensors by name, and the lists `subject` and `run` with one entry a window."""

OPEN_STORES = 64
"""Stores kept open: each holds its per-voxel statistics, some megabytes."""

# Separate streams of random numbers under one seed.
_ORDER, _WINDOW = 0, 1


@dataclass(frozen=True)
class Window:
    """One stretch of a run; `start` is counted in time patches."""

    subject: str
    run: str
    start: int


class Reader(Protocol):
    """Reads one of a model's `needs`."""

    def positions(self, run: str) -> int:
        """How many starts a window has in this run; `InputError` when it has none."""

    def read(self, run: str, start: int) -> Sample:
        """The arrays of one window."""

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Join windows into tensors."""


class TokenWindows:
    """Reader of `tokens`: normalised brain patches of a window.

    Gives `tokens` (N, T, V), `mean` (N, V) and `centers` (N, 3) in [0, 1], all float32, and
    `patches` (B,) int64: the windows one after the other, N being the number of brain patches of
    all of them, T the number of time patches of a window, and `patches` how many of the N rows are
    each window's. `mean` is each voxel's temporal mean in the units of `tokens`.

    Parameters
    ----------
    path_of
        From a run to its token store.
    volumes
        Volumes of a window, a multiple of `tokens.time_patch`.
    tokens
        How the stores are expected to be cut.
    normalization
        `global` (one mean and SD a run) or `voxel`.
    """

    def __init__(
        self,
        path_of: Callable[[str], Path],
        volumes: int,
        tokens: Tokens,
        normalization: Normalization,
    ) -> None:
        self.n_time_patches = volumes // tokens.time_patch
        self._volumes = volumes
        self._values = tokens.patch**3 * tokens.time_patch
        self._normalization = normalization
        self._path_of = path_of
        self._store = lru_cache(OPEN_STORES)(lambda run: TokenStore(path_of(run)))

    def positions(self, run: str) -> int:
        store = self._store(run)
        if store.n_values != self._values:
            raise InputError(
                f"{self._path_of(run)}: {store.n_values} values a token where the config's "
                f"tokens.patch and tokens.time_patch give {self._values}; make the tokens again"
            )
        n = store.n_time_patches
        if n < self.n_time_patches:
            raise InputError(
                f"{self._path_of(run)}: {run} has {n} time patches, and a window of "
                f"{self._volumes} volumes takes {self.n_time_patches}; raise volumes.min_volumes "
                f"to {self._volumes} to leave such runs out, or lower the model's `volumes`"
            )
        return n - self.n_time_patches + 1

    def read(self, run: str, start: int) -> Sample:
        store = self._store(run)
        tokens = store.normalized(start, self.n_time_patches, self._normalization)
        return {
            "tokens": np.swapaxes(tokens, 0, 1),
            "mean": store.mean_normalized(self._normalization),
            "centers": np.asarray(store.center, dtype=np.float32),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        joined = {name: np.concatenate([one[name] for one in samples]) for name in samples[0]}
        batch = {name: torch.from_numpy(value) for name, value in joined.items()}
        batch["patches"] = torch.tensor([len(sample["tokens"]) for sample in samples])
        return batch


def make_readers(network: nn.Module, layout: Layout, model: Model, tokens: Tokens) -> list[Reader]:
    """One reader for each of a model's `needs`, from the results of the data stages."""
    readers: list[Reader] = []
    for need in cast(Sequence[str], network.needs):
        path_of = partial(layout.array, STORES.get(need, need))
        match need, model:
            case "tokens", NeuroMamba():
                kind = model.normalization
                readers.append(TokenWindows(path_of, model.volumes, tokens, kind))
            case "rois", RoiModel():
                n_rois = cast(int, network.n_rois)
                readers.append(RoiWindows(path_of, model, tokens.time_patch, n_rois))
            case "codes", Tablet():
                codes = cast(Mapping[str, Any], network.codes)
                readers.append(CodeWindows(path_of, model.volumes, tokens.time_patch, codes))
            case "fc", Cinp():
                readers.append(NetworkWindows(path_of, cast(int, network.n_rois)))
            case "anat", Cinp():
                readers.append(ImageWindows(path_of))
            case _:
                raise InputError(
                    f"the model needs {need}; batches of family {model.family} carry "
                    f"{', '.join(model.needs)}"
                )
    return readers


class Windows:
    """Windows over the runs of some subjects.

    Parameters
    ----------
    runs
        Runs of each subject. No other run is opened.
    readers
        What a batch is made of.
    max_excluded
        Largest share of the runs that may be too short or unreadable.
    weights
        The share of the samples that each dataset gives, by its name, where the subjects' names
        are qualified by it; in sum 1.

    Attributes
    ----------
    subjects : list of str
        Subjects with at least one window, sorted.
    left_out : dict of str to str
        Why a run gives no window.

    Raises
    ------
    InputError
        When no run, or too few, give a window; the message names the runs and the reasons.
    """

    def __init__(
        self,
        runs: Mapping[str, Sequence[str]],
        readers: Sequence[Reader],
        max_excluded: float = 0.0,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._readers = readers
        self._positions: dict[str, int] = {}
        self.left_out: dict[str, str] = {}
        names = sorted(run for of_subject in runs.values() for run in of_subject)
        for run in tqdm(names, desc="open", unit="run", delay=2.0, leave=False):
            try:
                self._positions[run] = min(reader.positions(run) for reader in readers)
            except InputError as error:
                self.left_out[run] = " ".join(str(error).split())
        if not names:
            raise InputError("no runs to take windows from; see excluded.tsv for the reasons")
        reasons = [self.left_out.get(run) for run in names]
        table = pd.DataFrame({"run": names, "reason": reasons})
        refuse_if_too_many_excluded("windows", table, max_excluded)
        self.runs: dict[str, list[str]] = {}
        for subject in sorted(runs):
            if kept := sorted(run for run in runs[subject] if run in self._positions):
                self.runs[subject] = kept
        self.subjects = list(self.runs)
        self._groups = self._group(weights or {"": 1.0})
        self._order = lru_cache(2 * len(self._groups))(self._draw_order)

    def sample(self, seed: int, number: int) -> Window:
        """The window of training sample `number`: a pure function of its arguments."""
        rng = np.random.default_rng([seed, _WINDOW, number])
        group = 0
        if len(self._groups) > 1:
            group = int(rng.choice(len(self._groups), p=[weight for _, weight in self._groups]))
        subjects, _ = self._groups[group]
        epoch, turn = divmod(number, len(subjects))
        subject = subjects[self._order(seed, epoch, len(subjects))[turn]]
        runs = self.runs[subject]
        run = runs[int(rng.integers(len(runs)))]
        starts = self.starts(subject, run)
        return Window(subject, run, int(starts[int(rng.integers(len(starts)))]))

    def starts(self, subject: str, run: str) -> Sequence[int]:
        """Where a subject's windows in a run may begin, in time patches."""
        return range(self._positions[run])

    @property
    def people(self) -> list[str]:
        """Whose runs they are, where a name among `subjects` is of a part of somebody's runs."""
        return self.subjects

    def spaced(self, count: int, subjects: Sequence[str] | None = None) -> list[Window]:
        """`count` windows of each run as `spaced` places them, fewer where it has fewer starts."""
        windows = []
        for subject in self.subjects if subjects is None else subjects:
            for run in self.runs[subject]:
                starts = self.starts(subject, run)
                places = spaced(len(starts) - 1, count)
                windows += [Window(subject, run, int(starts[place])) for place in places]
        return windows

    def batch(self, windows: Sequence[Window]) -> Batch:
        """Read windows into one batch."""
        names = ("subject", "run")
        batch: Batch = {name: [getattr(window, name) for window in windows] for name in names}
        for reader in self._readers:
            batch |= reader.collate([reader.read(window.run, window.start) for window in windows])
        return batch

    def training_batch(self, seed: int, first: int, size: int) -> Batch:
        """Samples `first` and the `size - 1` after it, of the endless sequence of `seed`."""
        return self.batch([self.sample(seed, first + i) for i in range(size)])

    def batches(self, windows: Sequence[Window], size: int) -> Iterator[Batch]:
        """All the windows in their order, `size` at a time."""
        for first in range(0, len(windows), size):
            yield self.batch(windows[first : first + size])

    def _group(self, weights: Mapping[str, float]) -> list[tuple[list[str], float]]:
        """The subjects of each dataset, and its weight."""
        groups = []
        for dataset, weight in weights.items():
            start = f"{dataset}/" if dataset else ""
            subjects = [subject for subject in self.subjects if subject.startswith(start)]
            if not subjects:
                raise InputError(f"dataset {dataset}: none of its runs gives a window")
            groups.append((subjects, weight))
        return groups

    def _draw_order(self, seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


def list_runs(
    config: Config, dataset: str, subjects: Iterable[str], needs: Sequence[str]
) -> pd.DataFrame:
    """The runs of `subjects` that have what a model `needs` and are good enough.

    Rows of the manifests of the first of `needs`, with a column `subject`; the column `key` tells
    what all its stores were made from. A subject's T1w image (`anat`) may be wanting.
    """
    layout = Layout.of(config, dataset)
    index = read_table(layout.index, dtype=str)[["run", "subject"]]
    stores = [STORES.get(need, need) for need in needs]
    of_runs = [store for store in stores if store != "anat"]
    table, *others = (_made(layout, store, config.compute.batches) for store in of_runs)
    for other in others:
        keys = other.set_index("run")["key"]
        table = table[table["run"].isin(keys.index)]
        table = table.assign(key=table["key"] + " " + table["run"].map(keys))
    table = table[~table["run"].isin(left_out(config, dataset))].merge(index, on="run")
    if "anat" in stores:
        keys = _made(layout, "anat", config.compute.batches).set_index("run")["key"]
        table["key"] += " " + table["subject"].map(keys).fillna("no T1w image")
    return table[table["subject"].isin(set(subjects))].sort_values(["subject", "run"])


def _made(layout: Layout, stage: str, batches: int) -> pd.DataFrame:
    """What is told of the stores of a stage that there are."""
    manifests = [layout.manifest(stage, batch) for batch in range(batches)]
    table = pd.concat([read_table(path, dtype=str) for path in manifests])
    # A key tells what a store was made from; its bytes also tell where its source lay.
    table = table.drop(columns=list(CONTENT_COLUMNS), errors="ignore")
    return table[table["reason"].isna()]


def group_runs(runs: pd.DataFrame) -> dict[str, list[str]]:
    """The runs of each subject, from a table with both columns."""
    return {str(subject): list(names) for subject, names in runs.groupby("subject")["run"]}
