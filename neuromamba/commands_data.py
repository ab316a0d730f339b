"""Subcommands that prepare and check the data.

Stage modules are imported only when their subcommand runs, so that the light stages do not wait for
torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from neuromamba.command_options import (
    choose,
    choose_batches,
    choose_dataset,
    choose_folds,
    read_config,
)
from neuromamba.config import Config, load_config
from neuromamba.files import InputError
from neuromamba.keys import Keys
from neuromamba.recording import recorded
from neuromamba.stages import Job


def _demo_data(options: argparse.Namespace) -> None:
    from neuromamba.demo import write_demo

    write_demo(
        options.folder,
        subjects=options.subjects,
        volumes=options.volumes,
        seed=options.seed,
        voxel_size=options.voxel_size,
        repetition_time=options.repetition_time,
        runs=options.runs,
    )


def _check(options: argparse.Namespace) -> int:
    from neuromamba.check import run_check

    chosen = [f"datasets=[{options.name}]"] if options.name else []
    config = load_config(options.config, [*chosen, *options.set])
    checked = run_check(
        config, choose("dataset", options.name, list(config.datasets)), options.format
    )
    print(checked.text)
    return 0 if checked.ok else 1


def _preprocess(options: argparse.Namespace) -> None:
    from neuromamba.preprocess import run_preprocess
    from neuromamba.raw_listing import raw_subjects

    config = read_config(options)
    dataset = choose_dataset(options, config)
    names = list(raw_subjects(config, dataset))
    if not names:
        raise InputError(
            f"--dataset: {dataset} names no raw scans (`bids` in its YAML file), so there is "
            "nothing to preprocess"
        )
    chosen = names if options.subject is None else [choose("subject", options.subject, names)]
    for name in chosen:
        with recorded(config, Job("preprocess", dataset, subject=name)):
            run_preprocess(config, dataset, name)


def _index(options: argparse.Namespace) -> None:
    from neuromamba.bids import run_index
    from neuromamba.participants import check_participants

    config = read_config(options)
    dataset = choose_dataset(options, config)
    with recorded(config, Job("index", dataset)):
        subjects = run_index(config, dataset)
        check_participants(config.datasets[dataset], subjects)


def _each_batch(options: argparse.Namespace, run: Callable[[Config, str, int], None]) -> None:
    config = read_config(options)
    dataset = choose_dataset(options, config)
    _refuse_without_images(config, dataset, options.stage)
    for batch in choose_batches(options, config):
        with recorded(config, Job(options.stage, dataset, batch=batch)):
            run(config, dataset, batch)


def _refuse_without_images(config: Config, dataset: str, stage: str) -> None:
    if stage != "rois" and config.datasets[dataset].series is not None:
        raise InputError(
            f"--dataset: {dataset} has ROI series (`series` in its YAML file) and no images, so "
            f"there is nothing to do for {stage}; its stages are index, rois, excluded, overview, "
            "splits and baselines"
        )


def _volumes(options: argparse.Namespace) -> None:
    from neuromamba.volumes import run_volumes

    _each_batch(options, run_volumes)


def _tokens(options: argparse.Namespace) -> None:
    from neuromamba.tokens import run_tokens

    _each_batch(options, run_tokens)


def _rois(options: argparse.Namespace) -> None:
    config = read_config(options)
    if config.datasets[choose_dataset(options, config)].series is not None:
        from neuromamba.series_rois import run_series as run
    else:
        from neuromamba.rois import run_rois as run

    _each_batch(options, run)


def _anat(options: argparse.Namespace) -> None:
    from neuromamba.anat import run_anat

    _each_batch(options, run_anat)


def _tokenizer(options: argparse.Namespace) -> None:
    from neuromamba.tokenizer import run_tokenizer

    config = read_config(options)
    dataset = choose_dataset(options, config)
    _refuse_without_images(config, dataset, options.stage)
    for fold in choose_folds(options, config):
        with recorded(fold, Job("tokenizer", dataset, fold=fold.fold)):
            run_tokenizer(fold, dataset, options.on_change)


def _codes(options: argparse.Namespace) -> None:
    from neuromamba.codes import run_codes

    config = read_config(options)
    dataset = choose_dataset(options, config)
    _refuse_without_images(config, dataset, options.stage)
    # Published weights have seen nobody of the dataset, so that their codes serve all folds.
    for fold in choose_folds(options, config) if config.codes.trained else [config]:
        for batch in choose_batches(options, config):
            with recorded(fold, Job("codes", dataset, batch=batch, fold=fold.fold)):
                run_codes(fold, dataset, batch)


def _qc(options: argparse.Namespace) -> None:
    from neuromamba.qc import run_qc

    _each_batch(options, run_qc)


def _overview(options: argparse.Namespace) -> None:
    from neuromamba.overview import run_overview

    config = read_config(options)
    dataset = choose_dataset(options, config)
    with recorded(config, Job("overview", dataset)):
        run_overview(config, dataset)


def _excluded(options: argparse.Namespace) -> None:
    from neuromamba.excluded import run_excluded

    config = read_config(options)
    dataset = choose_dataset(options, config)
    with recorded(config, Job("excluded", dataset)):
        run_excluded(config, dataset)


def _splits(options: argparse.Namespace) -> None:
    from neuromamba.splits import run_splits

    config = read_config(options)
    dataset = choose_dataset(options, config)
    kept = Keys(config).kept_repeats(dataset)
    with recorded(config, Job("splits", dataset)):
        run_splits(config, dataset, kept)


def _verify(options: argparse.Namespace) -> None:
    from neuromamba.verify import run_verify

    config = read_config(options)
    text = run_verify(
        config,
        choose_dataset(options, config),
        options.of_stages,
        None if options.batch is None else choose_batches(options, config),
        options.jobs,
        options.sources,
        options.quick,
        options.output,
        options.discard,
    )
    print(text)


def _estimate(options: argparse.Namespace) -> None:
    from neuromamba.estimate import Plan, run_estimate

    counts = (options.subjects, options.runs, options.volumes, options.subjects_per_job)
    print(run_estimate(read_config(options), Plan(*counts), options.measured, options.format))


def _manifest(options: argparse.Namespace) -> None:
    from neuromamba.data_manifest import write_manifest

    config = read_config(options)
    dataset = choose_dataset(options, config)
    write_manifest(config.datasets[dataset], dataset)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo-data": _demo_data,
    "check": _check,
    "preprocess": _preprocess,
    "index": _index,
    "volumes": _volumes,
    "tokens": _tokens,
    "rois": _rois,
    "anat": _anat,
    "tokenizer": _tokenizer,
    "codes": _codes,
    "qc": _qc,
    "overview": _overview,
    "excluded": _excluded,
    "splits": _splits,
    "verify": _verify,
    "estimate": _estimate,
    "manifest": _manifest,
}
