"""What the subcommands take from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from neuromamba.config import Config, load_config
from neuromamba.files import InputError

SHOWN = 20
"""Names that an error message lists."""


def read_config(options: argparse.Namespace) -> Config:
    """The config that the options of a subcommand name."""
    return load_config(options.config, options.set)


def choose(kind: str, name: str | None, known: Sequence[str]) -> str:
    """The name given, or the only one there is."""
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        given = f"{name!r} is none of them" if name else "choose one"
        listed = ", ".join([*known[:SHOWN], *(["..."] if len(known) > SHOWN else [])])
        raise InputError(f"--{kind}: the config has {listed}; {given}")
    return name


def choose_dataset(options: argparse.Namespace, config: Config) -> str:
    """The dataset that is asked for."""
    return choose("dataset", options.dataset, list(config.datasets))


def choose_training(
    options: argparse.Namespace, config: Config, datasets: Sequence[str] = ()
) -> tuple[str, str, int]:
    """Dataset (or one of `datasets`), model and seed that are asked for."""
    model = choose("model", options.model, list(config.models))
    seed = config.seeds[0] if options.seed is None else options.seed
    return choose("dataset", options.dataset, datasets or list(config.datasets)), model, seed


def choose_targets(options: argparse.Namespace, config: Config, dataset: str) -> list[str]:
    """The target that is asked for, or all of the dataset."""
    known = list(config.datasets[dataset].targets)
    if not known:
        raise InputError(f"--target: dataset {dataset} names no targets in its YAML file")
    return known if options.target is None else [choose("target", options.target, known)]


def choose_folds(options: argparse.Namespace, config: Config) -> list[Config]:
    """The config for the fold that is asked for, or for all in turn; of a holdout, itself."""
    names = config.splits.names
    if options.fold is not None:
        if config.splits.protocol == "holdout":
            raise InputError(
                f"--fold {options.fold}: splits.protocol is holdout, which has no folds; leave "
                "--fold out, or set splits.protocol"
            )
        names = [choose("fold", options.fold, names)]
    return [config.in_fold(name) for name in names]


def choose_fold(options: argparse.Namespace, config: Config) -> Config:
    """The config for the fold that is asked for, which a cross-validation leaves no choice."""
    if options.fold is None and config.splits.protocol != "holdout":
        choose("fold", None, config.splits.names)
    return choose_folds(options, config)[0]


def choose_batches(options: argparse.Namespace, config: Config) -> list[int]:
    """The batch that is asked for, or all."""
    every = list(range(config.compute.batches))
    if options.batch is None:
        return every
    if options.batch not in every:
        raise InputError(f"--batch {options.batch}: compute.batches allows 0 to {every[-1]}")
    return [options.batch]
