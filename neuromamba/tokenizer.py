"""Tokenizer: our own autoencoder of slices, trained on the training subjects of a split.

The subjects of the validation part choose its weights and tell what its codes keep; those of the
test part are not opened. It is trained by the loop that trains everything else, which goes on where
it was stopped and gives the same bits for the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from neuromamba.batches import group_runs, list_runs
from neuromamba.checkpoint import put_weights
from neuromamba.config import Codes, Config, Optimiser
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.owned import OwnedFolder
from neuromamba.record import OnChange
from neuromamba.runtime import choose_device, describe_device
from neuromamba.slice_autoencoder import SliceAutoencoder
from neuromamba.slice_quality import cosine_transform, measure_codes, principal_components
from neuromamba.slice_windows import SliceWindows, in_batches
from neuromamba.slices import GRID, Floats
from neuromamba.source_code import code_of
from neuromamba.splits import read_split
from neuromamba.train import Fitted, fit
from neuromamba.trained import already_there, save_trained

PARTS = ("train", "validation")
PER_RUN, MEASURED = 24, 480
"""Slices of a validation run, and of all, that choose the weights and are measured (our choice)."""
FITTED = 2048
"""Training slices that the principal components are fitted on."""
CHECKS = 20
"""How often a training is validated and saved."""


def run_tokenizer(config: Config, dataset: str, on_change: OnChange = "refuse") -> None:
    """Train the tokenizer: `tokenizer/model.safetensors`, `model.json`, `quality.tsv`.

    `quality.tsv` tells what the codes keep of the validation subjects' slices, see `slice_quality`.

    Parameters
    ----------
    config, dataset
        The run, in a fold where there are folds, and its dataset.
    on_change
        What to do with a checkpoint or tokenizer of other settings or inputs.

    Raises
    ------
    InputError
        When `codes.tokenizer` is none that is trained, when the split or the runs do not serve, or
        for what `train.fit` gives.
    """
    codes, layout = config.codes, Layout.of(config, dataset)
    if not codes.trained:
        raise InputError(
            f"codes.tokenizer is {codes.tokenizer}, which is not trained here; set it to slices"
        )
    split = read_split(layout.split)
    subjects = [name for part in PARTS for name in split[part]]
    runs = list_runs(config, dataset, subjects, ["volumes"])
    record = _record(config, dataset, layout, runs)
    if already_there(layout.tokenizer, record, on_change):
        return
    windows = {}
    for part in PARTS:
        of_part = runs[runs["subject"].isin(set(split[part]))]
        path_of = partial(layout.array, "volumes")
        windows[part] = SliceWindows(group_runs(of_part), path_of, codes.normalization)
    device = choose_device(config.compute.device)
    torch.manual_seed(codes.slices.seed)
    network = SliceAutoencoder(codes.slices, config.volumes.shape[0])
    pairs, names = windows["validation"].pairs(PER_RUN, MEASURED)

    def train(owned: OwnedFolder, info: Mapping[str, Any]) -> tuple[Fitted, dict[str, Any]]:
        fitted = fit(
            network,
            optimiser_of(codes),
            partial(windows["train"].training_batch, codes.slices.seed),
            lambda: in_batches(pairs[:, 0], names, codes.slices.batch_size),
            owned,
            info,
            seed=codes.slices.seed,
            device=device,
            on_change=on_change,
        )
        put_weights(network, fitted.weights, owned.path)
        quality = _measure(network, codes, windows["train"], pairs, device)
        with owned.writing(owned.path / "quality.tsv") as temporary:
            temporary.write_text(quality.to_csv(sep="\t", index=False, na_rep="n/a"))
        return fitted, {"step": codes.slices.steps, "n_measured_slices": 2 * len(pairs)}

    counts = {"parameters": sum(one.numel() for one in network.parameters())}
    facts = {**counts, "device": describe_device(device)}
    save_trained(windows, layout.tokenizer, record, on_change, facts, train)  # type: ignore[arg-type]


def optimiser_of(codes: Codes) -> Optimiser:
    """The settings of the training loop: those of `codes.slices`, and our choice of the others."""
    slices = codes.slices
    often = max(slices.steps // CHECKS, 1)
    return Optimiser(
        steps=slices.steps,
        batch_size=slices.batch_size,
        learning_rate=slices.learning_rate,
        warmup_steps=min(100, slices.steps // 10),
        weight_decay=0.0,
        betas=(0.9, 0.99),
        validate_every=often,
        checkpoint_every=often,
    )


def _record(config: Config, dataset: str, layout: Layout, runs: pd.DataFrame) -> dict[str, Any]:
    """What the training depends on; see `pretrain.make_record`."""
    codes = config.codes
    return {
        "stage": "tokenizer",
        "dataset": dataset,
        "seed": codes.slices.seed,
        "settings": {
            "slices": codes.slices.model_dump(mode="json"),
            "normalization": codes.normalization,
            "edge": config.volumes.shape[0],
        },
        "inputs": {
            "split": digest_file(layout.split),
            "runs": digest_json(runs[["run", "key"]].astype(str).to_numpy().tolist()),
        },
        "code": code_of("tokenizer"),
    }


def _measure(
    network: SliceAutoencoder,
    codes: Codes,
    train: SliceWindows,
    pairs: Floats,
    device: torch.device,
) -> pd.DataFrame:
    """The table of `slice_quality.measure_codes` for the tokenizer and codes of equal size."""
    size, edge = codes.slices.channels * GRID**2, pairs.shape[-1]
    # A stream of samples of its own, not the first ones of the training.
    seen = train.training_batch(codes.slices.seed + 1, 0, FITTED)["slices"].numpy()
    network.eval()

    @torch.inference_mode()
    def autoencoder(images: Floats) -> Floats:
        found = np.empty_like(images)
        for first in range(0, len(images), codes.slices.batch_size):
            part = slice(first, first + codes.slices.batch_size)
            stored = network.encode(torch.from_numpy(images[part]).to(device)).half().float()
            found[part] = network.decode(stored).cpu().numpy()
        return found

    table = measure_codes(
        {
            "slices": autoencoder,
            "pca": principal_components(seen, size),
            "dct": cosine_transform(edge, size),
        },
        pairs,
        seen.mean(axis=0),
    )
    return table.assign(values=size, n_slices=2 * len(pairs))
