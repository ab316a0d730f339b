"""What training leaves on disk: checkpoints to continue from, and finished models to use.

Design choices
--------------
- Weights and optimiser state are safetensors, all else is JSON: reading either runs no code.
- A checkpoint is a new folder `step-N`, written under a temporary name and renamed; older ones go
  only after that. There is no moment at which a killed job has no whole checkpoint.
- It holds everything the rest of the training depends on: weights, best weights so far, optimiser
  state, the loop's counters and the metrics written so far. There is no state of a random number
  generator in it, because the loop seeds each step from (seed, step).
- A finished model is `model.safetensors` and, written last, `model.json`, which holds the digest of
  the weights: without a `model.json` that fits, there is no model.
- What a training depends on is recorded as `settings` (config) and `inputs` (digests). Continuing
  under other ones is refused with the difference, or starts again where that is asked for.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

import neuromamba
from neuromamba.files import InputError, atomic_path, digest_file, read_json, write_json, write_text
from neuromamba.runtime import telling_full_disk

FORMAT = 1
"""Raised when older checkpoints or models can no longer be read."""

OnChange = Literal["refuse", "restart"]
Tensors = dict[str, torch.Tensor]

_COMPARED = ("settings", "inputs")
_METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps.

    Attributes
    ----------
    tensors
        By file (`model`, `best`, `optimizer`), then by name.
    state
        The loop's counters, JSON-able.
    metrics
        The text of `metrics.jsonl` so far.
    """

    tensors: dict[str, Tensors]
    state: dict[str, Any]
    metrics: str


# --- Checkpoints --------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, step: int, checkpoint: Checkpoint, record: Mapping[str, Any]
) -> Path:
    """Write `folder/step-N` and remove older ones. `record` tells what the training depends on."""
    path = folder / f"step-{step:08d}"
    with atomic_path(path) as temporary:
        temporary.mkdir()
        for name, tensors in checkpoint.tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", tensors)
        write_text(temporary / _METRICS, checkpoint.metrics)
        digests = {file.name: digest_file(file) for file in sorted(temporary.iterdir())}
        facts = {"format": FORMAT, **record, **provenance()}
        write_json(temporary / "state.json", {**facts, "state": checkpoint.state, "files": digests})
    for old in folder.iterdir():
        if old != path:
            shutil.rmtree(old)
    return path


