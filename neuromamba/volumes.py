"""Volumes: every run on one grid in MNI space, as a sharded Zarr store that xarray opens.

Design choices
--------------
- The grid's centre is a constant of this module and the affine does the rest: fMRIPrep's and FSL's
  grids start half a millimetre apart, so hard-coded crops would be wrong for one of them.
- The data is written once, as float16 in units of the brain's spatial SD (a linear code that
  xarray undoes); normalisation is stored as statistics beside it and applied at load.
- One chunk holds one time patch, one shard is one file and is written whole.
- A voxel that does not vary by at least half a step of the stored precision carries no signal; it
  leaves the brain mask. Which ones is known only at the end: they are guessed from the first
  volumes, and where the guess was wrong the run is streamed once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

import neuromamba
from neuromamba.brain import BrainStream
from neuromamba.config import Config, Volumes
from neuromamba.contents import Contents
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.moments import Floats, Moments
from neuromamba.nifti import read_header
from neuromamba.prefetch import prefetch
from neuromamba.shards import ShardWriter
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.store import CHUNK_KEYS, FLOAT16_MAX, Code, add_array, finish, finished, new_store
from neuromamba.tables import read_table

CENTRE_MM = (0.5, -17.5, 4.5)
"""Centre of the field of view, MNI mm. The brain of MNI152NLin2009cAsym (2 mm mask: x -72.5..71.5,
y -108.5..71.5, z -72.5..81.5) lies inside 96 voxels of 2 mm with at least 2 to spare on each side,
and the grid falls on that of fMRIPrep's `res-2`, whose values are therefore copied unchanged."""
MANIFEST_FACTS = ("key", "n_volumes", "n_voxels", "n_constant_voxels")
CHUNKS_AHEAD = 4
"""Chunks made before they are compressed, which is in another thread."""
PROBE_VOLUMES = 10
"""Volumes that the storage scale and the guess of the constant voxels come from."""


@dataclass(frozen=True)
class Source:
    """One run's files and facts, as the index lists them; `fingerprint` tells their content."""

    run: str
    subject: str
    bold: Path
    mask: Path
    space: str
    repetition_time: float
    fingerprint: str


def target_affine(volumes: Volumes) -> npt.NDArray[np.float64]:
    """Affine of the target grid: (4, 4), voxel indices (x, y, z) to MNI mm, axes to R, A, S."""
    affine = np.diag([volumes.voxel_size] * 3 + [1.0])
    affine[:3, 3] = CENTRE_MM - volumes.voxel_size * (np.array(volumes.shape) - 1) / 2
    return affine


def run_volumes(config: Config, dataset: str, batch: int) -> None:
    """Make `volumes/{run}.zarr` for each usable run of a batch, and the batch's manifest.

    Raises
    ------
    InputError
        When more runs than `compute.max_excluded` cannot be used, or the disk is full.
    """
    layout = Layout.of(config, dataset)
    part = layout.manifest("index", batch)
    index, runs = read_table(part, dtype=str).set_index("run"), usable_runs([part])
    manifest = layout.manifest("volumes", batch)
    contents = Contents(layout, "volumes", batch)

    def make(run: str) -> dict[str, Any]:
        row = index.loc[run].to_dict()
        source = Source(
            run=run,
            subject=row["subject"],
            bold=Path(row["bold"]),
            mask=Path(row["mask"]),
            space=config.datasets[dataset].space,
            repetition_time=float(row["repetition_time"]),
            fingerprint=row["fingerprint"],
        )
        target = layout.array("volumes", run)
        facts = make_volumes(source, target, config.volumes, config.tokens.time_patch)
        return contents.add(run, facts)

    process_runs("volumes", runs, make, manifest, config.compute.max_excluded)


def make_volumes(source: Source, target: Path, volumes: Volumes, time_patch: int) -> dict[str, Any]:
    """Resample one run to the grid and write its store, unless it is there already.

    Parameters
    ----------
    source
        The run.
    target
        Where the store goes; it appears there only when it is whole.
    volumes
        Grid and storage.
    time_patch
        Volumes in a chunk.

    Returns
    -------
    dict
        `key`, which tells what the store was made from, `n_volumes`, `n_voxels` (in the brain
        mask) and `n_constant_voxels` (left out of it).

    Raises
    ------
    InputError
        When the run cannot be used: unreadable, truncated or 3D; too few volumes; NaN in the
        brain; a mask that is empty or on another grid; no voxel that varies.
    """
    header = read_header(source.bold)
    if not header.is_series:
        raise InputError(f"{source.bold}: is 3D; a BOLD run has a time axis")
    if header.n_volumes < volumes.min_volumes:
        raise InputError(
            f"{source.bold}: has {header.n_volumes} volumes, fewer than volumes.min_volumes = "
            f"{volumes.min_volumes}; lower that setting if the run is to be used"
        )
    facts: dict[str, Any] = {
        "run": source.run,
        "subject": source.subject,
        "space": source.space,
        "repetition_time": source.repetition_time,
        "fingerprint": source.fingerprint,
    }
    # Where the files lie is not part of the key: a dataset may be moved.
    settings = [volumes.model_dump(mode="json"), time_patch]
    key = digest_json([code_of("volumes"), facts, *settings])
    attributes = finished(target, key)
    if attributes is None:
        stream = BrainStream(header, source.mask, volumes.shape, target_affine(volumes))
        facts |= {
            "key": key,
            "source": str(source.bold),
            "source_sha256": digest_file(source.bold),
            "mask_source": str(source.mask),
            "mask_sha256": digest_file(source.mask),
        }
        attributes = _convert(stream, target, facts, volumes, time_patch)
    return {name: attributes[name] for name in MANIFEST_FACTS}


