"""The files `calibration.json` and `.safetensors` of a fine-tuned model: what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, ValidationError

from neuromamba.calibration import Rescaling
from neuromamba.config import Volumes
from neuromamba.files import InputError, digest_file, read_json
from neuromamba.owned import OwnedFolder

MODEL, TRAINED = "model.json", "trained.json"
CALIBRATION, ARRAYS = "calibration.json", "calibration.safetensors"
VALUE = "value"
"""Stands for a class where a number is predicted."""

Level = Literal["run", "subject"]
LEVELS: tuple[Level, ...] = ("run", "subject")
Arrays = dict[str, np.ndarray]
"""`{level}.mean`, `.basis`, `.variances` and `.rest` of the features of training subjects (see
`novelty.Cloud`), float32, where these are enough, and `patches` (x, y, z): the share of their runs
that has each one."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OfLevel(_Frozen):
    """What was learnt of predictions by run, or by subject.

    Attributes
    ----------
    rescaling, note
        How probabilities are calibrated, or why they are not; neither for numbers.
    scores
        By class, how strange its validation subjects are as one of it; or under `value` absolute
        errors. Ascending.
    distances
        Of `training` (cross-fitted) and `validation` subjects, in SD; empty where there is no
        cloud. Ascending.
    """

    rescaling: Rescaling | None
    note: str | None
    scores: dict[str, list[float]]
    distances: dict[str, list[float]]


class Calibration(_Frozen):
    """The content of `calibration.json`.

    Attributes
    ----------
    weights
        Digest of the model's weights.
    classes
        Their names, empty for a number.
    space, volumes, tokens, window, normalization
        How the scans that it was learnt from were prepared; `window` is in volumes.
    subjects
        How many of each part it was learnt from.
    ranges
        Least and largest of training subjects' first runs: `repetition_time` of the scan in s,
        `n_volumes` after denoising, `coverage` and `stray` (see `novelty.place`).
    levels
        By `run` and by `subject`.
    """

    format: Literal[2]
    weights: str
    dataset: str
    target: str
    classes: list[str]
    space: str
    volumes: Volumes
    tokens: dict[str, Any]
    window: int
    normalization: str | None
    subjects: dict[str, int]
    ranges: dict[str, tuple[float, float]]
    levels: dict[Level, OfLevel]


def save_calibration(
    owned: OwnedFolder, info: Mapping[str, Any], calibration: Calibration, arrays: Arrays
) -> None:
    """Write the calibration and, last, the model's record, which has the digests of all files."""
    with ExitStack() as renames:
        # What was entered first is renamed last.
        temporary = {
            name: renames.enter_context(owned.writing(owned.path / name))
            for name in (MODEL, CALIBRATION, ARRAYS)
        }
        temporary[ARRAYS].write_bytes(safetensors.numpy.save(arrays))
        _write_json(temporary[CALIBRATION], calibration.model_dump(mode="json"))
        digests = {name: digest_file(temporary[name]) for name in (CALIBRATION, ARRAYS)}
        _write_json(temporary[MODEL], {**info, "files": info["files"] | digests})
    owned.remove(owned.path / TRAINED)


def load_calibration(folder: Path, info: Mapping[str, Any]) -> tuple[Calibration, Arrays] | None:
    """The calibration of a finished model; `None` for one that was trained before there were any.

    Raises
    ------
    InputError
        When it is of another version, or does not belong to the model's weights.
    """
    if CALIBRATION not in info["files"]:
        return None
    path = folder / CALIBRATION
    try:
        calibration = Calibration.model_validate(read_json(path))
        arrays = safetensors.numpy.load_file(folder / ARRAYS)
    except (ValidationError, OSError, safetensors.SafetensorError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path}: is not of this version ({text}); train again") from None
    if calibration.weights != info["files"]["model.safetensors"]:
        raise InputError(f"{path} was learnt from other weights; train the model again")
    return calibration, arrays


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
