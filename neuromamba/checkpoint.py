"""What training leaves on disk: checkpoints to continue from, and finished models to use.

Design choices
--------------
- Weights and optimiser state are safetensors, all else is JSON: reading either runs no code.
- A checkpoint is a new folder `step-N`, written under a temporary name and renamed; older ones go
  only after that. A killed job leaves whole checkpoints, and what it was writing is not read.
- It holds everything the rest of the training depends on: weights, best weights so far, optimiser
  state, the loop's counters and the metrics written so far. There is no state of a random number
  generator in it, because the loop seeds each step from (seed, step).
- Its files are checked against their digests when it is read. One that is not whole (a full disk, a
  lost node) is passed over for the one before, which leads to the same bits, only later.
- A finished model is `model.safetensors` and, written last, `model.json`, which holds the digest of
  the weights: without a `model.json` that fits, there is no model.
"""

from __future__ import annotations

import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.files import InputError, atomic_path, digest_file, write_json, write_text
from neuromamba.record import ChangedError, OnChange, differences, provenance, read_verified
from neuromamba.runtime import telling_full_disk

Tensors = dict[str, torch.Tensor]

_METRICS = "metrics.jsonl"
_STEP, _LAST, _HIDDEN = "step-", "last", ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A training between two steps.

    Attributes
    ----------
    tensors
        By file (`model`, `best`, `optimizer`, `average`), then by name.
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
    folder: Path,
    step: int,
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    keep: int = 1,
    spare: int | None = None,
) -> Path:
    """Write `folder/step-N`, point the link `folder/last` at it, and remove what is not needed.

    Parameters
    ----------
    record
        What the training depends on.
    keep
        How many of the newest checkpoints stay.
    spare
        The step of one more that stays.
    """
    path = folder / f"{_STEP}{step:08d}"
    with atomic_path(path) as temporary:
        temporary.mkdir()
        for name, tensors in checkpoint.tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", tensors)
        write_text(temporary / _METRICS, checkpoint.metrics)
        digests = {file.name: digest_file(file) for file in sorted(temporary.iterdir())}
        facts = {**record, **provenance(), "state": checkpoint.state, "files": digests}
        write_json(temporary / "state.json", facts)
    _link(folder / _LAST, path.name)
    steps = sorted(list_checkpoints(folder))
    # Those of later steps belong to a course that was given up.
    needed = {*[n for n in steps if n <= step][-keep:], spare}
    kept = {old.name for n, old in list_checkpoints(folder).items() if n in needed}
    for old in [*folder.glob(f"{_HIDDEN}*"), *folder.glob(f"{_STEP}*")]:
        if old.name not in kept:
            _discard(old)
    return path


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by their step, whole or not."""
    paths = folder.glob(_STEP + "[0-9]" * 8)
    return {int(path.name.removeprefix(_STEP)): path for path in paths}


def load_checkpoint(
    folder: Path, record: Mapping[str, Any], on_change: OnChange, upto: int | None = None
) -> Checkpoint | None:
    """Read the newest whole checkpoint in `folder` (`upto` a step); `None` where there is none.

    One that is not whole is passed over, and stderr told of it.

    Raises
    ------
    InputError
        When there are checkpoints and none is whole, or when the newest whole one was made under
        other settings or inputs and `on_change` is `refuse`.
    """
    found = [pair for pair in list_checkpoints(folder).items() if upto is None or pair[0] <= upto]
    damage: list[str] = []
    for _, path in sorted(found, reverse=True):
        try:
            facts = read_verified(path / "state.json")
            changes = differences(facts, record)
            if changes and on_change == "refuse":
                raise ChangedError(path, changes)
            if changes:
                shutil.rmtree(folder)
                return None
            checkpoint = _read_checkpoint(path, facts)
        except ChangedError:
            raise
        except (InputError, KeyError, OSError, safetensors.SafetensorError) as error:
            damage.append(f"{path}: the checkpoint is damaged ({error})")
            continue
        for line in damage:
            tqdm.write(f"{line}; going on from the one before, {path.name}", file=sys.stderr)
        return checkpoint
    if damage:
        cure = f"none is whole: remove {folder} to train from the start"
        raise InputError("\n".join([*damage, cure]))
    return None


def _read_checkpoint(path: Path, facts: Mapping[str, Any]) -> Checkpoint:
    names = [name for name in facts["files"] if name.endswith(".safetensors")]
    tensors = {Path(name).stem: safetensors.torch.load_file(path / name) for name in names}
    return Checkpoint(tensors, facts["state"], (path / _METRICS).read_text(encoding="utf-8"))


def _link(path: Path, target: str) -> None:
    """Make `path` a relative link to its neighbour `target`, at once."""
    temporary = path.with_name(f"{_HIDDEN}{path.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(path)


def _discard(path: Path) -> None:
    """Remove a folder or link; a process that dies half-way leaves nothing that is read."""
    if path.is_symlink():
        path.unlink()
    elif path.name.startswith(_HIDDEN):
        shutil.rmtree(path)
    else:
        shutil.rmtree(path.rename(path.with_name(f"{_HIDDEN}{uuid.uuid4().hex[:8]}-{path.name}")))


# --- Finished models ----------------------------------------------------------------------------


def save_model(
    folder: Path, weights: Tensors, info: Mapping[str, Any], last: Tensors | None = None
) -> None:
    """Write `model.safetensors`, then `model.json` with `info`, versions and digests.

    `last` are the weights after the last step, for `last.safetensors`.
    """
    files = {}
    for name, tensors in (("model", weights), ("last", last)):
        if tensors is not None:
            path = folder / f"{name}.safetensors"
            with telling_full_disk(folder), atomic_path(path) as temporary:
                _write_tensors(temporary, tensors)
            files[path.name] = digest_file(path)
    write_json(folder / "model.json", {**info, **provenance(), "files": files})


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
    try:
        return read_verified(path, may_lack="last.safetensors")
    except InputError as error:
        raise InputError(f"{error}; train the model again") from error


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


def ancestry(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the `model.json` of a model says of the one it started from."""
    names = ("dataset", "model", "seed", "subjects", "files", "pretrained_from")
    return {name: info[name] for name in names if name in info}


def seen_subjects(info: Mapping[str, Any], dataset: str) -> set[str]:
    """Every subject of `dataset` that a model, or any that it started from, has seen.

    Seen is what it was trained or chosen on. Models of a mixture name subjects `dataset/sub-01`;
    names without a dataset are taken to be of this one, for the weights may have come from a copy.
    """
    own = {name.removeprefix(f"{dataset}/") for part in info["subjects"].values() for name in part}
    earlier = info.get("pretrained_from")
    return own | (seen_subjects(earlier, dataset) if earlier else set())


def _write_tensors(path: Path, tensors: Tensors) -> None:
    # Cloned, because safetensors refuses tensors that share memory, such as tied weights.
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(plain, path)
