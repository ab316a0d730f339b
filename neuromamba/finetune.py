"""Fine-tuning: a pretrained model, or only a part of it, learns to predict a target.

What learns, by `mode`: the whole model (`full`), low-rank changes of its linear layers (`adapters`,
see there), or neither (`head`); with each of these the head and, where there is one, the model's
`pool`. A `probe` fits the head alone, in closed form (see there), and takes no steps.

Design choices
--------------
- Classes are weighted by the inverse of their frequency among the training subjects, so that the
  rarest counts as much as the commonest. Numbers are learnt in z units of the training subjects.
- A subject's prediction is the mean over evenly spaced windows of all its runs: of the
  probabilities (of a probe, of the logits), or of the values. The windows of one run are predicted
  together and apart from all others, so a prediction is the same to the bit whoever else is
  predicted.
- The step to keep is chosen by the loss on the validation subjects alone.
- The last step is the calibration for new scans (see `calibrate`), without which there is no model.
- A state is told of a part of a run, so samples (`neuromamba.states`) take the place of subjects:
  they take turns in training, and are predicted by their windows. What is predicted of a whole scan
  would mean nothing, so there is no calibration for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from neuromamba.adapters import add_adapters, remove_adapters
from neuromamba.batches import Batch, Windows, group_runs, list_runs, make_readers
from neuromamba.calibrate import only_uncalibrated, run_calibration
from neuromamba.checkpoint import load_model_info, load_weights
from neuromamba.config import Classification, Config, Finetune, State
from neuromamba.events import state_of, subject_of
from neuromamba.files import InputError, digest_json
from neuromamba.heads import ClassHead, HeadedModel, NumberHead, make_unscaled
from neuromamba.layout import Layout
from neuromamba.observe import merge_runs, observe_subject
from neuromamba.participants import read_participants
from neuromamba.pretrain import PARTS, make_network, make_record, make_settings, open_windows
from neuromamba.probe import probe_and_save
from neuromamba.record import OnChange, ancestry, differences
from neuromamba.runtime import choose_device
from neuromamba.scalars import to_device
from neuromamba.splits import read_split
from neuromamba.stage_settings import target_settings
from neuromamba.state_windows import windows_of
from neuromamba.states import States, read_states
from neuromamba.trained import Facts, already_there, train_and_save

SHOWN = 5
"""Runs whose reasons are told."""


def run_finetune(
    config: Config,
    dataset: str,
    model: str,
    seed: int,
    target: str,
    on_change: OnChange = "refuse",
) -> None:
    """Fine-tune a pretrained model: `finetune/{target}/model.safetensors`, `model.json`, metrics.

    `calibration.json` and `calibration.safetensors` are for predictions of new scans.

    Subjects without a label are left out, and their number is told.

    Raises
    ------
    InputError
        When there is no pretrained model or it does not fit, when a part has no labelled subject,
        or when the labels of the training subjects are all the same.
    """
    layout = Layout.of(config, dataset)
    folder = layout.finetune(model, seed, target)
    source, pretrained = config.pretraining_of(dataset, model)
    pretrain = Layout.of(config, source).pretrain(pretrained, seed)
    settings = config.models[model].finetune
    earlier = load_model_info(pretrain)
    labels, states = read_samples(config, dataset, model, target)
    subjects, unlabelled = labelled_subjects(layout, labels)
    used = {name: labels[name] for part in PARTS for name in subjects[part]}
    runs = list_runs(config, dataset, {subject_of(name) for name in used})
    record = make_record(config, dataset, model, seed, settings, runs)
    refuse_other_settings(pretrain, earlier, record["settings"])
    record["settings"]["target"] = target_settings(config.datasets[dataset], target)
    if settings.mode == "probe":
        record["settings"]["inner_folds"] = config.evaluate.inner_folds
    record["inputs"] |= {"labels": digest_json(used), "pretrained": earlier["files"]}
    if states is not None:
        record["inputs"]["states"] = states.digest
    trained = states is None and only_uncalibrated(folder, record, on_change)
    if not trained and already_there(folder, record, on_change):
        return
    task = make_task(config, dataset, target, subjects, labels)
    tell_left_out(f"{dataset}, {target}", unlabelled, states)
    backbone = make_network(config, model, seed)
    load_weights(backbone, pretrain)
    probe = settings.mode == "probe"
    network = HeadedModel(backbone, task, settings.head_dropout, settings.mode != "full", probe)
    people = {part: sorted({*map(subject_of, names)}) for part, names in subjects.items()}
    kind = windows_of(states, used, config.models[model].volumes) if states else Windows
    windows = open_windows(config, dataset, model, network, people, runs, kind)
    network = network.to(choose_device(config.compute.device))
    if not trained:
        facts = {"target": target, "unlabelled": unlabelled, "scaling": task.describe()}
        facts["pretrained_from"] = ancestry(earlier)
        train = probe_and_save if probe else train_by_gradient
        train(network, settings, windows, used, folder, record, config, on_change, facts)
    if states is None:
        run_calibration(config, dataset, folder, network, windows, used, settings)


def read_samples(
    config: Config, dataset: str, model: str, target: str
) -> tuple[Mapping[str, int | float], States | None]:
    """The label of each subject; or, of a state, that of each sample, and what tells it."""
    if target not in config.datasets[dataset].state_targets:
        return read_labels(config, dataset, target), None
    states = read_states(config, dataset, target)
    return states.samples([config.models[model].volumes]), states


def tell_left_out(what: str, unlabelled: Mapping[str, int], states: States | None) -> None:
    """Tell the user how many subjects, and which runs of a state's target, have no label."""
    if any(unlabelled.values()):
        counts = ", ".join(f"{count} of part {part}" for part, count in unlabelled.items())
        tqdm.write(f"{what}: left out for want of a label: {counts}", sys.stderr)
    reasons = list(states.left_out.values()) if states else []
    if reasons:
        more = f" (and {len(reasons) - SHOWN} more)" if len(reasons) > SHOWN else ""
        tqdm.write(f"{what}: runs left out: {'; '.join(reasons[:SHOWN])}{more}", sys.stderr)


