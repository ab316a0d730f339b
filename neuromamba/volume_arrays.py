"""The arrays of a volumes store: the BOLD signal, the mask, the statistics and the coordinates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

from neuromamba.config import Volumes
from neuromamba.resample import Affine, Shape
from neuromamba.store import CHUNK_KEYS, Code, add_array


def create_bold(
    group: zarr.Group, n_volumes: int, volumes: Volumes, time_patch: int, code: Code
) -> None:
    """Create the array `bold` (time, z, y, x), one chunk a time patch, without values yet."""
    grid = volumes.shape[::-1]
    group.create_array(
        "bold",
        shape=(n_volumes, *grid),
        chunks=(time_patch, *grid),
        shards=(volumes.shard_volumes, *grid),
        dtype="float16",
        compressors=ZstdCodec(level=volumes.compression_level),
        fill_value=np.nan,
        chunk_key_encoding=CHUNK_KEYS,
        dimension_names=["time", "z", "y", "x"],
        attributes={"long_name": "BOLD signal, NaN outside the brain mask", **code.attributes},
    )


def add_maps(
    group: zarr.Group,
    shape: Shape,
    affine: Affine,
    voxels: npt.NDArray[np.intp],
    statistics: dict[str, npt.NDArray[np.float64]],
    times: npt.NDArray[np.float64],
) -> None:
    """Write the mask, the statistics and the coordinates.

    Parameters
    ----------
    group
        The store.
    shape, affine
        Its grid: voxels along x, y, z, and (4, 4) indices to mm.
    voxels
        (voxel,) numbers of the mask's voxels, x fastest.
    statistics
        (voxel,) values over time by name.
    times
        (volume,) seconds.
    """
    space = ["z", "y", "x"]
    grid = shape[::-1]
    mask = np.zeros(np.prod(grid), dtype=bool)
    mask[voxels] = True
    add_array(group, "mask", mask.reshape(grid), space, long_name="brain mask")
    for name, values in statistics.items():
        volume = np.full(mask.shape, np.nan, dtype=np.float32)
        volume[voxels] = values
        add_array(group, name, volume.reshape(grid), space, long_name=f"{name} over time")
    for axis, name in enumerate("xyz"):
        mm = affine[axis, 3] + affine[axis, axis] * np.arange(shape[axis])
        add_array(group, name, mm, [name], units="mm")
    add_array(group, "time", times, ["time"], units="s")
