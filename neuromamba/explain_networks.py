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
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from torch import nn
from tqdm import tqdm

from neuromamba.attribution_checks import shuffled
from neuromamba.batches import Windows, list_runs
from neuromamba.config import Config
from neuromamba.explainer import WINDOWS, open_windows, spread
from neuromamba.files import InputError
from neuromamba.finetune import read_labels
from neuromamba.heads import HeadedModel, NumberHead
from neuromamba.layout import Layout
from neuromamba.observe import merge_runs, observe_run
from neuromamba.predictor import Predictor, open_predictor
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
    made = set(list_runs(config, dataset, train)["subject"])
    names = spread([name for name in train if name in made], FIT_SUBJECTS) if made else []
    values = np.array([labels[name] for name in names])
    if len(set(values.tolist())) < 2:
        tqdm.write(f"{dataset}: no training subjects to fit another head on", sys.stderr)
        return
    windows = open_windows(config, dataset, predictor, names)
    kept = [name in windows.runs for name in names]
    features, values = observe_features(predictor, windows), values[kept]
    permuted = np.random.default_rng(seed).permutation(values)
    yield Compared("labels", "refit", refit_head(predictor.network, features, values))
    yield Compared("head", "labels", refit_head(predictor.network, features, permuted))


def observe_features(predictor: Predictor, windows: Windows) -> Matrix:
    """The features of each subject, mean over windows: (subject, feature)."""
    rows, size = [], predictor.finetune.batch_size
    bar = tqdm(windows.subjects, desc="features", unit="subject", mininterval=1.0)
    for subject in bar:
        every = windows.spaced(WINDOWS, [subject])
        runs = [
            observe_run(predictor.network, windows, list(of_run), size, predictor.grid)
            for _, of_run in itertools.groupby(every, key=lambda window: window.run)
        ]
        rows.append(merge_runs(runs)[1])
    return np.stack(rows)


def refit_head(
    network: HeadedModel, features: Matrix, labels: Sequence[float] | Matrix
) -> HeadedModel:
    """A copy of a network whose last layer is a penalised linear model of its features.

    Parameters
    ----------
    network
        Stays as it is.
    features, labels
        (subject, feature), and the number of each subject's class or its value.

    Returns
    -------
    HeadedModel
        Balanced logistic regression of classes, ridge regression of a number.
    """
    # The backbone is the same, and only read.
    other = copy.deepcopy(network, {id(network.backbone): network.backbone})
    task = network.task
    # Means over windows vary less than windows do: without their own scale the penalty would win.
    mean, sd = features.mean(0), features.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    x = (features - mean) / sd
    if isinstance(task, NumberHead):
        z = (np.asarray(labels) - task.mean.item()) / task.sd.item()
        fitted = RidgeCV(alphas=len(x) * np.logspace(-1, 4, 6)).fit(x, z)
        weight, bias = fitted.coef_[None], np.array([fitted.intercept_])
    else:
        weight, bias = _fit_classes(x, np.asarray(labels), task.outputs)
    layer = other.head[-1]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(weight / sd))
        layer.bias.copy_(torch.as_tensor(bias - (weight / sd) @ mean))
    return other


def _fit_classes(x: Matrix, labels: npt.NDArray[Any], outputs: int) -> tuple[Matrix, Matrix]:
    """Weights (class, feature) and biases of the classes' logits; 0 of classes nobody has."""
    fitted = LogisticRegression(class_weight="balanced", max_iter=5000).fit(x, labels)
    weight, bias = np.zeros((outputs, x.shape[1])), np.zeros(outputs)
    # Of two classes there is one row, for the log of the odds.
    share = np.array([[-0.5], [0.5]]) if len(fitted.classes_) == 2 else np.eye(len(fitted.classes_))
    weight[fitted.classes_] = share @ fitted.coef_
    bias[fitted.classes_] = share @ fitted.intercept_
    return weight, bias
