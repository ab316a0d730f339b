"""Attribution maps of subjects by a fine-tuned model, or by others of its kind.

One subject is held at a time, and of it one batch of windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from neuromamba.attribution import attribute
from neuromamba.attribution_checks import judge_completeness
from neuromamba.attribution_maps import SubjectMap, Summed
from neuromamba.attribution_maskers import Masker
from neuromamba.batches import Window, Windows, group_runs, list_runs, make_readers
from neuromamba.config import Config
from neuromamba.embed import choose_runs
from neuromamba.files import InputError
from neuromamba.heads import HeadedModel
from neuromamba.layout import Layout
from neuromamba.predictor import Predictor
from neuromamba.pretrained import refuse_other_grid
from neuromamba.scalars import to_device
from neuromamba.spacing import some_of
from neuromamba.splits import read_split
from neuromamba.token_store import TokenStore

WINDOWS = 2
"""Windows of each run (our choice)."""
STEPS = (8, 16, 32, 64, 128)
"""Steps of the integral that are tried until sums of attributions are nearly complete."""
LEAST_GAP = 0.01
"""Share of what the output changes by that sums may miss then (our choice)."""


@dataclass(frozen=True)
class Explainer:
    """What is explained, and how.

    Attributes
    ----------
    predictor
        The fine-tuned model.
    masker
        Where what it reads lies in the brain.
    positive
        Number of the class that is explained.
    steps, count
        Steps of the integral, and windows of each run.
    """

    predictor: Predictor
    masker: Masker
    positive: int
    steps: int = STEPS[-1]
    count: int = WINDOWS

    def explain(self, network: HeadedModel, windows: Windows, subject: str) -> SubjectMap:
        """The map of one subject by a network that reads what the predictor's reads."""
        summed, every = Summed(self.masker), windows.spaced(self.count, [subject])
        for _, of_run in itertools.groupby(every, key=lambda window: window.run):
            self.add(summed, network, windows, list(of_run))
        return summed.map(subject)

    def add(
        self, summed: Summed, network: HeadedModel, windows: Windows, of_run: Sequence[Window]
    ) -> None:
        """Add windows of one run to a subject's sums."""
        device = next(network.parameters()).device
        for batch in windows.batches(of_run, self.predictor.finetune.batch_size):
            found = attribute(network, to_device(batch, device), self.positive, self.steps)
            summed.add(found, batch)

    def describe(self) -> dict[str, Any]:
        """What a map is a map of, for the files beside it."""
        predictor = self.predictor
        explains = f"predicted {predictor.target}"
        if predictor.classes:
            others = [name for k, name in enumerate(predictor.classes) if k != self.positive]
            mean = "the mean of those of " if len(others) > 1 else "that of "
            own = predictor.classes[self.positive]
            explains = f"logit of {own} minus {mean}{', '.join(others)}"
        return {
            "method": "integrated gradients (arXiv 1703.01365)",
            "explains": explains,
            "reference": "a signal that does not vary: each voxel's or region's own mean",
            "dataset": predictor.dataset,
            "target": predictor.target,
            "space": predictor.space,
            "input": self.masker.need,
            "resolution_mm": self.masker.resolution_mm,
            "steps": self.steps,
            "windows_per_run": self.count,
            "window_volumes": predictor.model.volumes,
        }


def choose_steps(explainer: Explainer, windows: Windows, subject: str) -> int:
    """The least of `STEPS` by which the map of a subject is nearly complete, or the last.

    How many it takes depends on how the model bends the line to the baseline: on the demo 4 do, a
    barely trained model of the tests takes 32.
    """
    for steps in STEPS[:-1]:
        tried = replace(explainer, steps=steps)
        one = tried.explain(explainer.predictor.network, windows, subject)
        gap = judge_completeness(one.change, one.total)["gap"]
        if gap is None or gap <= LEAST_GAP:
            return steps
    return STEPS[-1]


def subjects_to_explain(config: Config, dataset: str, needs: Sequence[str], most: int) -> list[str]:
    """At most `most` of the test subjects that have usable runs, evenly spaced over their names.

    Raises
    ------
    InputError
        When there is nobody.
    """
    layout = Layout.of(config, dataset)
    test = read_split(layout.split)["test"]
    made = set(list_runs(config, dataset, test, needs)["subject"])
    if not made:
        raise InputError(
            f"{layout.split}: no subject of the part 'test' has {' and '.join(needs)} of good "
            f"quality; see {layout.excluded} for the reasons, or name others by --subjects"
        )
    return some_of([name for name in test if name in made], most)


def open_windows(
    config: Config, dataset: str, predictor: Predictor, names: Sequence[str]
) -> Windows:
    """The windows of some subjects, after their runs have been found to fit the model.

    Raises
    ------
    InputError
        When a run was made otherwise than the model reads it, or a subject has none.
    """
    layout = Layout.of(config, dataset)
    table = choose_runs(config, dataset, predictor.model.needs, None, names)
    if "tokens" in predictor.network.needs:
        for run in table["run"]:
            store = TokenStore(layout.array("tokens", run))
            refuse_other_grid(store, predictor.tokens, predictor.volumes)
    readers = make_readers(predictor.network, layout, predictor.model, predictor.tokens)
    return Windows(group_runs(table), readers, config.compute.max_excluded)


def choose_class(predictor: Predictor, of_class: str | None) -> int:
    """Number of the class to explain: that of a name, or else the last.

    Raises
    ------
    InputError
        When there is no such class.
    """
    classes = predictor.classes
    if of_class is None:
        return len(classes) - 1
    if of_class not in classes:
        there = f"the classes are {', '.join(classes)}" if classes else "the target is a number"
        raise InputError(f"--class {of_class}: {there}")
    return classes.index(of_class)