def _convert(
    stream: BrainStream, target: Path, facts: dict[str, Any], volumes: Volumes, time_patch: int
) -> dict[str, Any]:
    """Stream a run into a store at `target`; return the store's attributes."""
    code, constant = _probe(stream)
    with new_store(target, facts["key"]) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        _create_bold(group, stream.header.n_volumes, volumes, time_patch, code)
        while True:
            moments = Moments()
            chunks = _chunks(stream, code, constant, (time_patch, *volumes.shape[::-1]), moments)
            with ShardWriter(temporary / "bold") as writer:
                for chunk in prefetch(chunks, CHUNKS_AHEAD):
                    writer.append(chunk)
            found = _constant(moments, code)
            if found.all():
                raise InputError(
                    f"{stream.header.path}: no voxel of the brain mask varies over time; "
                    "preprocess the run again, or leave it out"
                )
            if (found == constant).all():
                break
            constant = found
        voxels = stream.voxels[~constant]
        mean, sd = moments.mean()[~constant], moments.sd()[~constant]
        _add_maps(group, voxels, mean, sd, volumes, facts["repetition_time"], moments.n)
        attributes = facts | {
            "affine": target_affine(volumes).tolist(),
            "interpolation": "linear",
            "global_mean": float(mean.mean()),
            "global_sd": float(np.sqrt(np.mean(sd**2) + np.var(mean))),
            "n_volumes": moments.n,
            "n_voxels": len(voxels),
            "n_constant_voxels": int(constant.sum()),
            "neuromamba_version": neuromamba.__version__,
        }
        finish(group, attributes)
    return attributes


def _probe(stream: BrainStream) -> tuple[Code, npt.NDArray[np.bool_]]:
    """Storage code and likely constant voxels, from the first volumes of a run."""
    volumes: list[Floats] = []
    for block in stream.blocks(ahead=0):
        volumes.append(block)
        if sum(map(len, volumes)) >= PROBE_VOLUMES:
            break
    first = np.concatenate(volumes)[:PROBE_VOLUMES]
    sd = float(first.std(dtype=np.float64))
    code = Code(scale=sd or 1.0, offset=float(first.mean(dtype=np.float64)))
    moments = Moments()
    moments.add(first)
    return code, moments.sd() == 0


def _constant(moments: Moments, code: Code) -> npt.NDArray[np.bool_]:
    return np.asarray(moments.sd() <= code.half_step(moments.mean()))


def _create_bold(
    group: zarr.Group, n_volumes: int, volumes: Volumes, time_patch: int, code: Code
) -> None:
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


def _chunks(
    stream: BrainStream,
    code: Code,
    left_out: npt.NDArray[np.bool_],
    chunk_shape: tuple[int, ...],
    moments: Moments,
) -> Iterator[npt.NDArray[np.float16]]:
    """Yield a run in chunks of `chunk_shape` (t, z, y, x); put all voxels into `moments`."""
    empty = np.full(chunk_shape, np.nan, dtype=np.float16)
    chunk, filled = empty.copy(), 0
    for values in stream.blocks():
        stored = _encode(values, code, left_out, stream.header.path, moments.n)
        moments.add(values)
        for volume in stored:
            chunk[filled].reshape(-1)[stream.voxels] = volume
            filled += 1
            if filled == len(chunk):
                yield chunk
                chunk, filled = empty.copy(), 0
    if filled:
        yield chunk


def _encode(
    values: Floats, code: Code, left_out: npt.NDArray[np.bool_], path: Path, first: int
) -> npt.NDArray[np.float16]:
    stored = code.encode(values)
    if not max(stored.max(), -stored.min()) < FLOAT16_MAX:
        raise InputError(
            f"{path}: from volume {first} on (counted from 0) there are values over "
            f"{FLOAT16_MAX:g} times the brain's SD from its mean; look for artefacts"
        )
    stored[:, left_out] = np.nan
    return stored.astype(np.float16)


def _add_maps(
    group: zarr.Group,
    voxels: npt.NDArray[np.intp],
    mean: npt.NDArray[np.float64],
    sd: npt.NDArray[np.float64],
    volumes: Volumes,
    repetition_time: float,
    n_volumes: int,
) -> None:
    """Write the mask, the statistics and the coordinates."""
    space = ["z", "y", "x"]
    grid = volumes.shape[::-1]
    mask = np.zeros(np.prod(grid), dtype=bool)
    mask[voxels] = True
    add_array(group, "mask", mask.reshape(grid), space, long_name="brain mask")
    for name, values in (("mean", mean), ("sd", sd)):
        volume = np.full(mask.shape, np.nan, dtype=np.float32)
        volume[voxels] = values
        add_array(group, name, volume.reshape(grid), space, long_name=f"{name} over time")
    affine = target_affine(volumes)
    for axis, name in enumerate("xyz"):
        mm = affine[axis, 3] + affine[axis, axis] * np.arange(volumes.shape[axis])
        add_array(group, name, mm, [name], units="mm")
    add_array(group, "time", np.arange(n_volumes) * repetition_time, ["time"], units="s")
