"""Pretrained models: those of a run, and folders of weights that can be shared.

A shared model is a folder in the layout of the Hugging Face hub:

- `model.safetensors`, the weights;
- `config.json`: the sections `model`, `tokens` and `volumes` of the config that it needs, its
  family, facts about its training, and the digest of the weights;
- `README.md`, the model card.

Reading it runs no code and needs no network; `from_pretrained` asks the hub only for a name that
is no folder here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

import neuromamba
from neuromamba.checkpoint import load_model_info, load_weights, put_weights
from neuromamba.config import Compute, Config, Model, Tokens, Volumes
from neuromamba.files import (
    InputError,
    atomic_path,
    digest_file,
    read_json,
    write_json,
    write_text,
)
from neuromamba.finetune import refuse_other_settings
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.pretrain import make_network, make_settings, n_rois_of
from neuromamba.roi_windows import read_regions
from neuromamba.stage_settings import target_settings
from neuromamba.token_store import TokenStore

SHARED_GRID = {"shape", "voxel_size", "denoise"}
"""What of the `volumes` section tells the runs that a model reads."""
FORMAT = 1
"""Raised when older folders can no longer be read."""

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model with what has to be known to use it.

    Attributes
    ----------
    network
        The model family in evaluation mode, on the CPU; see `neuromamba.models`.
    model
        Its section of the config, of which `volumes` and `normalization` say what a window is.
    tokens
        How runs have to be cut into patches.
    volumes
        The grid that runs have to be resampled to, and their denoising: the keys `SHARED_GRID`.
    facts
        What else is told of it: counts of subjects and runs, settings and outcome of its training.
    regions
        `atlas`, `atlas_sha256` and `n_rois` of a model of ROI series.
    codes
        Of a model of codes, whose: see `neuromamba.code_windows.code_facts`.
    """

    network: nn.Module
    model: Model
    tokens: Tokens
    volumes: Volumes
    facts: Mapping[str, Any] = field(default_factory=dict)
    regions: Mapping[str, Any] | None = None
    codes: Mapping[str, Any] | None = None


def save_pretrained(folder: Path | str, pretrained: Pretrained, card: str) -> None:
    """Write a model and its `card` as a folder to be shared, all of it or nothing.

    Raises
    ------
    InputError
        When there is something at `folder` already.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; remove it, or choose another name")
    weights = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in pretrained.network.state_dict().items()
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        # The loaders of other libraries look for this entry.
        safetensors.torch.save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        facts = {
            "format": FORMAT,
            "library_name": "neuromamba",
            "library_version": neuromamba.__version__,
            "model_type": pretrained.model.family,
            "model": pretrained.model.model_dump(
                mode="json", exclude={"base", "ablation_of", "pretrain", "finetune"}
            ),
            "tokens": pretrained.tokens.model_dump(mode="json"),
            "volumes": pretrained.volumes.model_dump(mode="json", include=SHARED_GRID),
            **({"regions": dict(pretrained.regions)} if pretrained.regions else {}),
            **({"codes": dict(pretrained.codes)} if pretrained.codes else {}),
            "facts": dict(pretrained.facts),
            "weights": {WEIGHTS: digest_file(temporary / WEIGHTS)},
        }
        write_json(temporary / CONFIG, facts)
        write_text(temporary / CARD, card)


def from_pretrained(
    name_or_folder: Path | str, revision: str | None = None, compute: Compute | None = None
) -> Pretrained:
    """Load a model that `save_pretrained` wrote.

    Parameters
    ----------
    name_or_folder
        A folder; or, where there is none of that name, `owner/name` on the Hugging Face hub, from
        which the three files above are fetched. That needs a network and `neuromamba[hub]`.
    revision
        Branch, tag or commit on the hub. A commit's hash alone is sure to name the same weights
        tomorrow.
    compute
        Which kernels the model is to use.

    Raises
    ------
    InputError
        When there is nothing of that name, the format is another one, or the files do not fit each
        other.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        folder = _download(str(name_or_folder), revision)
    path = folder / CONFIG
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else None
        raise InputError(
            f"{path}: format {found!r}, where neuromamba {neuromamba.__version__} reads format "
            f"{FORMAT}; only folders written by `neuromamba export` can be loaded"
        )
    try:
        model: Model = TypeAdapter(Model).validate_python(facts["model"])
        tokens = Tokens.model_validate(facts["tokens"])
        volumes = Volumes.model_validate(facts["volumes"])
    except (KeyError, ValidationError) as error:
        what = f"key {error} is missing" if isinstance(error, KeyError) else _one_line(error)
        raise InputError(
            f"{path}: {what}; it was written by neuromamba {facts.get('library_version')}, this is "
            f"{neuromamba.__version__}: install that version, or get the folder again"
        ) from None
    values = tokens.patch**3 * tokens.time_patch
    # The weights drawn here are replaced: nobody else's random numbers are to change for them.
    with torch.random.fork_rng(devices=[]):
        codes = facts.get("codes")
        network = build_model(model, values, compute, n_rois_of(facts), codes)
    put_weights(network, _read_weights(folder, facts), folder / WEIGHTS)
    regions = facts.get("regions")
    told = facts.get("facts", {})
    return Pretrained(network.eval(), model, tokens, volumes, told, regions, codes)


