"""From a network and its data to a finished model on disk: the folder, the training, the files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from neuromamba.batches import Batch, Windows
from neuromamba.checkpoint import CHECKPOINTS, Tensors, finished, save_model
from neuromamba.config import Config, Optimiser
from neuromamba.distributed import join, telling_lost_processes
from neuromamba.owned import OwnedFolder, own
from neuromamba.prefetch import prefetch
from neuromamba.record import OnChange
from neuromamba.runtime import choose_device, describe_device, telling_full_disk
from neuromamba.scalars import to_device
from neuromamba.spacing import some_of
from neuromamba.train import Fitted, fit

SETTLED = 256
"""Training subjects by which a model settles, at most (our choice)."""

Facts = Mapping[str, Any]
"""Entries of `model.json`."""
Training = Callable[[OwnedFolder, Facts], tuple[Fitted, Facts]]


def already_there(folder: Path, record: Mapping[str, Any], on_change: OnChange) -> bool:
    """Whether the finished model is there, telling the user so."""
    world = join()
    done = bool(world.from_lead(lambda: finished(folder, record, on_change)))
    if done and world.leads:
        tqdm.write(f"{folder / 'model.json'} is up to date", file=sys.stderr)
    return done


def train_and_save(
    network: nn.Module,
    settings: Optimiser,
    windows: Mapping[str, Windows],
    folder: Path,
    record: Mapping[str, Any],
    config: Config,
    on_change: OnChange,
    complete: Callable[[Batch], Batch] = lambda batch: batch,
    facts: Facts | None = None,
) -> None:
    """Run the loop to its end, write the finished model, and remove the checkpoints.

    Under torchrun all processes call this, and the one of rank 0 writes.

    Parameters
    ----------
    network
        The module to train, which has `loss`; and `merged`, where its weights are to be saved in
        another form.
    windows
        Of the parts `train` and `validation`.
    complete
        Adds to a batch what its windows do not hold, such as labels.
    facts
        More entries for `model.json`.
    """
    seed, world = int(record["seed"]), join()
    device = choose_device(config.compute.device)
    train, validation = windows["train"], windows["validation"]
    spaced = validation.spaced(settings.validation_windows)[world.rank :: world.size]
    share = world.share(settings.batch_size)
    merge: Callable[[Tensors], Tensors] = getattr(network, "merged", dict)
    parameters = list(network.parameters())
    counts = {
        "parameters": sum(one.numel() for one in parameters),
        "trained_parameters": sum(one.numel() for one in parameters if one.requires_grad),
    }

    def train_network(owned: OwnedFolder, info: Facts) -> tuple[Fitted, Facts]:
        fitted = fit(
            network,
            settings,
            lambda first, size: complete(train.training_batch(seed, first, size)),
            lambda: prefetch(map(complete, validation.batches(spaced, share))),
            owned,
            info,
            seed=seed,
            device=device,
            world=world,
            on_change=on_change,
        )
        plain = replace(fitted, weights=merge(fitted.weights), last=merge(fitted.last))
        if world.leads and hasattr(network, "settle"):
            plain = settled(network, plain, train, device)
        return plain, {"step": settings.steps}

    known = {**counts, "device": describe_device(device), **(facts or {})}
    save_trained(windows, folder, record, on_change, known, train_network)


def settled(network: nn.Module, fitted: Fitted, train: Windows, device: torch.device) -> Fitted:
    """A training whose weights, those kept and the last, the model's `settle` has seen to.

    It gets a window of each of some training subjects, a few at a time.
    """
    spaced = train.spaced(1, some_of(train.subjects, SETTLED))
    found = []
    for weights in (fitted.last, fitted.weights):
        network.load_state_dict(weights)
        batches = tqdm(train.batches(spaced, 4), "settle", mininterval=1.0, leave=False)
        network.settle(to_device(batch, device) for batch in batches)  # type: ignore[operator]
        # A copy, for what is loaded next goes into the same tensors.
        found.append({n: value.cpu().clone() for n, value in network.state_dict().items()})
    last, kept = found
    return replace(fitted, weights=kept, last=last)


def save_trained(
    windows: Mapping[str, Windows],
    folder: Path,
    record: Mapping[str, Any],
    on_change: OnChange,
    facts: Facts,
    train: Training,
) -> None:
    """Have a model trained, unless it is there, and write it; see `train_and_save`.

    Parameters
    ----------
    train
        From the folder, owned, and the entries of `model.json` so far, to the weights and more
        entries.
    """
    world = join()
    info = {
        **record,
        "processes": world.size,
        "subjects": {part: of_part.people for part, of_part in windows.items()},
        "left_out": {run: why for part in windows.values() for run, why in part.left_out.items()},
        **facts,
    }
    with telling_lost_processes(world):
        with own(folder, world.leads) as owned:
            # Again, for what had the folder until now may just have ended.
            if already_there(folder, record, on_change):
                return
            fitted, more = train(owned, info)
            if world.leads:
                finish(owned, fitted, {**info, **more})
        world.wait()


def finish(folder: OwnedFolder, fitted: Fitted, info: Mapping[str, Any]) -> None:
    """Write the finished model, remove the checkpoints, and tell what went wrong on the way."""
    best = {"step": fitted.step, **fitted.validation}
    facts = {**info, "best": best, "events": fitted.events}
    with telling_full_disk(folder.path):
        save_model(folder.path, fitted.weights, facts, fitted.last or None, folder.writing)
    folder.remove(folder.path / CHECKPOINTS)
    if any(fitted.events.values()):
        counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in fitted.events.items())
        where = f"see the rows `event` of {folder.path / 'metrics.jsonl'}"
        tqdm.write(f"training finished with {counts}; {where}", file=sys.stderr)