def train_by_gradient(
    network: HeadedModel,
    settings: Finetune,
    windows: Mapping[str, Windows],
    labels: Mapping[str, int | float],
    folder: Path,
    record: Mapping[str, Any],
    config: Config,
    on_change: OnChange,
    facts: Facts,
) -> None:
    """Train the head, and what else learns by the mode; see `train_and_save`.

    Adapters are no longer in `network` after that.
    """
    standardize(network, windows["train"], settings)
    if settings.mode == "adapters":
        # They are merged into the weights that are saved, which are no more than before.
        facts = {**facts, "parameters": sum(one.numel() for one in network.parameters())}
        add_adapters(network.backbone, settings.adapters)

    def with_label(batch: Batch) -> Batch:
        return {**batch, "label": torch.tensor([labels[name] for name in batch["subject"]])}

    train_and_save(network, settings, windows, folder, record, config, on_change, with_label, facts)
    remove_adapters(network)


def standardize(network: HeadedModel, train: Windows, settings: Finetune) -> None:
    """Set the mean and SD of the features by evenly spaced windows of the training subjects."""
    device = network.center.device
    spaced = train.spaced(settings.validation_windows)
    batches = tqdm(list(spaced), desc="standardize", unit="window", mininterval=1.0)
    network.standardize(to_device(train.batch([w]), device) for w in batches)


