"""Slices of the runs of some subjects, to train and to measure an autoencoder of slices.

Design choices
--------------
- Sample number n of a training depends on (seed, n) alone, as that of other trainings does.
- `TOGETHER` samples in a row are slices of one volume, because reading one takes as long as reading
  all of its slices. Subjects take turns, each once in every epoch of volumes; run, volume and
  slices are drawn at random, the latter from those with brain, along all three axes.
- What is measured are pairs: the same slice of a run at two times, so that it can be told what of
  the changes in time is left, and not only of the anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from neuromamba.files import InputError
from neuromamba.slices import Floats, RunVolumes, cut

TOGETHER = 8
OPEN_RUNS = 256
"""Runs whose mask and statistics are kept in memory: some megabytes each."""
_ORDER, _SLICE = 0, 1


class SliceWindows:
    """Slices with brain of the runs of some subjects.

    Parameters
    ----------
    runs
        Runs of each subject. No other run is opened.
    path_of
        From a run to its store of volumes.
    normalization
        As in `slices.RunVolumes`.

    Attributes
    ----------
    people
        The subjects, sorted.
    left_out
        Why a run gives no slices.

    Raises
    ------
    InputError
        When no run can be read.
    """

    def __init__(
        self,
        runs: Mapping[str, Sequence[str]],
        path_of: Callable[[str], Path],
        normalization: Literal["maximum", "voxel"],
    ) -> None:
        self.left_out: dict[str, str] = {}
        self._open = lru_cache(OPEN_RUNS)(lambda run: RunVolumes(path_of(run), normalization))
        self._order = lru_cache(2)(self._draw_order)
        self._volume = lru_cache(1)(self._read_volume)
        self._runs = {subject: self._readable(runs[subject]) for subject in sorted(runs)}
        self.people = [subject for subject, found in self._runs.items() if found]
        if not self.people:
            raise InputError(
                f"none of the {len(runs)} subjects has volumes to take slices from: "
                + "; ".join(list(self.left_out.values())[:3])
            )

    def training_batch(self, seed: int, first: int, size: int) -> dict[str, Any]:
        """Samples `first` to `first + size - 1`: `slices` (size, edge, edge) float32, `run`."""
        drawn = [self._sample(seed, number) for number in range(first, first + size)]
        return _batch([image for image, _ in drawn], [run for _, run in drawn])

    def pairs(self, per_run: int, most: int) -> tuple[Floats, list[str]]:
        """Slices of some runs, evenly from the list, at two times each.

        Parameters
        ----------
        per_run
            Slices of a run, evenly from those with brain.
        most
            Of all runs together.

        Returns
        -------
        numpy.ndarray, list of str
            (slice, 2, row, column) at a quarter and at three quarters of the run; the runs.
        """
        every = [run for subject in self.people for run in self._runs[subject]]
        n_runs = min(len(every), max(most // per_run, 1))
        found, names = [], []
        for k in np.linspace(0, len(every) - 1, n_runs).astype(int):
            run = self._open(every[k])
            places = _places(run)
            chosen = np.linspace(0, len(places) - 1, per_run).astype(int)
            quarters = (run.n_volumes // 4, 3 * run.n_volumes // 4)
            volumes = [run.normalized(at, at + 1) for at in quarters]
            for axis, number in (places[int(i)] for i in chosen):
                found.append(np.stack([cut(volume, axis)[0, number] for volume in volumes]))
            names += [every[k]] * per_run
        return np.stack(found), names

    def _readable(self, runs: Sequence[str]) -> list[str]:
        found = []
        for run in sorted(runs):
            try:
                self._open(run)
                found.append(run)
            except InputError as error:
                self.left_out[run] = " ".join(str(error).split())
        return found

    def _sample(self, seed: int, number: int) -> tuple[Floats, str]:
        group, turn = divmod(number, TOGETHER)
        run, volume, chosen = self._volume(seed, group)
        axis, place = chosen[turn]
        return cut(volume, axis)[0, place], run

    def _read_volume(self, seed: int, group: int) -> tuple[str, Floats, list[tuple[int, int]]]:
        """The run, the volume (1, z, y, x) and the slices of the samples of a group."""
        epoch, turn = divmod(group, len(self.people))
        runs = self._runs[self.people[self._order(seed, epoch)[turn]]]
        rng = np.random.default_rng([seed, _SLICE, group])
        run = self._open(runs[int(rng.integers(len(runs)))])
        at, places = int(rng.integers(run.n_volumes)), _places(run)
        chosen = rng.choice(len(places), TOGETHER, replace=len(places) < TOGETHER)
        return run.run, run.normalized(at, at + 1), [places[int(i)] for i in chosen]

    def _draw_order(self, seed: int, epoch: int) -> Any:
        return np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self.people))


def in_batches(slices: Floats, runs: Sequence[str], size: int) -> Iterator[dict[str, Any]]:
    """Slices (slice, row, column) as batches of `size`, in their order."""
    for first in range(0, len(slices), size):
        yield _batch(list(slices[first : first + size]), list(runs[first : first + size]))


def _batch(slices: Sequence[Floats], runs: Sequence[str]) -> dict[str, Any]:
    return {"slices": torch.from_numpy(np.stack(slices)), "run": list(runs)}


def _places(run: RunVolumes) -> list[tuple[int, int]]:
    """Axis and number of the slices with brain."""
    return [(axis, int(k)) for axis, numbers in enumerate(run.places) for k in numbers]
