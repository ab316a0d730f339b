"""A linear probe: how much of a target can be read off what a pretrained model says of people.

Nothing of the model is trained. A logistic regression (of balanced classes) or a ridge regression
is fitted to a feature vector of each training subject, and becomes the model's head.

Design choices
--------------
- A subject's features are the mean over evenly spaced windows of all its runs. So is what is
  predicted: the head applied to that mean, or, which is the same, the mean over windows of the
  logits or values. (What is trained by gradient sees windows, and has its probabilities averaged.)
- A `pool` is that of the pretrained model. Families start it such that it gives the plain mean,
  and pretraining leaves it so: no random weight is between the model and the probe.
- Features are standardised by the training subjects.
- The penalty is chosen by cross-validation within the training subjects, by AUROC or squared
  error, as that of the baselines is. The validation subjects have no part in it, so the loss that
  is told of them, and the calibration for new scans, are those of people it has not seen.
- Of states each sample (a subject in a state) stands in the place of a subject, and all samples of
  a subject are in one inner fold.
- With two classes a sigmoid is fitted to decision values of the inner folds (Platt 1999) and put
  into the head: it is linear. Of few subjects the fitted probabilities lean to the commoner class
  (see `linear_models`). A sigmoid that falls, as noise may give, is not used.
- A class without a training subject is never predicted.
- A probe that was killed begins again; its passes through the model are all it takes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from torch import nn
from tqdm import tqdm

from neuromamba.batches import Windows
from neuromamba.checkpoint import load_checkpoint
from neuromamba.config import Config, Finetune
from neuromamba.distributed import World, join
from neuromamba.events import subject_of
from neuromamba.files import InputError
from neuromamba.heads import ClassHead, HeadedModel
from neuromamba.inner_folds import Splits, grouped_folds
from neuromamba.observe import merge_runs, observe_subject
from neuromamba.owned import OwnedFolder
from neuromamba.record import OnChange
from neuromamba.runtime import telling_full_disk
from neuromamba.scalars import with_skills
from neuromamba.state import Journal
from neuromamba.train import Fitted
from neuromamba.trained import Facts, save_trained

PENALTIES = np.logspace(-3, 4, 8)
"""Inverse penalty (`C`) of features whose squares sum to 1 in a subject, on average."""
NEVER = -1e4
"""Logit of a class without a training subject."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Linear:
    """A fitted layer: weights (output, feature), bias (output,), and how it was chosen.

    Attributes
    ----------
    penalty
        Inverse penalty.
    folds
        Inner folds that chose it; 0 where a class has too few subjects for any, which leaves 1.
    score
        Mean AUROC over them, or mean squared error in z units; `None` without folds.
    """

    weights: Floats
    bias: Floats
    penalty: float
    folds: int
    score: float | None


def probe_and_save(
    network: HeadedModel,
    settings: Finetune,
    windows: Mapping[str, Windows],
    labels: Mapping[str, int | float],
    folder: Path,
    record: Mapping[str, Any],
    config: Config,
    on_change: OnChange,
    facts: Facts,
) -> None:
    """Fit the head of a pretrained model, and write the model; see `trained.train_and_save`.

    Under torchrun the processes share the subjects, and the fit is the same to the bit.

    Parameters
    ----------
    windows, labels
        Of the parts `train` and `validation`, and of their subjects.

    Raises
    ------
    InputError
        When an embedding is not finite, or the folder holds a stopped training of another mode and
        `on_change` is `refuse`.
    """
    world, folds = join(), config.evaluate.inner_folds
    size, head = (sum(one.numel() for one in part.parameters()) for part in (network, network.head))
    counts = {"parameters": size, "trained_parameters": head}

    def train(owned: OwnedFolder, info: Facts) -> tuple[Fitted, Facts]:
        world.from_lead(lambda: _clear(owned, info, on_change))
        return train_probe(network, settings, windows, labels, owned, folds, record["seed"], world)

    save_trained(windows, folder, record, on_change, {**counts, **facts}, train)


