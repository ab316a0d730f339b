"""What each subcommand of `neuromamba` does.

Stage modules are imported only when their subcommand runs, so that the light stages do not wait for
torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from neuromamba.config import Config, load_config
from neuromamba.files import InputError
from neuromamba.launch import start_processes
from neuromamba.recording import recorded
from neuromamba.stages import Job

SHOWN = 20
"""Names that an error message lists."""


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config, options.set)


def _choose(kind: str, name: str | None, known: Sequence[str]) -> str:
    """The name given, or the only one there is."""
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        given = f"{name!r} is none of them" if name else "choose one"
        listed = ", ".join([*known[:SHOWN], *(["..."] if len(known) > SHOWN else [])])
        raise InputError(f"--{kind}: the config has {listed}; {given}")
    return name


def _dataset(options: argparse.Namespace, config: Config) -> str:
    return _choose("dataset", options.dataset, list(config.datasets))


def _training(
    options: argparse.Namespace, config: Config, datasets: Sequence[str] = ()
) -> tuple[str, str, int]:
    model = _choose("model", options.model, list(config.models))
    seed = config.seeds[0] if options.seed is None else options.seed
    return _choose("dataset", options.dataset, datasets or list(config.datasets)), model, seed


def _targets(options: argparse.Namespace, config: Config, dataset: str) -> list[str]:
    known = list(config.datasets[dataset].targets)
    if not known:
        raise InputError(f"--target: dataset {dataset} names no targets in its YAML file")
    return known if options.target is None else [_choose("target", options.target, known)]


def _batches(options: argparse.Namespace, config: Config) -> list[int]:
    every = list(range(config.compute.batches))
    if options.batch is None:
        return every
    if options.batch not in every:
        raise InputError(f"--batch {options.batch}: compute.batches allows 0 to {every[-1]}")
    return [options.batch]


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


def _preprocess(options: argparse.Namespace) -> None:
    from neuromamba.preprocess import run_preprocess
    from neuromamba.raw_listing import raw_subjects

    config = _config(options)
    dataset = _dataset(options, config)
    names = list(raw_subjects(config, dataset))
    if not names:
        raise InputError(
            f"--dataset: {dataset} names no raw scans (`bids` in its YAML file), so there is "
            "nothing to preprocess"
        )
    chosen = names if options.subject is None else [_choose("subject", options.subject, names)]
    for name in chosen:
        with recorded(config, Job("preprocess", dataset, subject=name)):
            run_preprocess(config, dataset, name)


def _index(options: argparse.Namespace) -> None:
    from neuromamba.bids import run_index
    from neuromamba.participants import check_participants

    config = _config(options)
    dataset = _dataset(options, config)
    with recorded(config, Job("index", dataset)):
        subjects = run_index(config, dataset)
        check_participants(config.datasets[dataset], subjects)


def _each_batch(options: argparse.Namespace, run: Callable[[Config, str, int], None]) -> None:
    config = _config(options)
    dataset = _dataset(options, config)
    for batch in _batches(options, config):
        with recorded(config, Job(options.stage, dataset, batch=batch)):
            run(config, dataset, batch)


def _volumes(options: argparse.Namespace) -> None:
    from neuromamba.volumes import run_volumes

    _each_batch(options, run_volumes)


def _tokens(options: argparse.Namespace) -> None:
    from neuromamba.tokens import run_tokens

    _each_batch(options, run_tokens)


def _rois(options: argparse.Namespace) -> None:
    from neuromamba.rois import run_rois

    _each_batch(options, run_rois)


def _anat(options: argparse.Namespace) -> None:
    from neuromamba.anat import run_anat

    _each_batch(options, run_anat)


def _qc(options: argparse.Namespace) -> None:
    from neuromamba.qc import run_qc

    _each_batch(options, run_qc)


def _overview(options: argparse.Namespace) -> None:
    from neuromamba.overview import run_overview

    config = _config(options)
    dataset = _dataset(options, config)
    with recorded(config, Job("overview", dataset)):
        run_overview(config, dataset)


def _excluded(options: argparse.Namespace) -> None:
    from neuromamba.excluded import run_excluded

    config = _config(options)
    dataset = _dataset(options, config)
    with recorded(config, Job("excluded", dataset)):
        run_excluded(config, dataset)


def _splits(options: argparse.Namespace) -> None:
    from neuromamba.splits import run_splits

    config = _config(options)
    dataset = _dataset(options, config)
    with recorded(config, Job("splits", dataset)):
        run_splits(config, dataset)


def _pretrain(options: argparse.Namespace) -> None:
    config, fraction = _config(options), options.fraction
    start_processes(config.compute)
    from neuromamba.pretrain import run_pretrain

    if fraction is not None:
        config = config.study()
    dataset, model, seed = _training(options, config, [*config.datasets, *config.mixtures])
    if dataset in config.datasets:
        dataset = config.pretrained_on(dataset, model)
    stage = "pretrain" if fraction is None else "cell"
    job = Job(stage, dataset, model=model, seed=seed, fraction=fraction or 0.0)
    with recorded(config, job):
        run_pretrain(config, dataset, model, seed, options.on_change, fraction)


def _scaling(options: argparse.Namespace) -> None:
    from neuromamba.scaling import run_scaling

    config = _config(options)
    dataset = _choose("dataset", options.dataset, [*config.datasets, *config.mixtures])
    with recorded(config, Job("scaling", dataset)):
        run_scaling(config, dataset)


def _finetune(options: argparse.Namespace) -> None:
    config = _config(options)
    start_processes(config.compute)
    from neuromamba.finetune import run_finetune

    dataset, model, seed = _training(options, config)
    for target in _targets(options, config, dataset):
        with recorded(config, Job("finetune", dataset, model=model, seed=seed, target=target)):
            run_finetune(config, dataset, model, seed, target, on_change=options.on_change)


def _evaluate(options: argparse.Namespace) -> None:
    from neuromamba.evaluate import run_evaluate

    config = _config(options)
    dataset, model, seed = _training(options, config)
    for target in _targets(options, config, dataset):
        with recorded(config, Job("evaluate", dataset, model=model, seed=seed, target=target)):
            run_evaluate(config, dataset, model, seed, target)


def _scores(options: argparse.Namespace) -> None:
    from neuromamba.scores import run_scores

    config = _config(options)
    dataset, model, seed = _training(options, config)
    with recorded(config, Job("scores", dataset, model=model, seed=seed)):
        run_scores(config, dataset, model, seed)


def _forecast(options: argparse.Namespace) -> None:
    from neuromamba.forecast import run_forecast

    config = _config(options)
    dataset, model, seed = _training(options, config)
    with recorded(config, Job("forecast", dataset, model=model, seed=seed)):
        run_forecast(config, dataset, model, seed)


def _embed(options: argparse.Namespace) -> None:
    from neuromamba.embed import open_embedder, open_shared, run_embed

    config = _config(options)
    if options.weights:
        dataset, embedder = _dataset(options, config), open_shared(config, options.weights)
    else:
        dataset, model, seed = _training(options, config)
        target = options.target and _targets(options, config, dataset)[0]
        embedder = open_embedder(config, dataset, model, seed, target)
    chosen = (options.runs, options.subjects, options.windows)
    run_embed(config, dataset, embedder, options.level, options.output, *chosen)


def _export(options: argparse.Namespace) -> None:
    from neuromamba.export import run_export

    config = _config(options)
    run_export(config, *_training(options, config), options.output)


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


def _report(options: argparse.Namespace) -> None:
    from neuromamba.report import run_report

    config = _config(options)
    with recorded(config, Job("report")):
        run_report(config)


def _summary(options: argparse.Namespace) -> None:
    from neuromamba.report import summary

    print(summary(_config(options)))


def _check(options: argparse.Namespace) -> int:
    from neuromamba.check import run_check

    chosen = [f"datasets=[{options.name}]"] if options.name else []
    config = load_config(options.config, [*chosen, *options.set])
    checked = run_check(
        config, _choose("dataset", options.name, list(config.datasets)), options.format
    )
    print(checked.text)
    return 0 if checked.ok else 1


def _verify(options: argparse.Namespace) -> None:
    from neuromamba.verify import run_verify

    config = _config(options)
    text = run_verify(
        config,
        _dataset(options, config),
        options.of_stages,
        None if options.batch is None else _batches(options, config),
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
    print(run_estimate(_config(options), Plan(*counts), options.measured, options.format))


def _status(options: argparse.Namespace) -> None:
    from neuromamba.status import what_is_stale

    lines = what_is_stale(_config(options))
    print("\n".join(lines) if lines else "everything is up to date")


def _accept(options: argparse.Namespace) -> None:
    from neuromamba.status import accept_code

    for job in accept_code(_config(options)):
        print(f"accepted: {job}")


def _manifest(options: argparse.Namespace) -> None:
    from neuromamba.data_manifest import write_manifest

    config = _config(options)
    dataset = _dataset(options, config)
    write_manifest(config.datasets[dataset], dataset)


def _record(options: argparse.Namespace) -> None:
    from neuromamba.status import record_in_dvc

    record_in_dvc(_config(options))


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "demo-data": _demo_data,
    "check": _check,
    "preprocess": _preprocess,
    "index": _index,
    "volumes": _volumes,
    "tokens": _tokens,
    "rois": _rois,
    "anat": _anat,
    "qc": _qc,
    "overview": _overview,
    "excluded": _excluded,
    "splits": _splits,
    "pretrain": _pretrain,
    "scaling": _scaling,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "scores": _scores,
    "forecast": _forecast,
    "embed": _embed,
    "export": _export,
    "predict": _predict,
    "report": _report,
    "summary": _summary,
    "verify": _verify,
    "estimate": _estimate,
    "status": _status,
    "accept": _accept,
    "manifest": _manifest,
    "record": _record,
}
