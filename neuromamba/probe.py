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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.batches import Windows
from neuromamba.checkpoint import load_checkpoint
from neuromamba.config import Config, Finetune
from neuromamba.distributed import World, join
from neuromamba.events import subject_of
from neuromamba.heads import ClassHead, HeadedModel
from neuromamba.linear_probe import Linear, fit_classes, fit_number
from neuromamba.observe import merge_runs, observe_subject
from neuromamba.owned import OwnedFolder
from neuromamba.record import OnChange
from neuromamba.runtime import telling_full_disk
from neuromamba.scalars import with_skills
from neuromamba.state import Journal
from neuromamba.train import Fitted
from neuromamba.trained import Facts, save_trained


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
        When an embedding is not finite, the training subjects with a usable run are all of one
        class, or the folder holds a stopped training of another mode and `on_change` is `refuse`.
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
    # Before there is anything to standardise them by.
    others = embed_subjects(network, windows["validation"], settings, world)
    layer, features = fit_probe(network, settings, windows["train"], labels, folds, seed, world)
    if not world.leads:
        return Fitted({}, 0, {}, {}, {}), {}
    found = {"train": features, "validation": network.standardized(others)}
    truth = {part: [labels[name] for name in of.subjects] for part, of in windows.items()}
    rows = {part: _score(network, found[part], truth[part]) for part in windows}
    seconds = {"seconds": time.perf_counter() - started}
    with telling_full_disk(owned.path), closing(Journal(owned, writes=True)) as journal:
        journal.put_back([])
        journal.add("train", 0, rows["train"] | seconds)
        journal.add("validation", 0, rows["validation"])
    weights = {name: value.cpu().clone() for name, value in network.state_dict().items()}
    return Fitted(weights, 0, rows["validation"], {}, {}), {"step": 0, "probe": layer.chosen}


def fit_probe(
    network: HeadedModel,
    settings: Finetune,
    train: Windows,
    labels: Mapping[str, int | float],
    folds: int,
    seed: int,
    world: World,
) -> tuple[Linear, torch.Tensor]:
    """Fit the head of `network` to the training subjects, in place and alike in all processes.

    The network must not have been standardised yet.

    Returns
    -------
    Linear
    Tensor
        (subject, width) float32, the standardised features of the training subjects.

    Raises
    ------
    InputError
        When an embedding is not finite, or the training subjects are all of one class.
    """
    embeddings = embed_subjects(network, train, settings, world)
    truth = [labels[name] for name in train.subjects]
    if isinstance(network.task, ClassHead) and len(set(truth)) < 2:
        world.fail(
            "all training subjects with a usable run are of one class; model.json of the "
            "pretraining and excluded.tsv tell which runs are left out, and why"
        )
    network.standardize_by(embeddings)
    features = network.standardized(embeddings)
    people = [subject_of(name) for name in train.subjects]
    return fit_layer(network, features, truth, folds, seed, people), features


def embed_subjects(
    network: HeadedModel, windows: Windows, settings: Finetune, world: World
) -> torch.Tensor:
    """What a model that is not standardised yet gives of each subject: (subject, width) float64.

    Raises
    ------
    InputError
        When that is not finite.
    """
    network.eval()
    subjects = windows.subjects
    rows = torch.zeros(len(subjects), len(network.center), dtype=torch.float64)
    mine = range(world.rank, len(subjects), world.size)
    for k in tqdm(mine, "embed", unit="subject", mininterval=1.0, disable=not world.leads):
        runs = observe_subject(network, windows, subjects[k], settings)
        rows[k] = torch.from_numpy(merge_runs(runs)[1])
    rows = world.sum(rows)  # those of the other processes are 0 here
    if not torch.isfinite(rows).all():
        world.fail(
            "the pretrained model gives no finite embedding of some subjects; its training may "
            "have diverged: look at its metrics.jsonl, and train with a lower learning_rate"
        )
    return rows


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