def train_probe(
    network: HeadedModel,
    settings: Finetune,
    windows: Mapping[str, Windows],
    labels: Mapping[str, int | float],
    owned: OwnedFolder,
    folds: int,
    seed: int,
    world: World,
) -> tuple[Fitted, Facts]:
    """Fit the head of `network` in place, and write `metrics.jsonl` to its folder, `owned`.

    Returns
    -------
    Fitted
        With the weights, in rank 0, and the loss over validation subjects.
    Facts
        The penalty that was chosen, and by how many folds of the training subjects.
    """
    started = time.perf_counter()
    network.eval()
    found = {part: embed_subjects(network, of, settings, world) for part, of in windows.items()}
    if not all(torch.isfinite(values).all() for values in found.values()):
        world.fail(
            "the pretrained model gives no finite embedding of some subjects; its training may "
            "have diverged: look at its metrics.jsonl, and train with a lower learning_rate"
        )
    network.standardize_by(found["train"])
    if not world.leads:
        return Fitted({}, 0, {}, {}, {}), {}
    features = {part: network.standardized(values) for part, values in found.items()}
    truth = {part: [labels[name] for name in of.subjects] for part, of in windows.items()}
    people = [subject_of(name) for name in windows["train"].subjects]
    layer = fit_layer(network, features["train"], truth["train"], folds, seed, people)
    rows = {part: _score(network, features[part], truth[part]) for part in windows}
    seconds = {"seconds": time.perf_counter() - started}
    with telling_full_disk(owned.path), closing(Journal(owned, writes=True)) as journal:
        journal.put_back([])
        journal.add("train", 0, rows["train"] | seconds)
        journal.add("validation", 0, rows["validation"])
    weights = {name: value.cpu().clone() for name, value in network.state_dict().items()}
    chosen = {"inverse_penalty": layer.penalty, "folds": layer.folds, "score": layer.score}
    return Fitted(weights, 0, rows["validation"], {}, {}), {"step": 0, "probe": chosen}


def embed_subjects(
    network: HeadedModel, windows: Windows, settings: Finetune, world: World
) -> torch.Tensor:
    """What the model gives of each subject, before it is standardised: (subject, width) float64."""
    subjects = windows.subjects
    rows = torch.zeros(len(subjects), len(network.center), dtype=torch.float64)
    mine = range(world.rank, len(subjects), world.size)
    for k in tqdm(mine, "embed", unit="subject", mininterval=1.0, disable=not world.leads):
        runs = observe_subject(network, windows, subjects[k], settings)
        rows[k] = torch.from_numpy(merge_runs(runs)[1])
    # The rows of the other processes are 0 here.
    return world.sum(rows)


