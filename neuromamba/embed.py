"""Embeddings of runs by a pretrained or fine-tuned model, to work with elsewhere.

Design choices
--------------
- A run's embedding is the mean over evenly spaced windows of it; a subject's is the mean over its
  runs. The windows of a run are embedded apart from all other runs, so an embedding is the same to
  the bit whatever else is embedded.
- Tables are TSV, or NPZ, which needs no parsing. Tokens are one Zarr store a run, with their places
  in the grid, so that they can be put back in space.
- Any run with tokens can be embedded, those that the model has learnt from among them: which these
  are says `splits/holdout.tsv`, and whoever trains on embeddings should heed it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import zarr
from torch import Tensor, nn
from tqdm import tqdm

import neuromamba
from neuromamba.batches import Batch, Window, Windows, group_runs, list_runs, make_readers
from neuromamba.config import Config, Model, Tokens, Volumes
from neuromamba.files import InputError, atomic_path, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.pretrained import (
    WEIGHTS,
    from_pretrained,
    open_finetuned,
    open_pretrained,
    refuse_other_grid,
    refuse_other_regions,
)
from neuromamba.runtime import choose_device
from neuromamba.scalars import to_device
from neuromamba.store import add_array, finish, finished
from neuromamba.tables import read_table, write_table
from neuromamba.token_store import TokenStore

Level = Literal["token", "run", "subject"]
Floats = npt.NDArray[np.float64]

FORMAT = 1
"""Raised when the same run would give another store, so that old ones are made again."""

WINDOWS = 8
"""Windows of a run where none are asked for (our choice)."""

BATCH_SIZE = 4
"""Windows a forward pass."""

COPIED = ("run", "subject", "space", "affine", "patch", "patch_grid")
"""Attributes of a token store that the store of its embedding keeps."""


@dataclass(frozen=True)
class Embedder:
    """A model and what it reads.

    Attributes
    ----------
    network
        Has `embed`, and for the level `token` `encode`.
    model, tokens, volumes
        Sections of the config that it was trained under.
    weights
        Digest of its weights.
    regions
        Those of a model of ROI series; see `neuromamba.pretrain.regions_of`.
    """

    network: nn.Module
    model: Model
    tokens: Tokens
    volumes: Volumes
    weights: str
    regions: Mapping[str, Any] | None = None


def open_embedder(
    config: Config, dataset: str, model: str, seed: int, target: str | None = None
) -> Embedder:
    """A model of this run on the configured device: pretrained, or fine-tuned for a target.

    Raises
    ------
    InputError
        When there is no such model, or its settings are not those of the config.
    """
    if target is None:
        network, info = open_pretrained(config, dataset, model, seed)
    else:
        network, info = open_finetuned(config, dataset, model, seed, target)
    network.to(choose_device(config.compute.device))
    weights, regions = info["files"][WEIGHTS], info["settings"].get("regions")
    return Embedder(network, config.models[model], config.tokens, config.volumes, weights, regions)


def open_shared(config: Config, folder: Path) -> Embedder:
    """The model in a folder that `neuromamba export` wrote, on the configured device."""
    if not folder.is_dir():
        raise InputError(f"--weights: there is no folder {folder}")
    shared = from_pretrained(folder, compute=config.compute)
    shared.network.to(choose_device(config.compute.device))
    weights = digest_file(folder / WEIGHTS)
    return Embedder(
        shared.network, shared.model, shared.tokens, shared.volumes, weights, shared.regions
    )


def run_embed(
    config: Config,
    dataset: str,
    embedder: Embedder,
    level: Level,
    output: Path,
    runs: Sequence[str] | None = None,
    subjects: Sequence[str] | None = None,
    count: int = WINDOWS,
) -> None:
    """Write embeddings of a dataset's runs.

    Parameters
    ----------
    level
        `run` or `subject`: `output` becomes a table with a row for each, see `write_embeddings`.
        `token`: `output` is a folder, in which each run gets a store, see `embed_tokens`.
    runs, subjects
        Which to embed; by default every run that has tokens.
    count
        Windows of each run, evenly spaced.

    Raises
    ------
    InputError
        When `count` is below 1, a run or subject is unknown, the tokens are not cut as the model
        needs them, or more than `compute.max_excluded` of the runs are too short.
    """
    if count < 1:
        raise InputError(f"--windows {count}: a run is embedded by at least 1 window")
    if level != "token" and output.suffix not in (".tsv", ".npz"):
        raise InputError(f"--output {output}: a table of {level}s is named *.tsv or *.npz")
    if level == "token" and not hasattr(embedder.network, "encode"):
        raise InputError(f"a model of family {embedder.model.family} does not embed tokens")
    layout = Layout.of(config, dataset)
    table = choose_runs(config, dataset, embedder.model.needs, runs, subjects)
    for run in table["run"]:
        if "tokens" in embedder.model.needs:
            store = TokenStore(layout.array("tokens", run))
            refuse_other_grid(store, embedder.tokens, embedder.volumes)
        elif "rois" in embedder.model.arrays:
            refuse_other_regions(layout.array("rois", run), embedder.regions)
    readers = make_readers(embedder.network, layout, embedder.model, embedder.tokens)
    windows = Windows(group_runs(table), readers, config.compute.max_excluded)
    for run, reason in windows.left_out.items():
        tqdm.write(f"{run} is left out: {reason}", file=sys.stderr)
    spaced = windows.spaced(count)
    of_runs = [list(of_run) for _, of_run in groupby(spaced, key=lambda window: window.run)]
    bar = tqdm(of_runs, desc="embed", unit="run", mininterval=1.0)
    if level == "token":
        for of_run in bar:
            embed_tokens(embedder, windows, of_run, layout, output)
    else:
        rows, values = embed_runs(embedder, windows, bar)
        if level == "subject":
            rows, values = mean_of_runs(rows, values)
        write_embeddings(output, rows, values)


def choose_runs(
    config: Config,
    dataset: str,
    needs: Sequence[str],
    runs: Sequence[str] | None,
    subjects: Sequence[str] | None,
) -> pd.DataFrame:
    """The runs asked for, with what a model `needs`: the manifests' rows with a column `subject`.

    Raises
    ------
    InputError
        Naming runs and subjects that there are not.
    """
    layout = Layout.of(config, dataset)
    everybody = read_table(layout.index, dtype=str)["subject"].unique()
    table = list_runs(config, dataset, everybody, needs)
    for column, names in (("run", runs), ("subject", subjects)):
        if names is not None:
            unknown = sorted(set(names) - set(table[column]))
            if unknown:
                raise InputError(
                    f"--{column}s: {', '.join(unknown[:5])} has no {' and '.join(needs)} in "
                    f"{dataset}; see {layout.index} and {layout.excluded}"
                )
            table = table[table[column].isin(set(names))]
    return table


@torch.no_grad()
def mean_of_windows(
    encode: Callable[[Batch], Tensor], windows: Windows, of_run: Sequence[Window]
) -> Floats:
    """The mean over windows of one run of what `encode` gives for a batch, windows first."""
    parts = [encode(batch).double() for batch in windows.batches(of_run, BATCH_SIZE)]
    return torch.cat(parts).mean(0).cpu().numpy()


def embed_runs(
    embedder: Embedder, windows: Windows, of_runs: Iterable[Sequence[Window]]
) -> tuple[pd.DataFrame, Floats]:
    """The embedding of each run: rows `run`, `subject`, `windows`, and (row, width) values."""
    network = embedder.network
    device = next(network.parameters()).device

    def encode(batch: Batch) -> Tensor:
        return network.embed(to_device(batch, device))  # type: ignore[operator]

    rows, values = [], []
    for of_run in of_runs:
        rows.append((of_run[0].run, of_run[0].subject, len(of_run)))
        values.append(mean_of_windows(encode, windows, of_run))
    return pd.DataFrame(rows, columns=["run", "subject", "windows"]), np.stack(values)


def mean_of_runs(rows: pd.DataFrame, values: Floats) -> tuple[pd.DataFrame, Floats]:
    """The embedding of each subject: rows `subject`, `runs`, and (row, width) values."""
    of_subjects = {str(name): places for name, places in rows.groupby("subject").indices.items()}
    names = sorted(of_subjects)
    table = pd.DataFrame({"subject": names, "runs": [len(of_subjects[name]) for name in names]})
    return table, np.stack([values[of_subjects[name]].mean(0) for name in names])


def write_embeddings(path: Path, rows: pd.DataFrame, values: Floats) -> None:
    """Write embeddings as float32, with the columns of `rows` beside them.

    A TSV gets the columns `e0`, `e1`, ...; an NPZ an array for each column, and `embedding`
    (row, width).
    """
    embedding = values.astype(np.float32)
    if path.suffix == ".tsv":
        columns = [f"e{k}" for k in range(embedding.shape[1])]
        write_table(path, pd.concat([rows, pd.DataFrame(embedding, columns=columns)], axis=1))
        return
    # Text as an array of its own kind: as objects it would be pickled.
    arrays: dict[str, Any] = {
        str(name): np.array(column.tolist())  # numbers, or text of fixed width
        for name, column in rows.items()
    }
    with atomic_path(path) as temporary:
        np.savez(temporary, embedding=embedding, **arrays)


def embed_tokens(
    embedder: Embedder, windows: Windows, of_run: Sequence[Window], layout: Layout, output: Path
) -> None:
    """Write the embedding of one run's tokens to `output/{run}.zarr`, unless it is there.

    The store holds `embedding` (token, channel) float32, the mean of the hidden states over time
    and windows, and `grid_index` and `center` as in the run's token store: the patch's number, and
    its centre in [0, 1], along x, y, z. `xarray.open_zarr` reads it.
    """
    run, network = of_run[0].run, embedder.network
    store, target = TokenStore(layout.array("tokens", run)), output / f"{run}.zarr"
    starts = [window.start for window in of_run]
    key = digest_json([FORMAT, embedder.weights, store.attrs["key"], starts])
    if finished(target, key) is not None:
        return
    device = next(network.parameters()).device

    def encode(batch: Batch) -> Tensor:
        h_NTC = network.encode(to_device(batch, device))  # type: ignore[operator]
        return h_NTC.mean(1).unflatten(0, (len(batch["run"]), -1))

    embedding = mean_of_windows(encode, windows, of_run).astype(np.float32)
    attributes = {
        **{name: store.attrs[name] for name in COPIED},
        "key": key,
        "weights": embedder.weights,
        "windows": starts,
        "neuromamba_version": neuromamba.__version__,
    }
    with atomic_path(target) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        add_array(group, "embedding", embedding, ["token", "channel"])
        for name in ("grid_index", "center"):
            values = getattr(store, name)
            add_array(group, name, values, ["token", "axis"], axis_order="x, y, z")
        finish(group, attributes)
