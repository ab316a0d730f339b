"""What a fine-tuned model has to know of itself to predict new scans: `calibration.json`.

It is learnt after the training, from the training and validation subjects alone, and changes no
weight. No subject is named in it.

Choices
-------
- A new scan is one run, so a validation subject counts once, by its first run: runs of one person
  are not independent (Dunn et al. 2022, arXiv 1809.07441). For predictions by subject, which are
  means over all runs, the same is learnt from all of a subject's runs.
- While it is made, the record of the finished training is called `trained.json`; only then there is
  a `model.json`, which has the digests of all files. Whoever starts again does not train again.
- Several processes share the subjects; the result is the same to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch

from neuromamba.batches import Windows
from neuromamba.calibration import Floats, class_scores, fit_rescaling
from neuromamba.calibration_file import (
    CALIBRATION,
    LEVELS,
    MODEL,
    TRAINED,
    VALUE,
    Arrays,
    Calibration,
    Level,
    OfLevel,
    save_calibration,
)
from neuromamba.checkpoint import finished, load_model_info
from neuromamba.config import Config, Finetune
from neuromamba.distributed import join
from neuromamba.files import InputError
from neuromamba.heads import HeadedModel
from neuromamba.layout import Layout
from neuromamba.novelty import MIN_TRAINING, Cloud, cross_fitted, places
from neuromamba.observe import (
    Grid,
    Observed,
    first_runs,
    merge_runs,
    observe_subjects,
    patch_grid,
)
from neuromamba.owned import own
from neuromamba.record import OnChange
from neuromamba.spacing import some_of
from neuromamba.tables import read_table

MOST_TRAINING = 1000
"""Training subjects that new ones are compared with, at most: more would tell little more."""

Units = dict[str, tuple[list[float], Floats]]
"""By subject: what is predicted, and the features."""


def only_uncalibrated(folder: Path, record: Mapping[str, Any], on_change: OnChange) -> bool:
    """Whether a training has ended under the same settings, and its calibration is wanting."""

    def ask() -> bool:
        if (folder / MODEL).exists():
            (folder / TRAINED).unlink(missing_ok=True)
        elif (folder / TRAINED).exists():
            (folder / TRAINED).rename(folder / MODEL)
        done = finished(folder, record, on_change)
        return done and CALIBRATION not in load_model_info(folder)["files"]

    return bool(join().from_lead(ask))


def run_calibration(
    config: Config,
    dataset: str,
    folder: Path,
    network: HeadedModel,
    windows: Mapping[str, Windows],
    labels: Mapping[str, int | float],
    settings: Finetune,
) -> None:
    """Calibrate a model whose training has ended: `calibration.json` and `.safetensors`.

    Under torchrun all processes call this, and the one of rank 0 writes.

    Parameters
    ----------
    folder
        Of the training.
    network
        With any weights; it gets those that the training has kept.
    windows
        Of the parts `train` and `validation`.
    labels
        Of the validation subjects at least.

    Raises
    ------
    InputError
        When what the model gives is not finite.
    """
    world = join()
    if world.from_lead(lambda: CALIBRATION in load_model_info(folder)["files"]):
        return  # what had the folder before has just ended
    with own(folder, world.leads) as owned:
        info: dict[str, Any] = {}
        if world.leads:
            info = load_model_info(folder)
            owned.check()
            (folder / MODEL).rename(folder / TRAINED)
        kept = safetensors.torch.load_file(folder / "model.safetensors") if world.leads else {}
        network.load_state_dict(world.tensors_from_lead(kept))
        network.eval()
        grid = patch_grid(config.volumes, config.tokens.patch)
        some = {part: of.subjects for part, of in windows.items()}
        some["train"] = some_of(some["train"], MOST_TRAINING)
        observed = {
            part: observe_subjects(network, of, some[part], settings, grid, world)
            for part, of in windows.items()
        }
        if world.leads:
            ranges = _ranges(config, dataset, observed["train"], windows["train"], info)
            calibration, arrays = learn(config, info, observed, labels, ranges, grid)
            save_calibration(owned, info, calibration, arrays)
    world.wait()


def learn(
    config: Config,
    info: Mapping[str, Any],
    observed: Mapping[str, Sequence[Observed]],
    labels: Mapping[str, int | float],
    ranges: Mapping[str, tuple[float, float]],
    grid: Grid,
) -> tuple[Calibration, Arrays]:
    """The calibration of the model that `info` describes, from its `train` and `validation` runs.

    Raises
    ------
    InputError
        When what the model gives is not finite.
    """
    settings, dataset = info["settings"], info["dataset"]
    classes = [name for name, _ in settings["target"].get("classes", [])]
    levels: dict[Level, OfLevel] = {}
    arrays: Arrays = {}
    held = [one.held for one in first_runs(observed["train"]) if one.held is not None]
    if held:
        arrays["patches"] = np.mean(held, axis=0).astype(np.float32).reshape(grid)
    one_each = all(len(first_runs(rows)) == len(rows) for rows in observed.values())
    for level in LEVELS:
        units = {part: _units(rows, level) for part, rows in observed.items()}
        if not (levels and one_each):  # or else both levels are of the same units
            learnt, cloud = learn_level(units["train"], units["validation"], labels, classes)
        levels[level] = learnt
        if cloud is not None:
            parts = {name: values.astype(np.float32) for name, values in vars(cloud).items()}
            arrays |= {f"{level}.{name}": values for name, values in parts.items()}
    calibration = Calibration(
        format=2,
        weights=info["files"]["model.safetensors"],
        dataset=dataset,
        target=info["target"],
        classes=classes,
        space=config.datasets[dataset].space,
        volumes=config.volumes,
        tokens=settings["tokens"],
        window=settings["model"]["volumes"],
        normalization=settings["model"].get("normalization"),
        subjects={part: len(first_runs(rows)) for part, rows in observed.items()},
        ranges=dict(ranges),
        levels=levels,
    )
    return calibration, arrays


def learn_level(
    training: Units,
    validation: Units,
    labels: Mapping[str, int | float],
    classes: Sequence[str],
) -> tuple[OfLevel, Cloud | None]:
    """What is learnt at one level, and the cloud of training subjects where these are enough."""
    values = np.array([value for value, _ in validation.values()])
    truth = np.array([labels[subject] for subject in validation])
    embeddings = np.stack([features for _, features in training.values()])
    others = np.stack([features for _, features in validation.values()])
    if not all(np.isfinite(found).all() for found in (values, embeddings, others)):
        raise InputError(
            "the model gives no finite predictions of the subjects it was trained on; its training "
            "may have diverged: look at its metrics.jsonl, and train with a lower learning_rate"
        )
    distances: dict[str, list[float]] = {"training": [], "validation": []}
    cloud = Cloud.fit(embeddings) if len(embeddings) >= MIN_TRAINING else None
    if cloud is not None:
        distances["training"] = np.sort(cross_fitted(embeddings)).tolist()
        distances["validation"] = np.sort(cloud.distances(others)).tolist()
    facts: dict[str, Any] = dict.fromkeys(("rescaling", "note"))
    if classes:
        found = fit_rescaling(values, truth, classes)
        facts["note" if isinstance(found, str) else "rescaling"] = found
        scores = class_scores(values, truth, classes)
    else:
        errors = values[:, 0] - truth
        scores = {VALUE: np.sort(np.abs(errors)).tolist()}
    return OfLevel(scores=scores, distances=distances, **facts), cloud


def _units(rows: Sequence[Observed], level: Level) -> Units:
    """What is predicted of each subject, by its first run or by all of them."""
    units = {}
    for subject, of_subject in itertools.groupby(rows, key=lambda row: row.subject):
        runs = list(of_subject)
        units[subject] = merge_runs(runs[:1] if level == "run" else runs)
    return units


def _ranges(
    config: Config,
    dataset: str,
    rows: Sequence[Observed],
    windows: Windows,
    info: Mapping[str, Any],
) -> dict[str, tuple[float, float]]:
    first = first_runs(rows)
    index = read_table(Layout.of(config, dataset).index, dtype={"run": str}).set_index("run")
    last = {
        window.run: window.start
        for window in windows.spaced(2, [one.subject for one in first])  # the first, the last
    }
    time_patch, window = info["settings"]["tokens"]["time_patch"], info["settings"]["model"]
    found = {
        "repetition_time": index.loc[[one.run for one in first], "repetition_time"].tolist(),
        "n_volumes": [last[one.run] * time_patch + window["volumes"] for one in first],
    }
    held = [one.held for one in first if one.held is not None]
    if len(held) > 1:
        found |= places(np.stack(held))
    return {name: (float(min(values)), float(max(values))) for name, values in found.items()}