def open_pretrained(
    config: Config, dataset: str, model: str, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The pretrained model that a dataset's models start from, on the CPU, and its `model.json`.

    Raises
    ------
    InputError
        When its training has not finished, or was under another model or tokens section.
    """
    source, model = config.pretraining_of(dataset, model)
    folder = Layout.of(config, source).pretrain(model, seed)
    info = load_model_info(folder)
    settings = make_settings(config, model, config.models[model].pretrain, seed)
    refuse_other_settings(folder, info, settings)
    network = make_network(config, model, seed, info["settings"])
    load_weights(network, folder)
    return network.eval(), info


def open_finetuned(
    config: Config, dataset: str, model: str, seed: int, target: str
) -> tuple[nn.Module, dict[str, Any]]:
    """A fine-tuned model without its head, on the CPU, and its `model.json`.

    Raises
    ------
    InputError
        When its training has not finished, or was under another model, tokens or target section.
    """
    folder = Layout.of(config, dataset).finetune(model, seed, target)
    info = load_model_info(folder)
    settings = make_settings(config, model, config.models[model].finetune, seed)
    settings["target"] = target_settings(config.datasets[dataset], target)
    refuse_other_settings(folder, info, settings)
    network, start = make_network(config, model, seed, info["settings"]), "backbone."
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    own = {name.removeprefix(start): v for name, v in tensors.items() if name.startswith(start)}
    put_weights(network, own, folder / WEIGHTS)
    return network.eval(), info


def refuse_other_grid(store: TokenStore, tokens: Tokens, volumes: Volumes) -> None:
    """Raise `InputError` when a run's tokens are not cut as a model has learnt to read them."""
    attrs = store.attrs
    found = {
        "tokens.patch": attrs["patch"],
        "tokens.time_patch": attrs["time_patch"],
        "tokens.brain_fraction": attrs["brain_fraction"],
        "volumes.shape": [count * attrs["patch"] for count in attrs["patch_grid"]],
        "volumes.voxel_size": abs(attrs["affine"][0][0]),
    }
    needed = {
        **{f"tokens.{name}": value for name, value in tokens.model_dump(mode="json").items()},
        "volumes.shape": list(volumes.shape),
        "volumes.voxel_size": volumes.voxel_size,
    }
    changes = [
        f"{name} is {value}, the model needs {needed[name]}"
        for name, value in found.items()
        if value != needed[name]
    ]
    if changes:
        raise InputError(
            f"{store.path}: {'; '.join(changes)}; make volumes and tokens with the model's settings"
        )


def refuse_other_regions(store: Path, regions: Mapping[str, Any] | None) -> None:
    """Raise `InputError` when a run's ROI series are not of the atlas that a model has learnt."""
    known, needed = read_regions(store), dict(regions or {})
    if known["atlas_sha256"] != needed.get("atlas_sha256"):
        raise InputError(
            f"{store}: its regions are those of {known['atlas']}, the model reads those of "
            f"{needed.get('atlas')}; give the dataset the same `atlas`, and make the ROI series "
            "again"
        )


def _download(name: str, revision: str | None) -> Path:
    """The folder of a model of the hub, fetched where it is not in the hub's cache."""
    if not _HUB_NAME.fullmatch(name):
        raise InputError(f"{name}: no such folder, and no name of a model on a hub (owner/name)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"{name}: no such folder; to fetch it as a model from the Hugging Face hub, install "
            "huggingface_hub (pip install 'neuromamba[hub]')"
        ) from None
    try:
        files = [CONFIG, WEIGHTS, CARD]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (OSError, ValueError) as error:  # what the hub's library raises is of these kinds
        raise InputError(
            f"{name}: no such folder, and not to be had from the Hugging Face hub "
            f"({_one_line(error)})"
        ) from error


def _read_weights(folder: Path, facts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    digest = facts.get("weights", {}).get(WEIGHTS)
    try:
        if digest is not None and digest_file(path) != digest:
            raise InputError(f"{path} differs from the digest in {CONFIG}; get the folder again")
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); get the folder again") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
