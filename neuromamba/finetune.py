"""Fine-tuning: a pretrained model, or only a part of it, learns to predict a target.

What learns, by `mode`: the whole model (`full`), low-rank changes of its linear layers (`adapters`,
see there), or neither (`head`); with each of these the head and, where there is one, the model's
`pool`. A `probe` fits the head alone, by a convex fit (see there), and takes no steps.

Design choices
--------------
- Classes are weighted by the inverse of their frequency among the training subjects, so that the
  rarest counts as much as the commonest. Numbers are learnt in z units of the training subjects.
- A subject's prediction is the mean over evenly spaced windows of all its runs: of the
  probabilities (of a probe, of the logits), or of the values. The windows of one run are predicted
  together and apart from all others, so a prediction is the same to the bit whoever else is
  predicted.
- A head starts at zero, or (`head_start: probe`) as the linear probe of the model that is to be
  trained, so that training changes features for a head that can read them (Kumar et al. 2022, arXiv
  2202.10054, section 3.4). The probe is fitted to means over windows and training sees windows, so
  that this serves where a window tells nearly as much as a run does: of windows of 160 s, and not
  of those of 40 s, of which its loss was above that of a guess.
- The step to keep, which may be step 0, is chosen by the loss on the validation subjects alone.
- The last step is the calibration for new scans (see `calibrate`), without which there is no model.
- A state is told of a part of a run, so samples (`neuromamba.states`) take the place of subjects:
  they take turns in training, and are predicted by their windows. What is predicted of a whole scan
  would mean nothing, so there is no calibration for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from neuromamba.adapters import add_adapters, remove_adapters
from neuromamba.batches import Batch, Windows, group_runs, list_runs, make_readers
from neuromamba.calibrate import only_uncalibrated, run_calibration
from neuromamba.checkpoint import load_model_info, load_weights
from neuromamba.config import Config, Finetune, State
from neuromamba.distributed import join, telling_lost_processes
from neuromamba.events import state_of, subject_of
from neuromamba.files import InputError, digest_json
from neuromamba.heads import HeadedModel, make_unscaled
from neuromamba.labels import labelled_subjects, make_task, read_samples, tell_left_out
from neuromamba.layout import Layout
from neuromamba.observe import merge_runs, observe_subject
from neuromamba.pretrain import (
    PARTS,
    make_network,
    make_record,
    make_settings,
    open_windows,
    sources_of,
)
from neuromamba.probe import fit_probe, probe_and_save
from neuromamba.record import OnChange, ancestry, differences
from neuromamba.runtime import choose_device
from neuromamba.scalars import to_device
from neuromamba.stage_settings import target_settings
from neuromamba.state_windows import windows_of
from neuromamba.states import read_states
from neuromamba.trained import Facts, already_there, train_and_save


def run_finetune(
    config: Config,
    dataset: str,
    model: str,
    seed: int,
    target: str,
    on_change: OnChange = "refuse",
) -> None:
    """Fine-tune a model: `finetune/{target}/model.safetensors`, `model.json`, metrics.

    It starts from the pretraining, or, where `finetune.start` says so, from fresh weights.
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
    earlier = {} if settings.start == "fresh" else load_model_info(pretrain)
    labels, states = read_samples(config, dataset, model, target)
    subjects, unlabelled = labelled_subjects(layout, labels)
    used = {name: labels[name] for part in PARTS for name in subjects[part]}
    needs = config.models[model].needs
    runs = list_runs(config, dataset, {subject_of(name) for name in used}, needs)
    record = make_record(config, dataset, model, seed, settings, runs)
    if earlier:
        refuse_other_settings(pretrain, earlier, record["settings"])
        record["inputs"]["pretrained"] = earlier["files"]
    record["settings"]["target"] = target_settings(config.datasets[dataset], target)
    if settings.fits_head:
        record["settings"]["inner_folds"] = config.evaluate.inner_folds
    record["inputs"]["labels"] = digest_json(used)
    if states is not None:
        record["inputs"]["states"] = states.digest
    trained = states is None and only_uncalibrated(folder, record, on_change)
    if not trained and already_there(folder, record, on_change):
        return
    task = make_task(config, dataset, target, subjects, labels)
    tell_left_out(f"{dataset}, {target}", unlabelled, states)
    backbone = make_network(config, model, seed, record["settings"])
    if earlier:
        load_weights(backbone, pretrain)
    probe = settings.mode == "probe"
    network = HeadedModel(backbone, task, settings.head_dropout, settings.mode != "full", probe)
    people = {part: sorted({*map(subject_of, names)}) for part, names in subjects.items()}
    kind = windows_of(states, used, config.models[model].volumes) if states else Windows
    windows = open_windows(config, dataset, model, network, people, runs, kind)
    network = network.to(choose_device(config.compute.device))
    if not trained:
        facts = {"target": target, "unlabelled": unlabelled, "scaling": task.describe()}
        facts |= {"pretrained_from": ancestry(earlier)} if earlier else {}
        train = probe_and_save if probe else train_by_gradient
        train(network, settings, windows, used, folder, record, config, on_change, facts)
    if states is None:
        run_calibration(config, dataset, folder, network, windows, used, settings)


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
    if settings.head_start == "probe":
        folds, seed, world = config.evaluate.inner_folds, record["seed"], join()
        with telling_lost_processes(world):
            layer, _ = fit_probe(network, settings, windows["train"], labels, folds, seed, world)
        facts = {**facts, "head_start": layer.chosen}
    else:
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


def refuse_other_settings(
    folder: Path, info: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Raise `InputError` when the model in `folder` was made under another model or tokens section.

    Weights may fit a model whose window, normalisation, atlas or tokenizer has changed, and then
    mean nothing.
    """
    sections = ("model", "tokens", "regions", "codes", "target")
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
    runs = list_runs(config, dataset, {subject_of(name) for name in subjects}, section.needs)
    sources = sources_of(layout, section, runs["run"])
    settings = make_settings(config, model, section.finetune, seed, sources)
    settings["target"] = target_settings(config.datasets[dataset], target)
    info, classes = load_model_info(folder), spec.class_names
    refuse_other_settings(folder, info, settings)
    # The mode that it was trained by, which the config may no longer have.
    probe = info["settings"]["finetune"]["mode"] == "probe"
    network = make_unscaled(make_network(config, model, seed, settings), classes, probe)
    load_weights(network, folder)
    network.to(choose_device(config.compute.device)).eval()
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