def labelled_subjects(
    layout: Layout, labels: Mapping[str, int | float]
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The subjects (or samples) of each part that have a label, and how many subjects have none."""
    split = read_split(layout.split)
    of_subject: dict[str, list[str]] = {}
    for name in sorted(labels):
        of_subject.setdefault(subject_of(name), []).append(name)
    subjects = {part: [n for one in split[part] for n in of_subject.get(one, [])] for part in PARTS}
    return subjects, {part: len({*split[part]} - {*of_subject}) for part in PARTS}


def read_labels(config: Config, dataset: str, target: str) -> dict[str, int | float]:
    """The label of each subject that has one: the number of its class, or its value."""
    settings = config.datasets[dataset]
    spec = settings.subject_targets[target]
    labels = read_participants(settings)[target].dropna()
    if isinstance(spec, Classification):
        number = {name: k for k, name in enumerate(spec.classes)}
        return {str(subject): number[name] for subject, name in labels.items()}
    return {str(subject): float(value) for subject, value in labels.items()}


def make_task(
    config: Config,
    dataset: str,
    target: str,
    subjects: Mapping[str, Sequence[str]],
    labels: Mapping[str, int | float],
) -> ClassHead | NumberHead:
    """The loss for a target, weighted or scaled by the labels of the training subjects.

    Raises
    ------
    InputError
        When a part has no labelled subject, or all labels of the training subjects are the same.
    """
    settings = config.datasets[dataset]
    spec = settings.targets[target]
    file = settings.participants.file if settings.participants else dataset
    if isinstance(spec, State):
        file = f"the events in {settings.events_folder}"
    where = f"{file}: column {spec.column!r} (target {target!r})"
    for part in PARTS:
        if not subjects[part]:
            raise InputError(
                f"{where} has a label for no subject of part {part!r}; add labels, or raise "
                f"splits.{part}" + ("" if part == "validation" else " by lowering the others")
            )
    values = [labels[name] for name in subjects["train"]]
    counts = Counter(values)
    if len(counts) == 1:
        what = (
            f"only class {spec.class_names[int(values[0])]!r}"
            if spec.class_names
            else f"only the value {values[0]:g}"
        )
        raise InputError(
            f"{where} has {what} for all {len(values)} training subjects, so there is nothing to "
            "learn; check the column and the target's `classes`, or remove the target"
        )
    if spec.class_names:
        share = {k: len(values) / (len(counts) * count) for k, count in counts.items()}
        return ClassHead([share.get(k, 0.0) for k in range(len(spec.class_names))])
    return NumberHead(float(np.mean(values)), float(np.std(values)))


def refuse_other_settings(
    folder: Path, info: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise `InputError` when the model in `folder` was made under another model or tokens section.

    Weights may fit a model whose window or normalisation has changed, and then mean nothing.
    """
    sections = ("model", "tokens", "target")
    old, new = (
        {"settings": {name: given.get(name) for name in sections if name in settings}, "inputs": {}}
        for given in (info["settings"], settings)
    )
    changes = differences(old, new)
    if changes:
        raise InputError(
            f"{folder / 'model.json'} was made under other settings:\n  "
            + "\n  ".join(changes)
            + "\ntrain it again, or put the settings back"
        )


def predict_subjects(
    config: Config, dataset: str, model: str, seed: int, target: str, subjects: Sequence[str]
) -> pd.DataFrame:
    """Predict a target by the fine-tuned model.

    Returns
    -------
    pandas.DataFrame
        One row for each of `subjects` (of states, samples), in their order: `subject`, and
        `prob_<class>` for each class or `value`, float64.

    Raises
    ------
    InputError
        When there is no fine-tuned model of these settings, or a subject has no run that is long
        enough.
    """
    layout = Layout.of(config, dataset)
    folder, section = layout.finetune(model, seed, target), config.models[model]
    spec = config.datasets[dataset].targets[target]
    settings = make_settings(config, model, section.finetune, seed)
    settings["target"] = target_settings(config.datasets[dataset], target)
    refuse_other_settings(folder, load_model_info(folder), settings)
    classes = spec.class_names
    network = make_unscaled(make_network(config, model, seed), classes, section.finetune.mode)
    load_weights(network, folder)
    network.to(choose_device(config.compute.device)).eval()
    runs = list_runs(config, dataset, {subject_of(name) for name in subjects})
    readers = make_readers(network, layout, section, config.tokens)
    kind: Callable[..., Windows] = Windows
    if isinstance(spec, State):
        wanted = {name: classes.index(state_of(name)) for name in subjects}
        kind = windows_of(read_states(config, dataset, target), wanted, section.volumes)
    windows = kind(group_runs(runs), readers, config.compute.max_excluded)
    lost = [subject for subject in subjects if subject not in windows.runs]
    if lost:
        reasons = "; ".join(windows.left_out.values()) or f"see {layout.excluded}"
        raise InputError(f"no run of {', '.join(lost[:5])} can be predicted: {reasons}")
    rows = [
        [subject, *merge_runs(observe_subject(network, windows, subject, section.finetune))[0]]
        for subject in tqdm(subjects, desc=f"predict {target}", unit="subject", mininterval=1.0)
    ]
    names = [f"prob_{name}" for name in classes] or ["value"]
    return pd.DataFrame(rows, columns=["subject", *names])
