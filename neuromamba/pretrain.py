"""Pretraining: a model learns from the runs of the training subjects, without labels.

The subjects of the validation part choose the weights; those of the test part are not opened.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.batches import Windows, group_runs, list_runs, make_readers
from neuromamba.checkpoint import load_model_info, load_weights
from neuromamba.code_windows import code_facts, read_codes
from neuromamba.config import Config, Model, Optimiser
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.image_weights import digest_weights, load_image_weights
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.participants import read_participants
from neuromamba.record import OnChange, ancestry
from neuromamba.roi_windows import read_regions
from neuromamba.shares import nested_share
from neuromamba.source_code import code_of
from neuromamba.splits import read_split
from neuromamba.stage_settings import relevant_settings
from neuromamba.trained import already_there, train_and_save

PARTS = ("train", "validation")


def run_pretrain(
    config: Config,
    dataset: str,
    model: str,
    seed: int,
    on_change: OnChange = "refuse",
    fraction: float | None = None,
) -> None:
    """Pretrain a model on a dataset: `pretrain/model.safetensors`, `model.json`, `metrics.jsonl`.

    A training that was stopped continues; one that has finished under the same settings and inputs
    is left as it is. With `init_from`, its first step starts from the weights in that folder
    (`model.safetensors` and `model.json`); that is never how a stopped training is continued. Of a
    family with `image_weights`, they come first, and `model.json` tells which of them fitted.

    Parameters
    ----------
    config, dataset, model, seed
        The run, and names within it; `dataset` may be a mixture of several.
    on_change
        What to do with a checkpoint or model of other settings or inputs: `refuse` or `restart`.
    fraction
        Make it a cell of the scaling study, on this share of the training subjects. The subjects of
        the validation part are the same for every share.

    Raises
    ------
    InputError
        When the split or the runs do not serve, when the training on disk or the weights to start
        from do not fit, or for what `train.fit` gives.
    """
    layout = Layout.of(config, dataset)
    folder, settings = layout.pretrain(model, seed), config.models[model].pretrain
    if fraction is not None:
        folder = layout.cell(model, fraction, seed)
        settings = config.scaling.training(settings, fraction)
    needs = config.models[model].needs
    subjects, runs = list_training(config, dataset, needs, fraction)
    record = make_record(config, dataset, model, seed, settings, runs)
    if fraction is not None:
        record["settings"]["fraction"] = fraction
    weights = getattr(config.models[model], "image_weights", None)
    if weights:
        record["inputs"]["image_weights"] = digest_weights(Path(weights))
    start = settings.init_from
    earlier = load_model_info(Path(start)) if start else {}
    if earlier:
        record["inputs"]["init_from"] = earlier["files"]["model.safetensors"]
    if already_there(folder, record, on_change):
        return
    network = make_network(config, model, seed, record["settings"])
    facts: dict[str, Any] = {"pretrained_from": ancestry(earlier)} if earlier else {}
    if weights:
        report = load_image_weights(cast(nn.Module, network.image_encoder), Path(weights))
        facts["image_weights"] = asdict(report)
        tqdm.write(f"{weights}: {report}", file=sys.stderr)
    if start:
        load_weights(network, Path(start))
    if isinstance(pool := getattr(network, "pool", None), nn.Module):
        pool.requires_grad_(False)  # no part of the loss
    windows = open_windows(config, dataset, model, network, subjects, runs)
    train_and_save(network, settings, windows, folder, record, config, on_change, facts=facts)


def list_training(
    config: Config, dataset: str, needs: Sequence[str], fraction: float | None = None
) -> tuple[dict[str, list[str]], pd.DataFrame]:
    """The subjects of each part, and their runs, of a dataset or of all members of a mixture.

    The runs are those that have what a model `needs`.

    The names of a mixture are qualified: `dataset/sub-01`. With `fraction`, the training part is
    that share of each dataset's (see `shares.nested_share`).
    """
    subjects: dict[str, list[str]] = {part: [] for part in PARTS}
    tables = []
    for member in config.members(dataset):
        split = read_split(Layout.of(config, member).split)
        if fraction is not None:
            of_dataset = config.datasets[member]
            people = read_participants(of_dataset)
            split["train"] = nested_share(
                split["train"], people, of_dataset, fraction, config.splits.seed
            )
        start = f"{member}/" if dataset in config.mixtures else ""
        of_member = [name for part in PARTS for name in split[part]]
        table = list_runs(config, member, of_member, needs)
        tables.append(table.assign(run=start + table["run"], subject=start + table["subject"]))
        for part in PARTS:
            subjects[part] += [start + name for name in split[part]]
    return subjects, pd.concat(tables)


def make_network(
    config: Config, model: str, seed: int, settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """The model family with fresh weights drawn from `seed`.

    `settings` are those of its training, which tell of how many regions it reads the series, or
    whose codes.
    """
    torch.manual_seed(seed)
    values = config.tokens.patch**3 * config.tokens.time_patch
    known = settings or {}
    n_rois, codes = n_rois_of(known), known.get("codes")
    return build_model(config.models[model], values, config.compute, n_rois, codes)


def n_rois_of(settings: Mapping[str, Any]) -> int:
    """Of how many regions the settings of a training tell; 0 for a model of other input."""
    return int(settings.get("regions", {}).get("n_rois", 0))


def _one_store_each(
    layout: Layout, model: Model, array: str, runs: Iterable[str]
) -> dict[str, Path]:
    """A store of an array of each dataset that the runs are of; none where the model reads none."""
    if array not in model.arrays:
        return {}
    one_of = {run.rpartition("/")[0]: run for run in runs}
    return {name: layout.array(array, run) for name, run in one_of.items()}


def regions_of(layout: Layout, model: Model, runs: Iterable[str]) -> dict[str, Any] | None:
    """Which regions a model reads, as series or connectivity, by a run of each dataset; JSON-able.

    `None` for a model that reads none.

    Raises
    ------
    InputError
        When the datasets of a mixture have series of different regions.
    """
    found = {}
    for name, store in _one_store_each(layout, model, "rois", runs).items():
        known = read_regions(store)
        count = int(known["n_rois"]) + int(known["n_missing"])
        found[name] = (known["atlas"], known["atlas_sha256"], count)
    if not found:
        return None
    first, *others = found
    for other in others:
        if found[other][1:] != found[first][1:]:
            raise InputError(
                f"dataset {first} has series of the regions of {found[first][0]}, {other} of those "
                f"of {found[other][0]}: give both the same `atlas`, or leave one out of the mixture"
            )
    return dict(zip(("atlas", "atlas_sha256", "n_rois"), found[first], strict=True))


def codes_of(layout: Layout, model: Model, runs: Iterable[str]) -> dict[str, Any] | None:
    """Whose codes a model reads, by a run of each dataset: `code_windows.code_facts`.

    `None` for a model that reads none.

    Raises
    ------
    InputError
        When the datasets of a mixture have codes of different tokenizers.
    """
    stores = _one_store_each(layout, model, "codes", runs)
    found = {name: code_facts(read_codes(store)) for name, store in stores.items()}
    if not found:
        return None
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise InputError(
                f"datasets {first} and {other} have codes of different tokenizers: make both by "
                "the same one, or leave one out of the mixture"
            )
    return found[first]


def sources_of(layout: Layout, model: Model, runs: Iterable[str]) -> dict[str, Any]:
    """What a model has to know of its input beside the config, as its settings name it."""
    names = list(runs)
    found = {"regions": regions_of(layout, model, names), "codes": codes_of(layout, model, names)}
    return {name: known for name, known in found.items() if known is not None}


def make_settings(
    config: Config,
    model: str,
    settings: Optimiser,
    seed: int,
    sources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The part of the config that a training depends on: its own section, the model's, tokens.

    `sources` are those of `sources_of`.
    """
    return dict(sources or {}) | {
        "model": config.models[model].model_dump(
            mode="json",
            # Weights to start from are an input, and the same wherever they lie.
            exclude={"base", "ablation_of", "pretrain", "finetune", "image_weights"},
        ),
        type(settings).__name__.lower(): relevant_settings(settings),
        "tokens": config.tokens.model_dump(mode="json"),
        "seed": seed,
    }


