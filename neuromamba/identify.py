"""Tell the test subjects apart: is a scan more like another one of the same brain than of others?

Design choices
--------------
- **Anatomy identifies too.** A model that reads voxels knows a brain by its shape and brightness,
  so that its embedding may tell everybody apart and say nothing of function. Beside the embedding
  (`model`) and the FC of the same volumes (`fc`, Finn et al. 2015) the table has therefore what
  needs no signal over time: `model-still`, the embedding of windows in which every volume is the
  window's mean; `mean-image`, the mean of each ROI; and `brain-shape`, which patches of the grid
  are brain. The model tells of function only by what it identifies beyond them. FC has no
  brightness in it, but it has how well an atlas fits a brain.
- Two runs of a subject are harder than the two halves of one, which have session, head position and
  brain mask in common: `brain-shape` is then perfect but for subjects of the same shape. Where
  subjects differ in what they have, `identify.tsv` has each kind of pair for itself too.
- Repetition time, length and scanner are in what is compared, as they are in scans. Subjects of
  several sites are told apart the more easily for that, by every predictor.
- FC and mean image are of the volumes that lie in the model's windows, and of no other.
- Similarities are written first, and everything after is computed from them: see
  `neuromamba.identification` for the measures, `neuromamba.occasions` for what is compared.
- Only subjects of the test part are compared, and a model that has seen one of them is refused, as
  in the evaluation.

Features lie in an unnamed file on disk and are compared block by block; what memory holds grows
with the square of the subjects, of whom there are at most `SUBJECTS`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import xarray
from torch import Tensor, nn
from tqdm import tqdm

from neuromamba.batches import Batch, Window, Windows
from neuromamba.config import Config, RoiModel
from neuromamba.connectivity import connectivity
from neuromamba.embed import mean_of_windows
from neuromamba.evaluate import find_seen
from neuromamba.files import InputError, atomic_path, write_json
from neuromamba.identification import identify, similarity
from neuromamba.identify_figure import draw_identification
from neuromamba.layout import Layout
from neuromamba.occasions import (
    GAP,
    KINDS,
    WINDOWS,
    Occasion,
    Pair,
    choose_pairs,
    open_test_runs,
    seen_volumes,
    share_read,
    tabulate_pairs,
)
from neuromamba.pretrained import open_pretrained
from neuromamba.record import provenance
from neuromamba.roi_windows import read_regions
from neuromamba.runtime import choose_device
from neuromamba.scalars import to_device
from neuromamba.spacing import some_of
from neuromamba.splits import read_split
from neuromamba.tables import read_table, write_table
from neuromamba.token_store import TokenStore

SUBJECTS = 2000
"""Largest number of subjects; of more, so many are taken evenly."""

Features = Mapping[str, npt.NDArray[np.floating]]
"""Of one occasion, the features of each predictor."""


def run_identify(config: Config, dataset: str, model: str, seed: int) -> None:
    """Write `pairs.tsv`, `similarity.npz`, `identify.tsv`, `identify.svg`, then `identify.json`.

    `pairs.tsv` has one row for each subject, in volumes; `similarity.npz` has (subject, subject)
    float64 for each predictor, first occasions in the rows, and `subject`; `identify.tsv` one row
    for each predictor (and kind of pair), see `identification.identify`.

    Raises
    ------
    InputError
        When there is no pretrained model of these settings, or it has seen a test subject; when
        fewer than two subjects have two occasions.
    """
    layout, time_patch = Layout.of(config, dataset), config.tokens.time_patch
    folder, volumes = layout.identify(model, seed), config.models[model].volumes
    if not config.models[model].identifies:
        raise InputError(
            f"models.{model} (family {config.models[model].family}) reads whole runs and T1w "
            "images, and subjects are identified by parts of runs: take a model that reads windows"
        )
    network, info = open_pretrained(config, dataset, model, seed)
    split = read_split(layout.split)
    test = some_of(split["test"], SUBJECTS)
    seen = find_seen(config, dataset, info, test)
    network.to(choose_device(config.compute.device)).eval()
    windows, left_out = open_test_runs(config, dataset, model, network, test)
    length = volumes // time_patch
    section = config.models[model]
    seconds_apart = section.repetition_time if isinstance(section, RoiModel) else None
    pairs, reasons = choose_pairs(config, dataset, windows, length, test, seconds_apart)

    def describe(subject: str, occasion: Occasion) -> Features:
        starts = occasion.starts(length)
        of_run = [Window(subject, occasion.run, start) for start in starts]
        rois = layout.array("rois", occasion.run)
        pace = seconds_apart / read_regions(rois)["repetition_time"] if seconds_apart else 1.0
        shape: Features = {}
        if "tokens" in section.needs:
            shape = {"brain-shape": brain_shape(TokenStore(layout.array("tokens", occasion.run)))}
        return {
            **by_model(network, windows, of_run, time_patch),
            **by_rois(rois, seen_volumes(starts, volumes, time_patch, pace)),
            **shape,
        }

    started = time.perf_counter()
    compare_occasions(folder, pairs, describe)
    write_table(folder / "pairs.tsv", tabulate_pairs(pairs, time_patch))
    summarize(folder, config, model)
    seconds = time.perf_counter() - started
    facts = {
        "dataset": dataset,
        "model": model,
        "seed": seed,
        "weights": info["files"]["model.safetensors"],
        "gap_seconds": GAP,
        "most_windows": WINDOWS,
        "most_subjects": SUBJECTS,
        "n_test_subjects": len(split["test"]),
        "n_subjects": len(pairs),
        "n_pairs": pd.Series([pair.kind for pair in pairs]).value_counts().to_dict(),
        "share_of_volumes": share_read(pairs, length),
        "left_out": left_out,
        "subjects_left_out": reasons,
        "seen_subjects": seen,
        "seconds": seconds,
        **provenance(),
    }
    write_json(folder / "identify.json", facts)
    told = f"{len(pairs)} test subjects compared in {seconds:.0f} s"
    tqdm.write(f"{dataset}, {model}: {told}", file=sys.stderr)


def by_model(
    network: nn.Module, windows: Windows, of_run: Sequence[Window], time_patch: int
) -> Features:
    """The mean embedding of windows, and of still ones where the model reads whole volumes."""
    device = next(network.parameters()).device

    def encode(batch: Batch) -> Tensor:
        batch = to_device(batch, device)
        whole = "tokens" in batch or "codes" in batch
        parts = [batch, still(batch, time_patch)] if whole else [batch]
        return torch.stack([network.embed(part) for part in parts], 1)  # type: ignore[operator]

    found = mean_of_windows(encode, windows, of_run)
    return dict(zip(("model", "model-still"), found, strict=False))


def still(batch: Batch, time_patch: int) -> Batch:
    """The batch with each volume, or its codes, replaced by the mean one of its window."""
    if "codes" in batch:
        codes = batch["codes"]
        return {**batch, "codes": codes.mean(1, keepdim=True).expand_as(codes).contiguous()}
    tokens = batch["tokens"]
    mean = tokens.unflatten(-1, (time_patch, -1)).mean((1, 2))
    return {**batch, "tokens": mean.repeat(1, time_patch)[:, None].expand_as(tokens).contiguous()}


def by_rois(store: Path, volumes: npt.NDArray[np.intp]) -> Features:
    """Pearson FC (pairs of ROIs) and means (ROIs) of some volumes; NaN where a ROI is missing."""
    try:
        with xarray.open_zarr(store, chunks=None) as rois:
            series = rois["timeseries"].values[volumes]
    except (FileNotFoundError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"{store}: not the ROI series of this run ({error}); run rois") from None
    pairs = np.triu_indices(series.shape[1], k=1)
    return {"fc": connectivity(series)[pairs], "mean-image": series.mean(axis=0, dtype=np.float64)}


def brain_shape(store: TokenStore) -> npt.NDArray[np.float32]:
    """1 for each patch of the grid that is a token, 0 for the others."""
    grid = tuple(store.attrs["patch_grid"])
    shape = np.zeros(grid, dtype=np.float32)
    shape[tuple(np.asarray(store.grid_index, dtype=np.intp).T)] = 1
    return shape.ravel()


def compare_occasions(
    folder: Path, pairs: Sequence[Pair], describe: Callable[[str, Occasion], Features]
) -> None:
    """Write `similarity.npz`: of each predictor, first occasions with second ones."""
    folder.mkdir(parents=True, exist_ok=True)
    held: dict[str, npt.NDArray[np.float32]] = {}
    for row, pair in enumerate(tqdm(pairs, desc="identify", unit="subject", mininterval=1.0)):
        for which, occasion in enumerate((pair.first, pair.second)):
            for name, values in describe(pair.subject, occasion).items():
                if name not in held:
                    held[name] = _on_disk(folder, (2, len(pairs), len(values)))
                if len(values) != held[name].shape[2]:
                    raise InputError(
                        f"{occasion.run}: {len(values)} features of {name}, other runs have "
                        f"{held[name].shape[2]}; delete the dataset's rois and tokens folders and "
                        "make them again"
                    )
                held[name][which, row] = values
    bar = tqdm(held.items(), desc="compare", unit="predictor", delay=2.0)
    found = {name: similarity(first, second) for name, (first, second) in bar}
    arrays: dict[str, Any] = {"subject": np.array([pair.subject for pair in pairs]), **found}
    with atomic_path(folder / "similarity.npz") as temporary:
        # Text and numbers need no pickle; an older numpy takes `allow_pickle` for an array.
        np.savez(temporary, **arrays)


def _on_disk(folder: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """An array in a file without a name, of which nothing remains after this process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def summarize(folder: Path, config: Config, model: str) -> None:
    """Compute `identify.tsv` and draw `identify.svg` from `similarity.npz` and `pairs.tsv`."""
    kinds = read_table(folder / "pairs.tsv", dtype=str)["pairs"].to_numpy()
    chosen = {kind: kinds == kind for kind in KINDS if (kinds == kind).any()}
    if len(chosen) > 1:
        chosen = {"all": np.full(len(kinds), True), **chosen}
    evaluate = config.evaluate
    settings = (evaluate.bootstrap, evaluate.confidence, config.splits.seed, evaluate.permutations)
    rows: list[dict[str, Any]] = []
    with np.load(folder / "similarity.npz", allow_pickle=False) as similar:
        names = [name for name in similar.files if name != "subject"]
        for kind, members in chosen.items():
            for name in names if members.sum() > 1 else []:
                found = identify(similar[name][np.ix_(members, members)], *settings)
                rows.append({"predictor": name, "pairs": kind, **found})
    table = pd.DataFrame(rows)
    write_table(folder / "identify.tsv", table)
    draw_identification(folder / "identify.svg", table, evaluate.confidence, model)
