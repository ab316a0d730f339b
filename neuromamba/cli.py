"""The `neuromamba` command: one subcommand for every stage of the pipeline.

Stage modules are imported only when their subcommand runs, so that `--help` and the light stages do
not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from neuromamba import __version__
from neuromamba.config import Config, load_config
from neuromamba.files import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit status 2 and one message on bad input, without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except InputError as error:
        print(f"neuromamba {options.stage}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuromamba", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"neuromamba {__version__}")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="stage")
    _add_demo_data(stages)
    _add(stages, "index", _index, "list the runs of a dataset's derivatives", ["dataset"])
    batched = ["dataset", "batch"]
    _add(stages, "volumes", _volumes, "resample runs to the common grid, as Zarr", batched)
    _add(stages, "tokens", _tokens, "index the brain patches of runs and pack them", batched)
    _add(stages, "rois", _rois, "ROI time series and functional connectivity", batched)
    _add(stages, "splits", _splits, "assign subjects to training, validation, test", ["dataset"])
    trained = ["dataset", "model", "seed"]
    options = [*trained, "on-change", "fraction"]
    _add(stages, "pretrain", _pretrain, "train a model without labels", options)
    text = "table, figure and power law of the scaling study"
    _add(stages, "scaling", _scaling, text, ["dataset"])
    supervised = [*trained, "target"]
    _add(stages, "finetune", _finetune, "train for one target", [*supervised, "on-change"])
    _add(stages, "evaluate", _evaluate, "predict the test subjects and score it", supervised)
    _add(stages, "forecast", _forecast, "forecast the test subjects' runs and score it", trained)
    _add_embed(_add(stages, "embed", _embed, "write embeddings of runs", trained))
    export = _add(stages, "export", _export, "write a pretrained model to be shared", trained)
    export.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    _add(stages, "report", _report, "write the report over all results", [])
    _add(stages, "summary", _summary, "print the main figures of all results", [])
    return parser


def _add(
    stages: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
    options: Sequence[str],
) -> argparse.ArgumentParser:
    stage = stages.add_parser(name, help=text, description=text.capitalize() + ".")
    stage.set_defaults(run=run)
    stage.add_argument(
        "--config",
        nargs="+",
        type=Path,
        default=[Path("config/config.yaml")],
        metavar="FILE",
        help="YAML files of the run, later ones on top (default: config/config.yaml)",
    )
    stage.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one setting, such as --set splits.test=0.3; may be given several times",
    )
    known = {
        "dataset": {"help": "a name under `datasets` (default: the only one)"},
        "model": {"help": "a name under `models` (default: the only one)"},
        "target": {"help": "a name under the dataset's `targets` (default: all in turn)"},
        "seed": {"type": int, "help": "seed of the training (default: the first of `seeds`)"},
        "batch": {"type": int, "help": "which of `compute.batches` jobs (default: all in turn)"},
        "fraction": {
            "type": float,
            "help": "make it a cell of the scaling study, on this share of the training subjects; "
            "models and seeds are then those under `scaling`",
        },
        "on-change": {
            "choices": ["refuse", "restart"],
            "default": "refuse",
            "help": "when a checkpoint was made under other settings: stop and show the "
            "difference, or start again (default: refuse)",
        },
    }
    for option in options:
        stage.add_argument(f"--{option}", **known[option])  # type: ignore[arg-type]
    return stage


def _add_embed(stage: argparse.ArgumentParser) -> None:
    text = "what gets one embedding each"
    stage.add_argument("--level", choices=["token", "run", "subject"], required=True, help=text)
    stage.add_argument("--output", type=Path, required=True, help="*.tsv, *.npz; tokens: a folder")
    instead = stage.add_mutually_exclusive_group()
    instead.add_argument("--target", help="by the model fine-tuned for it, not the pretrained one")
    text = "by the model in this folder, which `neuromamba export` wrote"
    instead.add_argument("--weights", type=Path, metavar="FOLDER", help=text)
    stage.add_argument("--runs", nargs="+", metavar="RUN", help="these alone (default: all)")
    stage.add_argument("--subjects", nargs="+", metavar="SUBJECT", help="the runs of these alone")
    stage.add_argument("--windows", type=int, default=8, help="windows a run (default: 8)")


def _add_demo_data(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write a synthetic BIDS dataset with known effects"
    stage = stages.add_parser("demo-data", help=text, description=text.capitalize() + ".")
    stage.set_defaults(run=_demo_data)
    stage.add_argument("folder", type=Path)
    stage.add_argument("--subjects", type=int, default=120)
    stage.add_argument("--volumes", type=int, default=80, help="volumes a run")
    stage.add_argument("--voxel-size", type=float, default=4.0, help="mm")
    stage.add_argument("--repetition-time", type=float, default=2.0, help="seconds")
    stage.add_argument("--runs", type=int, default=1, help="runs a subject")
    stage.add_argument("--seed", type=int, default=0)


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config, options.set)


def _choose(kind: str, name: str | None, known: Sequence[str]) -> str:
    """The name given, or the only one there is."""
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        given = f"{name!r} is none of them" if name else "choose one"
        raise InputError(f"--{kind}: the config has {', '.join(known)}; {given}")
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


def _index(options: argparse.Namespace) -> None:
    from neuromamba.bids import run_index

    config = _config(options)
    run_index(config, _dataset(options, config))


def _volumes(options: argparse.Namespace) -> None:
    from neuromamba.volumes import run_volumes

    config = _config(options)
    for batch in _batches(options, config):
        run_volumes(config, _dataset(options, config), batch)


def _tokens(options: argparse.Namespace) -> None:
    from neuromamba.tokens import run_tokens

    config = _config(options)
    for batch in _batches(options, config):
        run_tokens(config, _dataset(options, config), batch)


def _rois(options: argparse.Namespace) -> None:
    from neuromamba.rois import run_rois

    config = _config(options)
    for batch in _batches(options, config):
        run_rois(config, _dataset(options, config), batch)


def _splits(options: argparse.Namespace) -> None:
    from neuromamba.splits import run_splits

    config = _config(options)
    run_splits(config, _dataset(options, config))


def _pretrain(options: argparse.Namespace) -> None:
    from neuromamba.pretrain import run_pretrain

    config = _config(options)
    if options.fraction is not None:
        config = config.study()
    dataset, model, seed = _training(options, config, [*config.datasets, *config.mixtures])
    if dataset in config.datasets:
        dataset = config.pretrained_on(dataset, model)
    run_pretrain(config, dataset, model, seed, options.on_change, options.fraction)


def _scaling(options: argparse.Namespace) -> None:
    from neuromamba.scaling import run_scaling

    config = _config(options)
    names = [*config.datasets, *config.mixtures]
    run_scaling(config, _choose("dataset", options.dataset, names))


def _finetune(options: argparse.Namespace) -> None:
    from neuromamba.finetune import run_finetune

    config = _config(options)
    dataset, model, seed = _training(options, config)
    for target in _targets(options, config, dataset):
        run_finetune(config, dataset, model, seed, target, on_change=options.on_change)


def _evaluate(options: argparse.Namespace) -> None:
    from neuromamba.evaluate import run_evaluate

    config = _config(options)
    dataset, model, seed = _training(options, config)
    for target in _targets(options, config, dataset):
        run_evaluate(config, dataset, model, seed, target)


def _forecast(options: argparse.Namespace) -> None:
    from neuromamba.forecast import run_forecast

    config = _config(options)
    run_forecast(config, *_training(options, config))


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


def _report(options: argparse.Namespace) -> None:
    from neuromamba.report import run_report

    run_report(_config(options))


def _summary(options: argparse.Namespace) -> None:
    from neuromamba.report import summary

    print(summary(_config(options)))
