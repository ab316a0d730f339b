"""Tokens: the patches of a run that hold brain, packed so that any window is one short read.

Design choices
--------------
- Which patches are kept is the run's own affair: it follows from the run's mask alone, so what a
  model says about a run cannot depend on the runs that share its batch.
- Values are uncompressed and a chunk is one time patch of all tokens: `TokenStore` finds chunks
  through the shard's index and reads their bytes straight into the output.
- Statistics lie beside the values, and normalisation happens at load.

Token order: x slowest, z fastest. Value order inside a token: (t, z, y, x), x fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors

import neuromamba
from neuromamba.config import Config, Tokens
from neuromamba.contents import Contents
from neuromamba.files import InputError, digest_json
from neuromamba.layout import Layout
from neuromamba.shards import ShardWriter
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.store import (
    READ_VOLUMES,
    add_array,
    create_values,
    finish,
    finished,
    get_array,
    new_store,
)


@dataclass(frozen=True)
class PatchIndex:
    """The brain patches of one run.

    Attributes
    ----------
    grid_index
        (token, 3) int16 number of the patch along x, y, z.
    center
        (token, 3) float32 centre of the patch along x, y, z; the grid spans [0, 1].
    voxels
        (token, patch**3) numbers of the patch's voxels in the volume, x fastest; in a patch
        too, x is fastest.
    patch_grid
        Patches along x, y, z.
    """

    grid_index: npt.NDArray[np.int16]
    center: npt.NDArray[np.float32]
    voxels: npt.NDArray[np.intp]
    patch_grid: tuple[int, int, int]


def index_patches(mask: npt.NDArray[np.bool_], patch: int, brain_fraction: float) -> PatchIndex:
    """Find the patches that count as brain.

    Parameters
    ----------
    mask
        (z, y, x) brain mask; `patch` divides each edge.
    patch
        Edge of a patch in voxels.
    brain_fraction
        Least share of brain voxels; 0 asks for one voxel.
    """
    grid = tuple(edge // patch for edge in mask.shape)
    blocks = mask.reshape(grid[0], patch, grid[1], patch, grid[2], patch)
    brain = blocks.sum(axis=(1, 3, 5)).T
    # Rounding up in whole voxels: 0.1 of 216 voxels is 22, whatever 0.1 is in binary.
    least = max(1, int(np.ceil(brain_fraction * patch**3 - 1e-9)))
    grid_index = np.argwhere(brain >= least)
    strides = np.array([1, mask.shape[2], mask.shape[2] * mask.shape[1]])
    z, y, x = np.indices((patch,) * 3).reshape(3, -1)
    inside = np.stack([x, y, z], axis=1) @ strides
    return PatchIndex(
        grid_index=grid_index.astype(np.int16),
        center=((grid_index + 0.5) / brain.shape).astype(np.float32),
        voxels=(grid_index * patch @ strides)[:, None] + inside,
        patch_grid=(brain.shape[0], brain.shape[1], brain.shape[2]),
    )


def run_tokens(config: Config, dataset: str, batch: int) -> None:
    """Make `tokens/{run}.zarr` for each run whose volumes the same batch made, and the manifest.

    Raises
    ------
    InputError
        When more runs than `compute.max_excluded` cannot be used, or the disk is full.
    """
    layout = Layout.of(config, dataset)
    runs = usable_runs([layout.manifest("volumes", batch)])
    manifest = layout.manifest("tokens", batch)
    contents = Contents(layout, "tokens", batch)

    def make(run: str) -> dict[str, Any]:
        source, target = layout.array("volumes", run), layout.array("tokens", run)
        facts = make_tokens(source, target, config.tokens, config.volumes.shard_volumes)
        return contents.add(run, facts)

    process_runs("tokens", runs, make, manifest, config.compute.max_excluded)


def make_tokens(source: Path, target: Path, tokens: Tokens, shard_volumes: int) -> dict[str, Any]:
    """Pack the brain tokens of one run's volumes, unless they are there already.

    Parameters
    ----------
    source
        The run's volumes.
    target
        Where the store goes; it appears there only when it is whole.
    tokens
        Patch size and brain rule.
    shard_volumes
        Volumes a file holds.

    Returns
    -------
    dict
        `key`, which tells what the store was made from, `n_tokens` and `n_time_patches`.

    Raises
    ------
    InputError
        When the volumes are unreadable, too short for one time patch, or no patch counts as brain.
    """
    try:
        volumes = zarr.open_group(source, mode="r")
        settings = [tokens.model_dump(mode="json"), shard_volumes]
        key = digest_json([code_of("tokens"), volumes.attrs["key"], *settings])
        attributes = finished(target, key)
        if attributes is None:
            attributes = _pack(volumes, target, tokens, shard_volumes, key)
    except (zarr.errors.BaseZarrError, FileNotFoundError, KeyError, ValueError, RuntimeError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(
            f"{source}: these volumes are damaged ({e}); delete them and make them again"
        ) from e
    return {name: attributes[name] for name in ("key", "n_tokens", "n_time_patches")}


def _pack(
    volumes: zarr.Group, target: Path, tokens: Tokens, shard_volumes: int, key: str
) -> dict[str, Any]:
    """Write the token store; return its attributes."""
    bold, mask = get_array(volumes, "bold"), np.asarray(get_array(volumes, "mask")[...])
    # zarr fills in for files that are missing, here and in `_rows`.
    if mask.sum() != volumes.attrs["n_voxels"]:
        raise ValueError("the brain mask is not the one that was written")
    patches = index_patches(mask, tokens.patch, tokens.brain_fraction)
    n_tokens, n_time_patches = len(patches.center), bold.shape[0] // tokens.time_patch
    run = volumes.attrs["run"]
    if not n_time_patches:
        raise InputError(f"{run}: has fewer volumes than tokens.time_patch = {tokens.time_patch}")
    if not n_tokens:
        raise InputError(
            f"{run}: no patch has a share of {tokens.brain_fraction:g} brain voxels; look at its "
            "brain mask, or lower tokens.brain_fraction"
        )
    attributes = {
        **volumes.attrs,
        **tokens.model_dump(mode="json"),
        "key": key,
        "volumes_key": volumes.attrs["key"],
        "patch_grid": list(patches.patch_grid),
        "n_tokens": n_tokens,
        "n_time_patches": n_time_patches,
        "neuromamba_version": neuromamba.__version__,
    }
    shape = (n_time_patches, n_tokens, tokens.time_patch * tokens.patch**3)
    with new_store(target, key) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        about = {
            "long_name": "BOLD signal, NaN outside the brain mask",
            "scale_factor": bold.attrs["scale_factor"],
            "add_offset": bold.attrs["add_offset"],
        }
        names = ("time_patch", "token", "value")
        create_values(group, shape, shard_volumes // tokens.time_patch, names, about)
        with ShardWriter(temporary / "values") as writer:
            for row in _rows(bold, patches, mask, tokens.time_patch):
                writer.append(row)
        _add_index(group, volumes, patches)
        finish(group, attributes)
    return attributes


def _rows(
    bold: zarr.Array[Any], patches: PatchIndex, mask: npt.NDArray[np.bool_], time_patch: int
) -> Iterator[npt.NDArray[np.float16]]:
    """Yield the tokens of each time patch, (1, token, value), in stored units."""
    step = max(READ_VOLUMES // time_patch, 1) * time_patch
    whole = bold.shape[0] // time_patch * time_patch
    witness = np.flatnonzero(mask)[0]
    for start in range(0, whole, step):
        volumes = np.asarray(bold[start : min(start + step, whole)])
        volumes = volumes.reshape(len(volumes), -1)
        # A brain voxel is NaN only where zarr has filled in.
        if np.isnan(volumes[:, witness]).any():
            raise ValueError(f"parts of volumes {start} and after are missing")
        for first in range(0, len(volumes), time_patch):
            tokens = [volume[patches.voxels] for volume in volumes[first : first + time_patch]]
            yield np.concatenate(tokens, axis=1)[None]


def _add_index(group: zarr.Group, volumes: zarr.Group, patches: PatchIndex) -> None:
    """Write where the tokens lie, and their voxels' statistics."""
    axes = {"axis_order": "x, y, z"}
    add_array(group, "center", patches.center, ["token", "axis"], **axes)
    add_array(group, "grid_index", patches.grid_index, ["token", "axis"], **axes)
    for name in ("mean", "sd"):
        values = np.asarray(get_array(volumes, name)[...]).ravel()[patches.voxels]
        add_array(group, name, values, ["token", "voxel"], long_name=f"{name} over time")
