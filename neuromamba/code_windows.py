"""Windows of codes, for models that read `codes`: what an image autoencoder makes of each volume.

Design choices
--------------
- A window is a stretch of volumes as they were scanned, read straight from the uncompressed shards
  (see `neuromamba.shards`): a volume of 27 x 3072 float16 numbers is 166 kB, and a window of 256
  volumes 42 MB. Nothing is normalised here; the model has a norm of its own for that.
- Codes of two autoencoders, or of volumes that were scaled in another way, have the same shape and
  mean nothing to each other. Every store tells what made it, a training records what it has learnt
  (`code_facts`), and a reader refuses all else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuromamba.files import InputError, read_json
from neuromamba.roi_windows import Sample, stack_samples
from neuromamba.shards import ShardedArray

OPEN_STORES = 256
"""Stores whose metadata and shard indices are kept: some kilobytes each."""
IDENTITY = ("kind", "sha256", "channels")
"""What tells an autoencoder apart; where its weights came from (`revision`) changes nothing."""


class CodeStore:
    """The codes of one run, `codes/{run}.zarr`.

    Attributes
    ----------
    attrs
        The store's attributes, among them `run`, `repetition_time` (s) and `tokenizer`.
    n_volumes, n_tokens, code_width
        Shape of the values.

    Raises
    ------
    InputError
        When the store is absent or damaged; damage to the values shows when they are read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.attrs = read_codes(self.path)
        self._values = ShardedArray(self.path / "values")
        self.n_volumes, self.n_tokens, self.code_width = self._values.layout.shape

    def window(self, first: int, volumes: int) -> np.ndarray:
        """Copy `volumes` volumes from `first` on: (volume, token, value) float32."""
        stored = np.empty((volumes, self.n_tokens, self.code_width), dtype=np.float16)
        self._values.read(first, stored)
        return stored.astype(np.float32)


class CodeWindows:
    """Reader of `codes`: the codes of a window's volumes.

    Gives `codes` (B, T, 27, W) float32, tokens of a volume with x fastest, and `repetition_time`
    (B,) float32 in s, T being the model's `volumes`.

    Parameters
    ----------
    path_of
        From a run to its store of codes.
    volumes
        Volumes of a window, T.
    time_patch
        Volumes between two starts of a window: starts are counted in time patches for all readers.
    codes
        What the model has learnt, see `code_facts`.
    """

    def __init__(
        self,
        path_of: Callable[[str], Path],
        volumes: int,
        time_patch: int,
        codes: Mapping[str, Any],
    ) -> None:
        self._path_of, self._volumes, self._time_patch = path_of, volumes, time_patch
        self._codes = dict(codes)
        self._store = lru_cache(OPEN_STORES)(self._open)

    def positions(self, run: str) -> int:
        store = self._store(run)
        if store.n_volumes < self._volumes:
            raise InputError(
                f"{store.path}: {run} has {store.n_volumes} volumes, and a window takes "
                f"{self._volumes}; raise volumes.min_volumes to {self._volumes} to leave such runs "
                "out, or lower the model's `volumes`"
            )
        return (store.n_volumes - self._volumes) // self._time_patch + 1

    def read(self, run: str, start: int) -> Sample:
        store = self._store(run)
        return {
            "codes": store.window(start * self._time_patch, self._volumes),
            "repetition_time": np.array(store.attrs["repetition_time"], dtype=np.float32),
        }

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return stack_samples(samples)

    def _open(self, run: str) -> CodeStore:
        store = CodeStore(self._path_of(run))
        if code_facts(store.attrs) != self._codes:
            raise InputError(
                f"{store.path}: {_describe(code_facts(store.attrs))}, where the model reads "
                f"{_describe(self._codes)}; make the codes again with the settings that the model "
                "was trained with, or train it again"
            )
        return store


def _describe(codes: Mapping[str, Any]) -> str:
    made_by = codes["tokenizer"]
    return (
        f"{codes['n_tokens']} x {codes['code_width']} values by the tokenizer {made_by['kind']} "
        f"({made_by['sha256'][:12]}) of volumes of {codes['voxel_size']:g} mm scaled by "
        f"{codes['normalization']}"
    )


def read_codes(store: Path) -> dict[str, Any]:
    """What a store of codes tells of itself: `tokenizer`, `code_width`, `repetition_time`, ...

    Raises
    ------
    InputError
        When it cannot be read, or does not tell what made it.
    """
    try:
        attributes = dict(read_json(store / "zarr.json")["attributes"])
    except (OSError, KeyError) as error:
        raise InputError(f"{store}: not a readable store of codes ({error}); run codes") from None
    made_by = attributes.get("tokenizer")
    told = {"tokenizer", "normalization", "code_width", "n_tokens", "affine", "repetition_time"}
    if told - set(attributes) or not isinstance(made_by, dict) or set(IDENTITY) - set(made_by):
        raise InputError(
            f"{store}: does not tell which tokenizer made it; delete it and run codes again"
        )
    return attributes


def code_facts(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What a model has to know of the codes that it reads, of the attributes of a store; JSON-able.

    `n_tokens`, `code_width`, `voxel_size` in mm, `normalization`, and of the `tokenizer` what tells
    it apart from others.
    """
    return {
        "n_tokens": int(attributes["n_tokens"]),
        "code_width": int(attributes["code_width"]),
        "voxel_size": abs(float(attributes["affine"][0][0])),
        "normalization": attributes["normalization"],
        "tokenizer": {name: attributes["tokenizer"][name] for name in IDENTITY},
    }
