"""Windows that are of a state, for the models that are trained on states and predict them.

Samples (`neuromamba.states`) take turns in training, so each counts as much, however long the state
lasts. Windows of no state are not used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from neuromamba.batches import Reader, Windows
from neuromamba.events import subject_of
from neuromamba.files import InputError
from neuromamba.states import States


def windows_of(
    states: States, samples: Mapping[str, float], length: int
) -> Callable[..., StateWindows]:
    """What makes the windows of some samples, called as `Windows` is.

    Parameters
    ----------
    states, samples, length
        What tells of the runs, the number of its class by sample, and volumes of a window.
    """

    def make(
        runs: Mapping[str, Sequence[str]],
        readers: Sequence[Reader],
        max_excluded: float = 0.0,
        weights: None = None,
    ) -> StateWindows:
        with_events = {
            subject: [run for run in of_subject if run in states.labels]
            for subject, of_subject in runs.items()
        }
        return StateWindows(with_events, readers, max_excluded, states, samples, length)

    return make


class StateWindows(Windows):
    """Windows that are of a state: a sample takes the place of a subject.

    Parameters
    ----------
    runs, readers, max_excluded
        As those of `Windows`, the runs by subject.
    states, samples, length
        What tells of the runs, which samples there are, and volumes of a window.
    """

    def __init__(
        self,
        runs: Mapping[str, Sequence[str]],
        readers: Sequence[Reader],
        max_excluded: float,
        states: States,
        samples: Mapping[str, float],
        length: int,
    ) -> None:
        super().__init__(runs, readers, max_excluded)
        self._of_state: dict[tuple[str, str], list[int]] = {}
        of_subject, self.runs = self.runs, {}
        labels = {
            run: states.windows(run, length)[: self._positions[run]]
            for of in of_subject.values()
            for run in of
        }
        for sample in sorted(samples):
            for run in of_subject.get(subject_of(sample), []):
                starts = np.flatnonzero(labels[run] == samples[sample])
                if len(starts):
                    self._of_state[sample, run] = starts.tolist()
                    self.runs.setdefault(sample, []).append(run)
        self.subjects = list(self.runs)
        if not self.subjects:
            raise InputError(
                "no window is of a state; see the events of the runs, or lower the target's share"
            )
        self._groups = [(self.subjects, 1.0)]

    def starts(self, subject: str, run: str) -> Sequence[int]:
        return self._of_state[subject, run]

    @property
    def people(self) -> list[str]:
        return sorted({subject_of(sample) for sample in self.subjects})
