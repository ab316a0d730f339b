"""Subcommands that train, evaluate and use models.

Stage modules are imported only when their subcommand runs, so that the light stages do not wait for
torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from neuromamba.command_options import (
    choose,
    choose_dataset,
    choose_fold,
    choose_folds,
    choose_targets,
    choose_training,
    read_config,
)
from neuromamba.config import Config
from neuromamba.files import InputError
from neuromamba.launch import start_processes
from neuromamba.layout import Layout
from neuromamba.recording import recorded
from neuromamba.stages import Job, compared_by


def _pretrain(options: argparse.Namespace) -> None:
    config, fraction = read_config(options), options.fraction
    start_processes(config.compute)
    from neuromamba.pretrain import run_pretrain

    if fraction is not None:
        config = config.study()
    dataset, model, seed = choose_training(options, config, [*config.datasets, *config.mixtures])
    if dataset in config.datasets:
        dataset, model = config.pretraining_of(dataset, model)
    if fraction is not None:
        if options.fold is not None:
            raise InputError("--fold: a cell of the scaling study is always of the first fold")
        job = Job("cell", dataset, model=model, seed=seed, fraction=fraction)
        with recorded(config, job):
            run_pretrain(config, dataset, model, seed, options.on_change, fraction)
        return
    for fold in choose_folds(options, config):
        with recorded(fold, Job("pretrain", dataset, model=model, seed=seed, fold=fold.fold)):
            run_pretrain(fold, dataset, model, seed, options.on_change)


def _scaling(options: argparse.Namespace) -> None:
    from neuromamba.scaling import run_scaling

    config = read_config(options)
    dataset = choose("dataset", options.dataset, [*config.datasets, *config.mixtures])
    with recorded(config, Job("scaling", dataset)):
        run_scaling(config, dataset)


def _ablations(options: argparse.Namespace) -> None:
    from neuromamba.compare import run_compare

    config = read_config(options)
    dataset = choose("dataset", options.dataset, list(config.datasets))
    if not config.ablations:
        raise InputError("no model of the config has `ablation_of`; see config/README.md")
    layout, how = Layout.of(config, dataset), config.evaluate
    runs = [layout.seed(model, seed) for model, seed in compared_by(config)]
    with recorded(config, Job("ablations", dataset)):
        run_compare(
            runs,
            layout.ablations,
            how.bootstrap,
            how.confidence,
            how.permutations,
            config.splits.seed,
        )


def _finetune(options: argparse.Namespace) -> None:
    config = read_config(options)
    start_processes(config.compute)
    from neuromamba.finetune import run_finetune

    dataset, model, seed = choose_training(options, config)
    for target in choose_targets(options, config, dataset):
        job = Job("finetune", dataset, model=model, seed=seed, target=target)
        for fold in choose_folds(options, config):
            with recorded(fold, replace(job, fold=fold.fold)):
                run_finetune(fold, dataset, model, seed, target, on_change=options.on_change)


def _baselines(options: argparse.Namespace) -> None:
    from neuromamba.baseline_predictions import run_baselines

    config = read_config(options)
    dataset = choose_dataset(options, config)
    for target in choose_targets(options, config, dataset):
        for fold in choose_folds(options, config):
            with recorded(fold, Job("baselines", dataset, target=target, fold=fold.fold)):
                run_baselines(fold, dataset, target)


def _evaluate(options: argparse.Namespace) -> None:
    from neuromamba.evaluate import run_evaluate
    from neuromamba.pool import run_pool

    config = read_config(options)
    dataset, model, seed = choose_training(options, config)
    folds = config.splits.protocol != "holdout"
    if options.pool and (options.fold is not None or not folds):
        raise InputError("--pool puts all folds of a cross-validation together; leave it out")
    for target in choose_targets(options, config, dataset):
        job = Job("evaluate", dataset, model=model, seed=seed, target=target)
        for fold in [] if options.pool else choose_folds(options, config):
            with recorded(fold, replace(job, fold=fold.fold)):
                run_evaluate(fold, dataset, model, seed, target)
        if options.fold is None and folds:
            with recorded(config, job):
                run_pool(config, dataset, model, seed, target)


def _scores(options: argparse.Namespace) -> None:
    from neuromamba.scores import run_scores

    config = read_config(options)
    dataset, model, seed = choose_training(options, config)
    with recorded(config, Job("scores", dataset, model=model, seed=seed)):
        run_scores(config, dataset, model, seed)


def _forecast(options: argparse.Namespace) -> None:
    from neuromamba.forecast import run_forecast

    _study(options, "forecast", run_forecast)


def _identify(options: argparse.Namespace) -> None:
    from neuromamba.identify import run_identify

    _study(options, "identify", run_identify)


def _retrieve(options: argparse.Namespace) -> None:
    from neuromamba.retrieve import run_retrieve

    _study(options, "retrieve", run_retrieve)


def _study(
    options: argparse.Namespace, stage: str, run: Callable[[Config, str, str, int], None]
) -> None:
    """Ask something of a pretrained model as it is, in the folds that are wanted."""
    config = read_config(options)
    dataset, model, seed = choose_training(options, config)
    for fold in choose_folds(options, config):
        with recorded(fold, Job(stage, dataset, model=model, seed=seed, fold=fold.fold)):
            run(fold, dataset, model, seed)


def _embed(options: argparse.Namespace) -> None:
    from neuromamba.embed import open_embedder, open_shared, run_embed

    config = read_config(options)
    if options.weights:
        dataset, embedder = choose_dataset(options, config), open_shared(config, options.weights)
    else:
        config = choose_fold(options, config)
        dataset, model, seed = choose_training(options, config)
        target = options.target and choose_targets(options, config, dataset)[0]
        embedder = open_embedder(config, dataset, model, seed, target)
    chosen = (options.runs, options.subjects, options.windows)
    run_embed(config, dataset, embedder, options.level, options.output, *chosen)


def _export(options: argparse.Namespace) -> None:
    from neuromamba.export import run_export

    config = choose_fold(options, read_config(options))
    run_export(config, *choose_training(options, config), options.output)


def _explain(options: argparse.Namespace) -> None:
    from neuromamba.explain import run_explain

    config = choose_fold(options, read_config(options))
    dataset, model, seed = choose_training(options, config)
    own = (options.subjects, options.steps, options.windows, options.of_class, options.permuted)
    if options.output is not None:
        target = choose("target", options.target, choose_targets(options, config, dataset))
        how = (options.output, *own, options.subject_maps)
        run_explain(config, dataset, model, seed, target, *how)
        return
    if any(value is not None for value in own) or options.subject_maps:
        raise InputError(
            "--output is missing: maps by other options than the config's need a folder of their "
            "own"
        )
    targets = choose_targets(options, config, dataset)
    if options.target is None:  # a state is one of windows, of which there are no maps
        targets = list(config.datasets[dataset].subject_targets)
    for target in targets:
        job = Job("explain", dataset, model=model, seed=seed, target=target, fold=config.fold)
        with recorded(config, job):
            run_explain(config, dataset, model, seed, target)


def _predict(options: argparse.Namespace) -> int:
    from neuromamba.new_scans import Asked
    from neuromamba.predict import run_predict

    asked = Asked(options.mask, options.space, options.resolution, options.repetition_time)
    every = run_predict(
        options.model,
        options.scans,
        options.output,
        asked,
        options.level,
        options.confidence,
        options.any_repetition_time,
        options.device,
        options.explain,
        options.atlas,
        options.tokenizer,
    )
    return 0 if every else 1


def _compare(options: argparse.Namespace) -> None:
    from neuromamba.compare import run_compare

    how = (options.bootstrap, options.confidence, options.permutations, options.seed)
    run_compare(options.runs, options.output, *how)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "pretrain": _pretrain,
    "scaling": _scaling,
    "ablations": _ablations,
    "finetune": _finetune,
    "baselines": _baselines,
    "evaluate": _evaluate,
    "scores": _scores,
    "forecast": _forecast,
    "identify": _identify,
    "retrieve": _retrieve,
    "embed": _embed,
    "export": _export,
    "explain": _explain,
    "predict": _predict,
    "compare": _compare,
}