def load_checkpoint(
    folder: Path, record: Mapping[str, Any], on_change: OnChange
) -> Checkpoint | None:
    """Read the newest checkpoint in `folder`; `None` where the training has to start.

    Raises
    ------
    InputError
        When the checkpoint is damaged, or when it was made under other settings or inputs and
        `on_change` is `refuse`.
    """
    paths = sorted(folder.glob("step-*"))
    if not paths:
        return None
    path = paths[-1]
    cure = f"remove {folder} to train from the start"
    try:
        facts = _read_verified(path / "state.json", path)
        changes = differences(facts, record)
        if changes and on_change == "refuse":
            raise ChangedError(path, changes)
        if changes:
            shutil.rmtree(folder)
            return None
        names = [name for name in facts["files"] if name.endswith(".safetensors")]
        tensors = {Path(n).stem: safetensors.torch.load_file(path / n) for n in names}
        metrics = (path / _METRICS).read_text(encoding="utf-8")
        return Checkpoint(tensors, facts["state"], metrics)
    except ChangedError:
        raise
    except (InputError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: the checkpoint is damaged ({error}); {cure}") from error


# --- Finished models ----------------------------------------------------------------------------


def save_model(folder: Path, weights: Tensors, info: Mapping[str, Any]) -> None:
    """Write `model.safetensors`, then `model.json` with `info`, versions and digest."""
    path = folder / "model.safetensors"
    with telling_full_disk(folder), atomic_path(path) as temporary:
        _write_tensors(temporary, weights)
    files = {path.name: digest_file(path)}
    write_json(folder / "model.json", {"format": FORMAT, **info, **provenance(), "files": files})


def load_model_info(folder: Path) -> dict[str, Any]:
    """Read `model.json` and check that the weights beside it are the ones it describes.

    Raises
    ------
    InputError
        When there is no finished model, or its files do not fit each other.
    """
    path = folder / "model.json"
    if not path.exists():
        raise InputError(f"{path} does not exist: the model's training has not finished")
    return _read_verified(path, folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` into `model`; every tensor must have its place and its shape.

    Raises
    ------
    InputError
        With the tensors that are missing, unexpected, or of another shape.
    """
    path = folder / "model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); train the model again") from error
    put_weights(model, tensors, path)


def put_weights(model: nn.Module, tensors: Tensors, source: Path) -> None:
    """Give `model` the tensors read from `source`, or raise `InputError` as `load_weights` does."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(
            f"{source} does not fit the model that the config describes: "
            f"{', '.join(problems[:10])}{more}; use the config and version it was made with, or "
            "remove it and train again"
        )
    model.load_state_dict(tensors)


def finished(folder: Path, record: Mapping[str, Any], on_change: OnChange) -> bool:
    """Whether a model trained under the same settings and inputs is already there.

    Raises
    ------
    InputError
        When one trained under others is there and `on_change` is `refuse`.
    """
    if not (folder / "model.json").exists():
        return False
    changes = differences(load_model_info(folder), record)
    if changes and on_change == "refuse":
        raise ChangedError(folder / "model.json", changes)
    if changes:
        # Gone first, so that no later stage takes the old model for the new one.
        (folder / "model.json").unlink()
    return not changes


def seen_subjects(info: Mapping[str, Any]) -> set[str]:
    """Every subject that a model, or the one it was fine-tuned from, was trained or chosen on."""
    own = {subject for part in info["subjects"].values() for subject in part}
    earlier = info.get("pretrained_from")
    return own | (seen_subjects(earlier) if earlier else set())


# --- Records ------------------------------------------------------------------------------------


class ChangedError(InputError):
    """A training on disk was made under other settings or inputs; the message shows which."""

    def __init__(self, path: Path, changes: list[str]) -> None:
        super().__init__(
            f"{path} was made under other settings or inputs:\n  "
            + "\n  ".join(changes)
            + "\nput them back, or use --on-change restart to train from the start"
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `key: old -> new` for all settings and inputs that differ."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, "unset") != after.get(key, "unset")
    ]


def provenance() -> dict[str, Any]:
    """Versions of what ran, and the git revision of this package, `None` outside a checkout."""
    versions = {
        "neuromamba": neuromamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {"versions": versions, "git_revision": _git_revision()}


@cache
def _git_revision() -> str | None:
    """Commit of the checkout that holds this file, with `-dirty` when it has changes."""
    here = Path(__file__)
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    for command in (["ls-files", "--error-unmatch", here.name], describe):
        try:
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
    return done.stdout.strip()


def _flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, below in value.items():
                visit(f"{prefix}.{key}", below)
        else:
            flat[prefix.removeprefix(".")] = value

    for name in _COMPARED:
        visit("" if name == "settings" else f".{name}", record[name])
    return flat


def _write_tensors(path: Path, tensors: Tensors) -> None:
    # Cloned, because safetensors refuses tensors that share memory, such as tied weights.
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(plain, path)


def _read_verified(path: Path, folder: Path) -> dict[str, Any]:
    """Read a JSON file whose `files` are digests of files in `folder`, and check them."""
    facts = read_json(path)
    cure = "train the model again"
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or "files" not in facts:
        raise InputError(f"{path} is not of this version's format ({FORMAT}); {cure}")
    for name, digest in facts["files"].items():
        file = folder / name
        if not file.exists():
            raise InputError(f"{file} is missing; {cure}")
        if digest_file(file) != digest:
            raise InputError(f"{file} differs from the digest in {path.name}; {cure}")
    return facts
