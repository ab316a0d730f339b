"""Attribution maps of subjects by a fine-tuned model, or by others of its kind.

One subject is held at a time, and of it one batch of windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from neuromamba.attribution import attribute
from neuromamba.attribution_maps import KINDS, Floats, SubjectMap, place_tokens
from neuromamba.batches import Batch, Windows, group_runs, make_readers
from neuromamba.config import Config
from neuromamba.embed import choose_runs
from neuromamba.files import InputError
from neuromamba.heads import HeadedModel
from neuromamba.layout import Layout
from neuromamba.predictor import Predictor
from neuromamba.pretrained import refuse_other_grid
from neuromamba.scalars import to_device
from neuromamba.splits import read_split
from neuromamba.tables import read_table
from neuromamba.token_store import TokenStore


@dataclass(frozen=True)
class Explainer:
    """What is explained, and the runs it is explained on.

    Attributes
    ----------
    predictor
        The fine-tuned model.
    windows, layout
        Of the subjects' runs, and where their tokens lie.
    positive
        Number of the class that is explained.
    steps, count
        Steps of the integral, and windows of each run.
    """

    predictor: Predictor
    windows: Windows
    layout: Layout
    positive: int
    steps: int
    count: int

    @property
    def subjects(self) -> list[str]:
        return self.windows.subjects

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of a map along x, y, z."""
        return self.predictor.volumes.shape

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """(4, 4) voxels of a map to MNI mm."""
        return np.asarray(self.store(self.windows.runs[self.subjects[0]][0]).attrs["affine"])

    def store(self, run: str) -> TokenStore:
        return TokenStore(self.layout.array("tokens", run))

    def explain(self, network: HeadedModel, subject: str) -> SubjectMap:
        """The map of one subject by a network that reads what the predictor's reads."""
        device = next(network.parameters()).device
        sums = {kind: np.zeros(self.shape) for kind in KINDS}
        brain = np.zeros(self.shape, dtype=bool)
        change: list[float] = []
        total: list[float] = []
        spaced = self.windows.spaced(self.count, [subject])
        for run, of_run in itertools.groupby(spaced, key=lambda window: window.run):
            store = self.store(run)
            place = (store.grid_index, store.attrs["patch"], self.predictor.grid)
            brain |= place_tokens(~np.isnan(store.mean), *place)
            for batch in self.windows.batches(list(of_run), self.predictor.finetune.batch_size):
                found = attribute(network, to_device(batch, device), self.positive, self.steps)
                change += found.change.tolist()
                total += found.total.tolist()
                of_kind = sum_over_time(found.values["tokens"], batch, store.mean.shape[1])
                for kind, values in of_kind.items():
                    sums[kind] += place_tokens(values, *place)
        mean = {kind: (of / len(change)).astype(np.float32) for kind, of in sums.items()}
        return SubjectMap(subject, mean["strength"], mean["signed"], brain, change, total)


def sum_over_time(values: torch.Tensor, batch: Batch, voxels: int) -> dict[str, Floats]:
    """Sums over the volumes and the windows of a batch of one run: (token, voxel) of each kind.

    `values` are (patch, time patch, value), with the windows one after the other and the voxels of
    a value fastest.
    """
    each = values.unflatten(0, (len(batch["run"]), -1)).unflatten(-1, (-1, voxels))
    over = (0, 2, 3)  # window, time patch, volume in it
    return {
        "strength": each.abs().sum(over).cpu().numpy(),
        "signed": each.sum(over).cpu().numpy(),
    }


def open_explainer(
    config: Config,
    dataset: str,
    predictor: Predictor,
    subjects: Sequence[str] | None,
    steps: int,
    count: int,
    of_class: str | None,
) -> Explainer:
    """The windows that a model is explained on, after everything has been found to fit.

    Raises
    ------
    InputError
        When the model reads no tokens or others, or a class, a subject or a number does not serve.
    """
    for name, value in (("--steps", steps), ("--windows", count)):
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    layout, needs, classes = Layout.of(config, dataset), predictor.network.needs, predictor.classes
    if "tokens" not in needs:
        raise InputError(
            f"the model reads {', '.join(needs)}: a map in space takes a model that reads tokens"
        )
    if of_class is not None and of_class not in classes:
        there = f"the classes are {', '.join(classes)}" if classes else "the target is a number"
        raise InputError(f"--class {of_class}: {there}")
    if subjects is None:
        made = set(read_table(layout.index, dtype=str)["subject"])
        subjects = [name for name in read_split(layout.split)["test"] if name in made]
    table = choose_runs(config, dataset, None, subjects)
    for run in table["run"]:
        store = TokenStore(layout.array("tokens", run))
        refuse_other_grid(store, predictor.tokens, predictor.volumes)
    readers = make_readers(predictor.network, layout, predictor.model, predictor.tokens)
    windows = Windows(group_runs(table), readers, config.compute.max_excluded)
    # No weight needs a gradient, which is most of what the gradients would hold.
    predictor.network.requires_grad_(False)
    positive = classes.index(of_class) if of_class else len(classes) - 1
    return Explainer(predictor, windows, layout, positive, steps, count)
