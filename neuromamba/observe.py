"""What a fine-tuned model says of whole runs: its predictions, and its embedding of them.

A run's windows are evenly spaced and seen apart from all other runs, as in the evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from neuromamba.batches import Window, Windows
from neuromamba.config import Finetune, Volumes
from neuromamba.distributed import World
from neuromamba.heads import HeadedModel
from neuromamba.novelty import held_patches
from neuromamba.scalars import to_device

Floats = npt.NDArray[np.float64]
Grid = tuple[int, ...]

LEAST = 1e-38
"""Probability that keeps logarithms finite: about the least that float32 holds."""


@dataclass(frozen=True)
class Observed:
    """A run as a model sees it.

    Attributes
    ----------
    values
        (window, class) probabilities or (window, 1) values, float64.
    features
        (feature,) mean of the standardised embedding over windows.
    held
        (patch,) which patches of the grid it has; `None` where the model reads no tokens, or nobody
        asks.
    means_logits
        Whether windows are merged by the mean of their logits, in place of their probabilities.
    """

    subject: str
    run: str
    values: torch.Tensor
    features: Floats
    held: npt.NDArray[np.bool_] | None
    means_logits: bool = False


def patch_grid(volumes: Volumes, patch: int) -> Grid:
    """Patches along x, y, z."""
    return tuple(edge // patch for edge in volumes.shape)


@torch.no_grad()
def observe_run(
    network: HeadedModel,
    windows: Windows,
    of_run: Sequence[Window],
    batch_size: int,
    grid: Grid | None = None,
) -> Observed:
    """See some windows of one run, on the device where the model is.

    A window is seen apart from other runs, so it gives the same to the bit whatever else is seen.
    """
    device = next(network.parameters()).device
    values, features, held = [], [], None
    for batch in windows.batches(of_run, batch_size):
        if grid is not None and held is None and "centers" in batch:
            count = int(batch["patches"][0])  # those of a run's windows are the same
            held = held_patches(batch["centers"][:count].numpy(), grid)
        found = network.features(to_device(batch, device))
        values.append(network.predict_features(found).double().cpu())
        features.append(found.double().cpu())
    mean, first = torch.cat(features).mean(0).numpy(), of_run[0]
    return Observed(first.subject, first.run, torch.cat(values), mean, held, network.means_logits)


def observe_subject(
    network: HeadedModel,
    windows: Windows,
    subject: str,
    settings: Finetune,
    grid: Grid | None = None,
) -> list[Observed]:
    """All runs of a subject by their evenly spaced windows, run by run."""
    spaced = windows.spaced(settings.evaluation_windows, [subject])
    return [
        observe_run(network, windows, list(of_run), settings.batch_size, grid)
        for _, of_run in itertools.groupby(spaced, key=lambda window: window.run)
    ]


def merge_runs(runs: Sequence[Observed]) -> tuple[list[float], Floats]:
    """What is predicted by all windows of some runs of one subject: values, and features."""
    weights = np.array([len(one.values) for one in runs], dtype=np.float64)
    features = np.average(np.stack([one.features for one in runs]), axis=0, weights=weights)
    values = torch.cat([one.values for one in runs])
    if runs[0].means_logits:
        # The mean of log p is that of the logits, but for a constant.
        return values.clamp_min(LEAST).log().mean(0).softmax(0).tolist(), features
    return values.mean(0).tolist(), features


def first_runs(rows: Sequence[Observed]) -> list[Observed]:
    """The first of each subject's runs, which are sorted by subject."""
    return [next(of_subject) for _, of_subject in itertools.groupby(rows, lambda row: row.subject)]


def observe_subjects(
    network: HeadedModel,
    windows: Windows,
    subjects: Sequence[str],
    settings: Finetune,
    grid: Grid,
    world: World,
) -> list[Observed]:
    """All runs of some subjects, sorted; the processes of `world` share them and all get all."""
    mine, rows = subjects[world.rank :: world.size], []
    shown = tqdm(mine, "calibrate", unit="subject", mininterval=1.0, disable=not world.leads)
    for subject in shown:
        rows += [_pack(one) for one in observe_subject(network, windows, subject, settings, grid)]
    size, ordered = int(np.prod(grid)), sorted(row for of in world.gather(rows) for row in of)
    return [_unpack(row, size, network.means_logits) for row in ordered]


def _pack(one: Observed) -> list[Any]:
    """JSON-able, and sorted by subject and run."""
    held = None if one.held is None else np.flatnonzero(one.held).tolist()
    return [one.subject, one.run, one.values.tolist(), one.features.tolist(), held]


def _unpack(row: list[Any], size: int, means_logits: bool) -> Observed:
    subject, run, values, features, numbers = row
    held = None
    if numbers is not None:
        held = np.zeros(size, dtype=bool)
        held[numbers] = True
    given = torch.tensor(values, dtype=torch.float64)
    return Observed(subject, run, given, np.array(features), held, means_logits)
