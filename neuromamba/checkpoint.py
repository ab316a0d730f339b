"""What training leaves on disk: checkpoints to continue from, and finished models to use.

Design choices
--------------
- Weights and optimiser state are safetensors, all else is JSON: reading either runs no code.
- A checkpoint is a new folder `step-N`, written under a temporary name and renamed; older ones go
  only after that. A killed job leaves whole checkpoints, and what it was writing is not read.
- Only the process that owns the training's folder (`owned`) can put anything there or remove it.
- It holds everything the rest of the training depends on: weights, best weights so far, optimiser
  state, the loop's counters and the metrics written so far. There is no state of a random number
  generator in it, because the loop seeds each step from (seed, step).
- Its files are checked against their digests when it is read. One that is not whole (a full disk, a
  lost node) is passed over for the one before, which leads to the same bits, only later.
- A finished model is `model.safetensors` and, put there last, `model.json`, which holds the digest
  of the weights: without a `model.json` that fits, there is no model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.files import InputError, atomic_path, digest_file
from neuromamba.owned import OwnedFolder
from neuromamba.record import (
    COMPARED,
    ChangedError,
    OnChange,
    differences,
    provenance,
    read_verified,
)

Tensors = dict[str, torch.Tensor]

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints, in that of the training."""

_METRICS = "metrics.jsonl"
_STEP, _LAST = "step-", "last"


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
    folder: OwnedFolder,
    step: int,
    checkpoint: Checkpoint,
    record: Mapping[str, Any],
    keep: int = 1,
    spare: int | None = None,
) -> None:
    """Write `checkpoints/step-N`, point the link `checkpoints/last` at it, remove what must go.

    Parameters
    ----------
    folder, record
        Of the training, and what it depends on.
    keep, spare
        How many of the newest checkpoints stay, and the step of one more that does.
    """
    everyone = folder.path / CHECKPOINTS
    path = everyone / f"{_STEP}{step:08d}"
    with folder.writing(path) as temporary:
        temporary.mkdir()
        for name, tensors in checkpoint.tensors.items():
            _write_tensors(temporary / f"{name}.safetensors", tensors)
        (temporary / _METRICS).write_text(checkpoint.metrics, encoding="utf-8")
        digests = {file.name: digest_file(file) for file in sorted(temporary.iterdir())}
        facts = {**record, **provenance(), "state": checkpoint.state, "files": digests}
        _write_json(temporary / "state.json", facts)
    with folder.writing(everyone / _LAST) as link:
        link.symlink_to(path.name)
    steps = sorted(list_checkpoints(everyone))
    # Those of later steps belong to a course that was given up.
    needed = {*[n for n in steps if n <= step][-keep:], spare}
    for number, old in list_checkpoints(everyone).items():
        if number not in needed:
            folder.remove(old)


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder` by their step, whole or not."""
    paths = folder.glob(_STEP + "[0-9]" * 8)
    return {int(path.name.removeprefix(_STEP)): path for path in paths}


def load_checkpoint(
    folder: OwnedFolder, record: Mapping[str, Any], on_change: OnChange, upto: int | None = None
) -> Checkpoint | None:
    """Read the newest whole checkpoint of a training (`upto` a step); `None` where there is none.

    One that is not whole is passed over, and stderr told of it. Those of other settings or inputs
    are removed where `on_change` is `restart`.

    Raises
    ------
    InputError
        When there are checkpoints and none is whole, or when the newest whole one was made under
        other settings or inputs and `on_change` is `refuse`.
    """
    everyone = folder.path / CHECKPOINTS
    found = [pair for pair in list_checkpoints(everyone).items() if upto is None or pair[0] <= upto]
    damage: list[str] = []
    for _, path in sorted(found, reverse=True):
        try:
            facts = read_verified(path / "state.json")
            changes = differences(facts, record)
            if changes and on_change == "refuse":
                raise ChangedError(path, changes)
            if changes:
                folder.remove(everyone)
                return None
            checkpoint = _read_checkpoint(path, facts)
        except ChangedError:
            raise
        except (InputError, KeyError, OSError, safetensors.SafetensorError) as error:
            damage.append(f"{path}: the checkpoint is damaged ({error})")
            continue
        # Code that was mended goes on with the training that it was mended for.
        if edited := differences(facts, record, ["code"]):
            files = ", ".join(line.split(":")[0].removeprefix("code.") for line in edited)
            tqdm.write(f"{path}: going on with other code ({files})", file=sys.stderr)
        for line in damage:
            tqdm.write(f"{line}; going on from the one before, {path.name}", file=sys.stderr)
        return checkpoint
    if damage:
        cure = f"none is whole: remove {everyone} to train from the start"
        raise InputError("\n".join([*damage, cure]))
    return None


def _read_checkpoint(path: Path, facts: Mapping[str, Any]) -> Checkpoint:
    names = [name for name in facts["files"] if name.endswith(".safetensors")]
    tensors = {Path(name).stem: safetensors.torch.load_file(path / name) for name in names}
    return Checkpoint(tensors, facts["state"], (path / _METRICS).read_text(encoding="utf-8"))


# --- Finished models ----------------------------------------------------------------------------


def save_model(
    folder: Path,
    weights: Tensors,
    info: Mapping[str, Any],
    last: Tensors | None = None,
    writing: Callable[[Path], AbstractContextManager[Path]] = atomic_path,
) -> None:
    """Write `model.safetensors`, then `model.json` with `info`, versions and digests.

    Parameters
    ----------
    last
        The weights after the last step, for `last.safetensors`.
    writing
        Gives a temporary path, which it renames: that of the folder's owner, where it has one.
    """
    tensors = {"last.safetensors": last} if last is not None else {}
    tensors |= {"model.safetensors": weights}
    with ExitStack() as renames:
        # All is written before anything is renamed; what was entered first is renamed last.
        record = renames.enter_context(writing(folder / "model.json"))
        files = {}
        for name, value in tensors.items():
            temporary = renames.enter_context(writing(folder / name))
            _write_tensors(temporary, value)
            files[name] = digest_file(temporary)
        facts = {**info, **provenance(), "files": files}
        _write_json(record, facts)


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
    """Whether a model trained under the same settings and inputs, by the same code, is there.

    Raises
    ------
    InputError
        When one trained under others is there and `on_change` is `refuse`.
    """
    if not (folder / "model.json").exists():
        return False
    changes = differences(load_model_info(folder), record, (*COMPARED, "code"))
    if changes and on_change == "refuse":
        raise ChangedError(folder / "model.json", changes)
    if changes:
        # Gone first, so that no later stage takes the old model for the new one.
        (folder / "model.json").unlink()
    return not changes


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    # Unlike `files.write_json` this makes no folder, least of all one that a successor has removed.
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_tensors(path: Path, tensors: Tensors) -> None:
    # Cloned, because safetensors refuses tensors that share memory, such as tied weights.
    plain = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(plain, path)
    # Files of safetensors can be read by their owner alone, whatever the user's umask says.
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