def make_record(
    config: Config, dataset: str, model: str, seed: int, settings: Optimiser, runs: pd.DataFrame
) -> dict[str, Any]:
    """What a training depends on, JSON-able: names, `settings`, and digests of `inputs` and code.

    `runs` are the manifest's rows of the runs used, which tell how each was made.
    """
    stage = type(settings).__name__.lower()
    members = config.members(dataset)
    splits = {name: digest_file(Layout.of(config, name).split) for name in members}
    mixture = {"mixture": members} if dataset in config.mixtures else {}
    sources = sources_of(Layout.of(config, dataset), config.models[model], runs["run"])
    return {
        "stage": stage,
        "dataset": dataset,
        "model": model,
        "seed": seed,
        "settings": make_settings(config, model, settings, seed, sources) | mixture,
        "inputs": {
            "split": splits.get(dataset, splits),
            "runs": digest_json(runs[["run", "key"]].astype(str).to_numpy().tolist()),
        },
        "code": code_of(stage, f"models.{config.models[model].family}"),
    }


def open_windows(
    config: Config,
    dataset: str,
    model: str,
    network: nn.Module,
    subjects: Mapping[str, Sequence[str]],
    runs: pd.DataFrame,
    kind: Callable[..., Windows] = Windows,
) -> dict[str, Windows]:
    """Windows, or windows of some `kind`, over the runs of each part's subjects.

    Raises
    ------
    InputError
        When a part has no runs, or too many of them give no window.
    """
    layout = Layout.of(config, dataset)
    windows = {}
    for part, names in subjects.items():
        of_part = runs[runs["subject"].isin(set(names))]
        if of_part.empty:
            raise InputError(
                f"{layout.split}: none of the {len(names)} subjects of part {part!r} has a usable "
                f"run; see {layout.excluded} for the reasons, or raise splits.{part}"
            )
        readers = make_readers(network, layout, config.models[model], config.tokens)
        weights = config.members(dataset) if dataset in config.mixtures else None
        of_subject, most = group_runs(of_part), config.compute.max_excluded
        windows[part] = kind(of_subject, readers, most, weights)
    return windows