def fit_layer(
    network: HeadedModel,
    features: torch.Tensor,
    labels: Sequence[int | float],
    folds: int,
    seed: int,
    people: Sequence[str] | None = None,
) -> Linear:
    """Fit the last layer of `network` to standardised features (subject, width), in place.

    `people` are the subjects' names, some of which are the same where samples are of states.
    """
    x = features.double().cpu().numpy()
    # Penalties then mean the same whatever the width.
    size = float(np.sqrt(np.square(x).sum(axis=1).mean())) or 1.0
    task = network.task
    if isinstance(task, ClassHead):
        truth = np.asarray(labels, dtype=np.int64)
        layer = fit_classes(x / size, truth, task.outputs, folds, seed, people)
    else:
        z = (np.asarray(labels, dtype=np.float64) - task.mean.item()) / task.sd.item()
        layer = fit_number(x / size, z, folds, seed)
    last = network.head[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.copy_(torch.from_numpy(layer.weights / size))
        last.bias.copy_(torch.from_numpy(layer.bias))
    return layer


def fit_classes(
    x: Floats,
    labels: Labels,
    outputs: int,
    folds: int,
    seed: int,
    people: Sequence[str] | None = None,
) -> Linear:
    """The logistic regression of balanced classes with the highest AUROC in the inner folds.

    Parameters
    ----------
    x
        (subject, feature), whose squares sum to about 1 in a subject.
    labels
        (subject,) numbers of their classes, from 0 to `outputs` - 1.
    folds, seed
        Inner folds, fewer where the rarest class is smaller, and what seeds their shuffling.
    people
        (subject,) names; those of the same name are in one inner fold.

    Raises
    ------
    InputError
        When all subjects are of one class.
    """
    present, y = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise InputError(
            "all training subjects with a usable run are of one class; model.json of the "
            "pretraining and excluded.tsv tell which runs are left out, and why"
        )
    counts = np.bincount(y)
    weight = (len(y) / (len(counts) * counts))[y]
    model, chosen, score = LogisticRegression(max_iter=5000), 1.0, None
    inner = _inner(y, min(folds, int(counts.min())), seed, people)
    folds = 0 if inner is None else len(inner)
    slope, offset = 1.0, 0.0
    if inner is not None:
        search = GridSearchCV(model, {"C": PENALTIES}, scoring="roc_auc_ovr", cv=inner)
        search.fit(x, y, sample_weight=weight)
        model, chosen, score = search.best_estimator_, search.best_params_["C"], search.best_score_
        if len(present) == 2:
            slope, offset = _sigmoid(model, x, y, weight, inner)
    else:
        model.fit(x, y, sample_weight=weight)
    lines, bias = model.coef_ * slope, model.intercept_ * slope + offset
    if len(present) == 2:
        lines, bias = np.vstack([-lines, lines]) / 2, np.concatenate([-bias, bias]) / 2
    weights, biases = np.zeros((outputs, x.shape[1])), np.full(outputs, NEVER)
    weights[present], biases[present] = lines, bias
    return Linear(weights, biases, float(chosen), folds, score)


def _inner(y: Labels, folds: int, seed: int, people: Sequence[str] | None) -> Splits | None:
    """The inner folds, where there can be two."""
    if people is not None and len(set(people)) < len(people):
        return grouped_folds(y, people, folds, seed)
    if folds < 2:
        return None
    inner = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return list(inner.split(y, y))


def fit_number(x: Floats, z: Floats, folds: int, seed: int) -> Linear:
    """The ridge regression with the lowest squared error in the inner folds.

    Parameters are those of `fit_classes`, with the target `z` (subject,) in place of classes.
    """
    folds = min(folds, len(z))
    if folds < 2:
        model = Ridge(alpha=1.0).fit(x, z)
        return Linear(model.coef_[None], np.array([model.intercept_]), 1.0, 0, None)
    inner = KFold(folds, shuffle=True, random_state=seed)
    grid = {"alpha": 1 / PENALTIES}
    search = GridSearchCV(Ridge(), grid, scoring="neg_mean_squared_error", cv=inner).fit(x, z)
    model, chosen = search.best_estimator_, 1 / search.best_params_["alpha"]
    bias = np.array([model.intercept_])
    return Linear(model.coef_[None], bias, float(chosen), folds, -float(search.best_score_))


def _sigmoid(
    model: LogisticRegression, x: Floats, y: Labels, weight: Floats, inner: Splits
) -> tuple[float, float]:
    """Platt's logit of the second class, slope * decision value + offset."""
    calibrated = CalibratedClassifierCV(model, method="sigmoid", cv=inner, ensemble=False)
    calibrated.fit(x, y, sample_weight=weight)
    (found,) = calibrated.calibrated_classifiers_[0].calibrators
    return (-float(found.a_), -float(found.b_)) if found.a_ < 0 else (1.0, 0.0)


@torch.no_grad()
def _score(
    network: HeadedModel, features: torch.Tensor, labels: Sequence[int | float]
) -> dict[str, float]:
    """The scalars of the network's loss, over subjects."""
    label = torch.tensor(labels, device=features.device)
    scalars = network.task.loss(network.head(features), label)
    return with_skills({name: float(value) for name, value in scalars.items()})


def _clear(owned: OwnedFolder, info: Facts, on_change: OnChange) -> None:
    """Have nothing of an earlier training about, which by `refuse` is not to be lost."""
    load_checkpoint(owned, info, on_change)
    for name in ("snapshots", "last.safetensors"):
        owned.remove(owned.path / name)
