"""Codes: the volumes of a run as 27 tokens each, made by a frozen 2D autoencoder of slices.

Design choices
--------------
- How a volume becomes slices, and codes become tokens, is told in `slices`; by which autoencoder in
  `slice_encoders`.
- A run is streamed: some volumes are read and normalised while others are encoded, so memory does
  not grow with the length of a run.
- Slices without brain are the same image in every volume. They are encoded once, by themselves.
- Codes by a tokenizer that was trained on a fold's training subjects are that fold's own, so that
  no test subject's scan has shaped them. Those of published weights serve all folds.
- Values are float16, uncompressed, one chunk a volume, so that a window is one short read
  (`shards.ShardedArray`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from tqdm import tqdm

import neuromamba
from neuromamba.config import Codes, Config
from neuromamba.contents import Contents
from neuromamba.files import InputError, digest_json
from neuromamba.layout import Layout
from neuromamba.prefetch import prefetch
from neuromamba.shards import ShardWriter
from neuromamba.slice_encoders import SliceEncoder, open_encoder
from neuromamba.slices import N_TOKENS, Floats, RunVolumes, encode_volumes
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.store import FLOAT16_MAX, create_values, finish, finished, new_store

AT_A_TIME = 8
"""Volumes that are read, normalised and cut together: some 100 MB at 96 voxels an edge."""
MANIFEST_FACTS = ("key", "n_volumes", "n_tokens", "code_width", "n_slices", "n_empty_slices")


def run_codes(config: Config, dataset: str, batch: int) -> None:
    """Make `codes/{run}.zarr` for each run whose volumes the same batch made, and the manifest.

    `config` is in a fold where the tokenizer is that fold's; the folder then has its name.

    Raises
    ------
    InputError
        When the tokenizer cannot be used, more runs than `compute.max_excluded` cannot be used, or
        the disk is full.
    """
    layout = Layout.of(config, dataset)
    runs = usable_runs([layout.manifest("volumes", batch)])
    encoder = open_encoder(config, dataset)
    contents = Contents(layout, "codes", batch)

    def make(run: str) -> dict[str, Any]:
        source, target = layout.array("volumes", run), layout.array("codes", run)
        facts = make_codes(source, target, encoder, config.codes, config.volumes.shard_volumes)
        return contents.add(run, facts)

    manifest = layout.manifest("codes", batch)
    process_runs("codes", runs, make, manifest, config.compute.max_excluded)


def make_codes(
    source: Path, target: Path, encoder: SliceEncoder, codes: Codes, shard_volumes: int
) -> dict[str, Any]:
    """Encode one run's volumes, unless that is done already.

    Parameters
    ----------
    source
        The run's volumes.
    target
        Where the store goes; it appears there only when it is whole.
    encoder
        The frozen autoencoder.
    codes
        Normalisation and precision.
    shard_volumes
        Volumes a file holds.

    Returns
    -------
    dict
        `key`, which tells what the store was made from; `n_volumes`, `n_tokens`, `code_width`; and
        of a volume `n_slices` and how many of them were not encoded, `n_empty_slices`.

    Raises
    ------
    InputError
        When the volumes are unreadable, on a grid of another edge than the encoder reads, or
        without a value above 0 to scale by; or when a code is not finite or too large for float16.
    """
    volumes = RunVolumes(source, codes.normalization)
    if volumes.edge != encoder.edge:
        raise InputError(
            f"{source}: has {volumes.edge} voxels an edge, and the tokenizer reads slices of "
            f"{encoder.edge}; make the volumes again"
        )
    settings = [codes.normalization, codes.precision, shard_volumes]
    key = digest_json([code_of("codes"), volumes.attrs["key"], encoder.digest, *settings])
    attributes = finished(target, key)
    if attributes is None:
        attributes = _write(volumes, target, encoder, codes.normalization, shard_volumes, key)
    return {name: attributes[name] for name in MANIFEST_FACTS}


def _write(
    volumes: RunVolumes,
    target: Path,
    encoder: SliceEncoder,
    normalization: str,
    shard_volumes: int,
    key: str,
) -> dict[str, Any]:
    """Write the store of codes; return its attributes."""
    width = volumes.edge * encoder.channels
    attributes = {
        **volumes.attrs,
        "key": key,
        "volumes_key": volumes.attrs["key"],
        "n_volumes": volumes.n_volumes,
        "n_tokens": N_TOKENS,
        "code_width": width,
        "n_slices": volumes.n_slices,
        "n_empty_slices": volumes.n_empty,
        "normalization": normalization,
        "precision": str(encoder.dtype).removeprefix("torch."),
        "tokenizer": encoder.facts,
        "neuromamba_version": neuromamba.__version__,
    }
    shape = (volumes.n_volumes, N_TOKENS, width)
    with new_store(target, key) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        about = {"long_name": "codes of slices along x, y and z"}
        create_values(group, shape, shard_volumes, ("time", "token", "value"), about)
        with ShardWriter(temporary / "values") as writer:
            for row in _rows(volumes, encoder):
                writer.append(row)
        finish(group, attributes)
    return attributes


def _rows(volumes: RunVolumes, encoder: SliceEncoder) -> Iterator[npt.NDArray[np.float16]]:
    """Yield the tokens of each volume, (1, token, value)."""
    n = volumes.n_volumes

    def read(start: int) -> Floats:
        return volumes.normalized(start, min(start + AT_A_TIME, n))

    with tqdm(None, volumes.run, n, unit="vol", leave=False, delay=2.0, mininterval=1.0) as bar:
        for block in prefetch(map(read, range(0, n, AT_A_TIME)), 1):
            tokens = encode_volumes(block, volumes.places, encoder.encode, encoder.empty)
            if not np.abs(tokens).max() < FLOAT16_MAX:
                raise InputError(
                    f"{volumes.run}: from volume {bar.n} on (counted from 0) a code is not "
                    f"finite or over {FLOAT16_MAX:g}; look for artefacts, or set codes.precision "
                    "to float32"
                )
            for row in tokens.astype(np.float16):
                yield row[None]
            bar.update(len(block))
