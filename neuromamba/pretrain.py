"""Pretraining: a model learns from the runs of the training subjects, without labels.

The subjects of the validation part choose the weights; those of the test part are not opened.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.batches import Batch, Windows, group_runs, list_runs, make_readers
from neuromamba.checkpoint import OnChange, finished, save_model
from neuromamba.config import Config, Optimiser
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.runtime import choose_device, prefetch
from neuromamba.splits import read_split
from neuromamba.train import fit

PARTS = ("train", "validation")


def run_pretrain(
    config: Config, dataset: str, model: str, seed: int, on_change: OnChange = "refuse"
) -> None:
    """Pretrain a model on a dataset: `pretrain/model.safetensors`, `model.json`, `metrics.jsonl`.

    A training that was stopped continues; one that has finished under the same settings and inputs
    is left as it is.

    Parameters
    ----------
    config, dataset, model, seed
        The run, and names within it.
    on_change
        What to do with a checkpoint or model of other settings or inputs: `refuse` or `restart`.

    Raises
    ------
    InputError
        When the split or the runs do not serve, or the training on disk does not fit.
    """
    layout = Layout(Path(config.results), dataset)
    folder, section = layout.pretrain(model, seed), config.models[model]
    split = read_split(layout.split)
    subjects = {part: split[part] for part in PARTS}
    runs = list_runs(config, dataset, [name for part in PARTS for name in subjects[part]])
    record = make_record(config, dataset, model, seed, section.pretrain, runs)
    if already_there(folder, record, on_change):
        return
    network = make_network(config, model, seed)
    windows = open_windows(config, dataset, model, network, subjects, runs)
    train_and_save(network, section.pretrain, windows, folder, record, config, on_change)


def make_network(config: Config, model: str, seed: int) -> nn.Module:
    """The model family with fresh weights drawn from `seed`."""
    torch.manual_seed(seed)
    return build_model(config.models[model], config.tokens.patch**3 * config.tokens.time_patch)


def make_settings(config: Config, model: str, settings: Optimiser, seed: int) -> dict[str, Any]:
    """The part of the config that a training depends on: its own section, the model's, tokens."""
    return {
        "model": config.models[model].model_dump(mode="json", exclude={"pretrain", "finetune"}),
        type(settings).__name__.lower(): settings.model_dump(mode="json"),
        "tokens": config.tokens.model_dump(mode="json"),
        "seed": seed,
    }


def make_record(
    config: Config, dataset: str, model: str, seed: int, settings: Optimiser, runs: pd.DataFrame
) -> dict[str, Any]:
    """What a training depends on, JSON-able: names, `settings` and digests of `inputs`.

    `runs` are the manifest's rows of the runs used, which tell how each was made.
    """
    split = Layout(Path(config.results), dataset).split
    return {
        "stage": type(settings).__name__.lower(),
        "dataset": dataset,
        "model": model,
        "seed": seed,
        "settings": make_settings(config, model, settings, seed),
        "inputs": {
            "split": digest_file(split),
            "runs": digest_json(runs.astype(str).to_dict("records")),
        },
    }


def already_there(folder: Path, record: Mapping[str, Any], on_change: OnChange) -> bool:
    """Whether the finished model is there, telling the user so."""
    done = finished(folder, record, on_change)
    if done:
        tqdm.write(f"{folder / 'model.json'} is up to date", file=sys.stderr)
    return done


def open_windows(
    config: Config,
    dataset: str,
    model: str,
    network: nn.Module,
    subjects: Mapping[str, Sequence[str]],
    runs: pd.DataFrame,
) -> dict[str, Windows]:
    """Windows over the runs of each part's subjects.

    Raises
    ------
    InputError
        When a part has no runs, or too many of them give no window.
    """
    layout = Layout(Path(config.results), dataset)
    windows = {}
    for part, names in subjects.items():
        of_part = runs[runs["subject"].isin(set(names))]
        if of_part.empty:
            raise InputError(
                f"{layout.split}: none of the {len(names)} subjects of part {part!r} has a usable "
                f"run; see {layout.excluded} for the reasons, or raise splits.{part}"
            )
        readers = make_readers(network, layout, config.models[model], config.tokens)
        windows[part] = Windows(group_runs(of_part), readers, config.compute.max_excluded)
    return windows


def train_and_save(
    network: nn.Module,
    settings: Optimiser,
    windows: Mapping[str, Windows],
    folder: Path,
    record: Mapping[str, Any],
    config: Config,
    on_change: OnChange,
    complete: Callable[[Batch], Batch] = lambda batch: batch,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Run the loop to its end, write the finished model, and remove the checkpoints.

    Parameters
    ----------
    network
        The module to train, which has `loss`.
    windows
        Of the parts `train` and `validation`.
    complete
        Adds to a batch what its windows do not hold, such as labels.
    facts
        More entries for `model.json`.
    """
    seed = int(record["seed"])
    train, validation = windows["train"], windows["validation"]
    spaced = validation.spaced(settings.validation_windows)
    best = fit(
        network,
        settings,
        lambda number: complete(train.training_batch(seed, number, settings.batch_size)),
        lambda: prefetch(map(complete, validation.batches(spaced, settings.batch_size))),
        folder,
        record,
        seed=seed,
        device=choose_device(config.compute.device),
        on_change=on_change,
    )
    info = {
        **record,
        "step": settings.steps,
        "best": {"step": best.step, **best.validation},
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "subjects": {part: of_part.subjects for part, of_part in windows.items()},
        "left_out": {run: why for part in windows.values() for run, why in part.left_out.items()},
        **(facts or {}),
    }
    save_model(folder, best.weights, info)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
