"""Subcommands that train, evaluate and use models.

Stage modules are imported only when their subcommand runs, so that the light stages do not wait for
torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from neuromamba.command_options import (
    choose,
    choose_dataset,
    choose_targets,
    choose_training,
    read_config,
)
from neuromamba.launch import start_processes
from neuromamba.recording import recorded
from neuromamba.stages import Job


def _pretrain(options: argparse.Namespace) -> None:
    config, fraction = read_config(options), options.fraction
    start_processes(config.compute)
    from neuromamba.pretrain import run_pretrain

    if fraction is not None:
        config = config.study()
    dataset, model, seed = choose_training(options, config, [*config.datasets, *config.mixtures])
    if dataset in config.datasets:
        dataset, model = config.pretraining_of(dataset, model)
    stage = "pretrain" if fraction is None else "cell"
    job = Job(stage, dataset, model=model, seed=seed, fraction=fraction or 0.0)
    with recorded(config, job):
        run_pretrain(config, dataset, model, seed, options.on_change, fraction)


def _scaling(options: argparse.Namespace) -> None:
    from neuromamba.scaling import run_scaling

    config = read_config(options)
    dataset = choose("dataset", options.dataset, [*config.datasets, *config.mixtures])
    with recorded(config, Job("scaling", dataset)):
        run_scaling(config, dataset)


def _finetune(options: argparse.Namespace) -> None:
    config = read_config(options)
    start_processes(config.compute)
    from neuromamba.finetune import run_finetune

    dataset, model, seed = choose_training(options, config)
    for target in choose_targets(options, config, dataset):
        with recorded(config, Job("finetune", dataset, model=model, seed=seed, target=target)):
            run_finetune(config, dataset, model, seed, target, on_change=options.on_change)


def _evaluate(options: argparse.Namespace) -> None:
    from neuromamba.evaluate import run_evaluate

    config = read_config(options)
    dataset, model, seed = choose_training(options, config)
    for target in choose_targets(options, config, dataset):
        with recorded(config, Job("evaluate", dataset, model=model, seed=seed, target=target)):
            run_evaluate(config, dataset, model, seed, target)


def _scores(options: argparse.Namespace) -> None:
    from neuromamba.scores import run_scores

    config = read_config(options)
    dataset, model, seed = choose_training(options, config)
    with recorded(config, Job("scores", dataset, model=model, seed=seed)):
        run_scores(config, dataset, model, seed)


def _forecast(options: argparse.Namespace) -> None:
    from neuromamba.forecast import run_forecast

    config = read_config(options)
    dataset, model, seed = choose_training(options, config)
    with recorded(config, Job("forecast", dataset, model=model, seed=seed)):
        run_forecast(config, dataset, model, seed)


def _embed(options: argparse.Namespace) -> None:
    from neuromamba.embed import open_embedder, open_shared, run_embed

    config = read_config(options)
    if options.weights:
        dataset, embedder = choose_dataset(options, config), open_shared(config, options.weights)
    else:
        dataset, model, seed = choose_training(options, config)
        target = options.target and choose_targets(options, config, dataset)[0]
        embedder = open_embedder(config, dataset, model, seed, target)
    chosen = (options.runs, options.subjects, options.windows)
    run_embed(config, dataset, embedder, options.level, options.output, *chosen)


def _export(options: argparse.Namespace) -> None:
    from neuromamba.export import run_export

    config = read_config(options)
    run_export(config, *choose_training(options, config), options.output)


def _explain(options: argparse.Namespace) -> None:
    from neuromamba.explain import run_explain

    config = read_config(options)
    dataset, model, seed = choose_training(options, config)
    target = choose("target", options.target, choose_targets(options, config, dataset))
    run_explain(
        config,
        dataset,
        model,
        seed,
        target,
        options.output,
        options.subjects,
        options.steps,
        options.windows,
        options.of_class,
        options.permuted,
        options.subject_maps,
    )


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
    )
    return 0 if every else 1


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "pretrain": _pretrain,
    "scaling": _scaling,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "scores": _scores,
    "forecast": _forecast,
    "embed": _embed,
    "export": _export,
    "explain": _explain,
    "predict": _predict,
}
