"""What the Zarr stores of the data stages have in common.

Values are stored as float16 with a linear code, which xarray undoes by itself (CF conventions,
`scale_factor` and `add_offset`). A store carries a key, the digest of what it was made from, so
that a stage can tell whether it has to be made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors
from zarr.core.chunk_key_encodings import ChunkKeyEncodingParams

from neuromamba.files import atomic_path

FLOAT16_MAX = 65504.0
READ_VOLUMES = 48
"""Volumes to read at a time, so that memory does not grow with the size of a shard."""
CHUNK_KEYS: ChunkKeyEncodingParams = {"name": "default", "separator": "."}
"""Chunks as files `c.0.1.2` beside each other. Zarr's own choice, `c/0/1/2`, makes a folder for
each axis, and quotas on scratch file systems count folders as files."""


@dataclass(frozen=True)
class Code:
    """How values are stored: value = stored * scale + offset."""

    scale: float
    offset: float

    def encode(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Original units -> stored units, still float32."""
        return (values - np.float32(self.offset)) * np.float32(1 / self.scale)

    def half_step(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Half the distance between neighbouring stored values, in original units."""
        stored = np.abs((values - self.offset) / self.scale).astype(np.float16)
        return np.spacing(stored).astype(np.float64) * self.scale / 2

    @property
    def attributes(self) -> dict[str, float]:
        """The code as CF attributes."""
        return {"scale_factor": self.scale, "add_offset": self.offset}


def create_values(
    group: zarr.Group,
    shape: tuple[int, ...],
    shard: int,
    names: tuple[str, ...],
    attributes: dict[str, Any],
) -> None:
    """Create `values` for `shards.ShardWriter`: float16, uncompressed, NaN where nothing is.

    A chunk is one place of the first axis, a file `shard` of them; `names` are those of the axes.
    """
    group.create_array(
        "values",
        shape=shape,
        chunks=(1, *shape[1:]),
        shards=(shard, *shape[1:]),
        dtype="float16",
        compressors=None,
        fill_value=np.nan,
        chunk_key_encoding=CHUNK_KEYS,
        dimension_names=names,
        attributes=attributes,
    )


def finished(store: Path, key: str) -> dict[str, Any] | None:
    """Attributes of a store that was made from the same inputs and settings, if there is one."""
    if not store.exists():
        return None
    try:
        attributes = dict(zarr.open_group(store, mode="r").attrs)
    except (OSError, ValueError, KeyError, zarr.errors.BaseZarrError):
        return None
    return attributes if attributes.get("key") == key else None


@contextmanager
def new_store(store: Path, key: str) -> Iterator[Path]:
    """Yield a temporary path for a store that is to be made, as `files.atomic_path` does.

    A store of the same key that another process has made meanwhile stays: one that was given up too
    early, on a lost node, must not take away what its successor's readers have open.
    """
    with atomic_path(store, keep=lambda: finished(store, key) is not None) as temporary:
        yield temporary


def get_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """An array of a store; `KeyError` when there is none of that name."""
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(f"{name} is not an array")
    return array


def add_array(
    group: zarr.Group, name: str, data: npt.NDArray[Any], dims: list[str], **attributes: Any
) -> None:
    """Write a small array as one uncompressed chunk with named dimensions."""
    array = group.create_array(
        name,
        shape=data.shape,
        chunks=data.shape,
        dtype=data.dtype,
        compressors=None,
        chunk_key_encoding=CHUNK_KEYS,
        dimension_names=dims,
        attributes=attributes,
    )
    array[...] = data


def finish(group: zarr.Group, attributes: dict[str, Any]) -> None:
    """Set a store's attributes and consolidate its metadata, without which xarray warns."""
    group.update_attributes(attributes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(group.store)
