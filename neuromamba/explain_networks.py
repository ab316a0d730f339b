"""The networks that a fine-tuned model's map is compared with.

- Its weights in random order, of the head alone and of all (see `attribution_checks`).
- Its other seeds, where they are trained: test and retest.
- Its head fitted anew on the same features, once to the true labels of training subjects and once
  to permuted ones. A whole training on permuted labels costs as much as the model did; this costs
  one pass over some training subjects. It tells less, because the features below have been learnt
  by the true labels: a map that does not change with the labels even so tells nothing of them. The
  true labels tell what the way of fitting alone changes.
- A whole training on permuted labels, where somebody has made one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.attribution_checks import shuffled
from neuromamba.batches import Windows, list_runs
from neuromamba.config import Config
from neuromamba.explainer import WINDOWS, open_windows
from neuromamba.files import InputError
from neuromamba.heads import HeadedModel
from neuromamba.labels import read_labels
from neuromamba.layout import Layout
from neuromamba.observe import merge_runs, observe_subject
from neuromamba.predictor import Predictor, open_predictor
from neuromamba.probe import fit_layer
from neuromamba.spacing import some_of
from neuromamba.splits import read_split

FIT_SUBJECTS = 200
"""Training subjects that heads are fitted on, at most (our choice)."""
PARTS = {
    "weights": "shuffled_weights",
    "seed": "other_seeds",
    "refit": "refitted_head",
    "labels": "permuted_labels",
}
"""Where in `explain.json` a comparison stands, by what the other network differs in."""

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Compared:
    """Another network: its name, and what it differs in (a key of `PARTS`)."""

    name: str
    against: str
    network: HeadedModel


def networks_to_compare(
    config: Config, dataset: str, model: str, seed: int, predictor: Predictor, permuted: Path | None
) -> Iterator[Compared]:
    """All of them.

    Raises
    ------
    InputError
        When the folder `permuted` holds no training of the same model.
    """
    own, layout = predictor.network, Layout.of(config, dataset)
    yield Compared("head", "weights", shuffled(own, own.head, seed))
    yield Compared("all", "weights", shuffled(own, None, seed))
    yield from _refitted(config, dataset, predictor, seed)
    for other in config.seeds:
        folder = layout.finetune(model, other, predictor.target)
        if other == seed or not (folder / "model.json").exists():
            continue
        found = _same_kind(predictor, folder, config.compute.device)
        if isinstance(found, str):
            tqdm.write(f"{found}, and is not compared with it", sys.stderr)
        else:
            yield Compared(str(other), "seed", found)
    if permuted is not None:
        found = _same_kind(predictor, permuted, config.compute.device)
        if isinstance(found, str):
            raise InputError(f"--permuted: {found}; train it again")
        yield Compared("given", "labels", found)


def _same_kind(predictor: Predictor, folder: Path, device: str) -> HeadedModel | str:
    """The network in a folder, or why it cannot be compared."""
    other = open_predictor(folder, device)
    parts = ("model", "tokens", "volumes", "classes")
    unlike = [part for part in parts if getattr(other, part) != getattr(predictor, part)]
    if unlike:
        return f"{folder} was made under another {', '.join(unlike)} than the explained model"
    return other.network.requires_grad_(False)


# --- Heads that are fitted anew -------------------------------------------------------------------


def _refitted(config: Config, dataset: str, predictor: Predictor, seed: int) -> Iterator[Compared]:
    """Two heads, or none where too few training subjects have runs."""
    labels = read_labels(config, dataset, predictor.target)
    train = [n for n in read_split(Layout.of(config, dataset).split)["train"] if n in labels]
    made = set(list_runs(config, dataset, train, predictor.model.needs)["subject"])
    names = some_of([name for name in train if name in made], FIT_SUBJECTS)
    windows = open_windows(config, dataset, predictor, names) if names else None
    values = np.array([labels[name] for name in windows.subjects] if windows else [])
    if windows is None or len(set(values.tolist())) < 2:
        tqdm.write(f"{dataset}: no training subjects to fit another head on", sys.stderr)
        return
    features, folds = observe_features(predictor, windows), config.evaluate.inner_folds
    permuted = np.random.default_rng(seed).permutation(values)
    for name, against, given in (("labels", "refit", values), ("head", "labels", permuted)):
        fitted = refit_head(predictor.network, features, given, folds, seed)
        yield Compared(name, against, fitted)


def observe_features(predictor: Predictor, windows: Windows) -> Matrix:
    """The features of each subject, mean over windows: (subject, feature)."""
    how = predictor.finetune.model_copy(update={"evaluation_windows": WINDOWS})
    bar = tqdm(windows.subjects, desc="features", unit="subject", mininterval=1.0)
    seen = (observe_subject(predictor.network, windows, subject, how) for subject in bar)
    return np.stack([merge_runs(runs)[1] for runs in seen])


def refit_head(
    network: HeadedModel, features: Matrix, labels: Matrix, folds: int, seed: int
) -> HeadedModel:
    """A copy of a network whose last layer is that of a linear probe of its features.

    Parameters
    ----------
    network
        Stays as it is.
    features, labels
        (subject, feature), and the number of each subject's class or its value.
    folds, seed
        See `probe.fit_layer`.
    """
    # The backbone is the same, and only read.
    other = copy.deepcopy(network, {id(network.backbone): network.backbone})
    # Means over windows vary less than windows do: without their own scale the penalty would win.
    mean, sd = features.mean(0), features.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    fit_layer(other, torch.from_numpy((features - mean) / sd), labels.tolist(), folds, seed)
    layer = other.head[-1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        weight = layer.weight.double().cpu() / torch.from_numpy(sd)
        bias = layer.bias.double().cpu() - weight @ torch.from_numpy(mean)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return other
