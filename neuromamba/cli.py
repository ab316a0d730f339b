"""The `neuromamba` command: one subcommand for every stage of the pipeline.

What the subcommands do is in `commands`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from neuromamba import __version__
from neuromamba.files import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; exit status 2 and one message on bad input, without a traceback.

    `check` ends with 1 when a dataset cannot be used as it is, `predict` when a scan was refused.
    """
    options = _parser().parse_args(arguments)
    from neuromamba.commands import COMMANDS  # not before, so that `--help` is quick

    try:
        status = COMMANDS[options.stage](options)
        sys.stdout.flush()
    except InputError as error:
        print(f"neuromamba {options.stage}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads what is printed has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuromamba", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"neuromamba {__version__}")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="stage")
    _add_demo_data(stages)
    text = "tell in seconds what of a dataset will be used, what not and why, and what it will take"
    check = _add(stages, "check", text, [])
    check.add_argument("name", nargs="?", metavar="DATASET", help="a file in config/datasets/")
    check.add_argument("--format", choices=["table", "tsv", "json"], default="table")
    text = "bring raw scans to MNI space, subject by subject, by fMRIPrep or without a container"
    _add(stages, "preprocess", text, ["dataset", "subject"])
    _add(stages, "index", "list the runs of a dataset's derivatives", ["dataset"])
    batched = ["dataset", "batch"]
    _add(stages, "volumes", "resample runs to the common grid, as Zarr", batched)
    _add(stages, "tokens", "index the brain patches of runs and pack them", batched)
    _add(stages, "rois", "ROI time series and functional connectivity", batched)
    _add(stages, "anat", "resample T1-weighted images to the common grid", batched)
    _add(stages, "qc", "measure the quality of runs, with a page for each", batched)
    _add(stages, "overview", "compare the quality of all runs on one page", ["dataset"])
    _add(stages, "excluded", "list the runs that were left out, and why", ["dataset"])
    _add(stages, "splits", "assign subjects to training, validation, test", ["dataset"])
    options = ["dataset", "fold", "on-change"]
    _add(stages, "tokenizer", "train an autoencoder of slices, for `codes`", options)
    text = "encode the slices of runs' volumes, as 27 tokens a volume"
    _add(stages, "codes", text, [*batched, "fold"])
    trained = ["dataset", "model", "seed"]
    options = [*trained, "fold", "on-change", "fraction"]
    _add(stages, "pretrain", "train a model without labels", options)
    text = "table, figure and power law of the scaling study"
    _add(stages, "scaling", text, ["dataset"])
    text = "compare models with their ablations in one table"
    _add(stages, "ablations", text, ["dataset"])
    supervised = [*trained, "target", "fold"]
    text = "predict the test subjects by the baselines"
    _add(stages, "baselines", text, ["dataset", "target", "fold"])
    _add(stages, "finetune", "train for one target", [*supervised, "on-change"])
    evaluate = _add(stages, "evaluate", "predict the test subjects and score it", supervised)
    text = "of a cross-validation, put the folds together that have been evaluated"
    evaluate.add_argument("--pool", action="store_true", help=text)
    _add(stages, "scores", "write the figures of a model as JSON and TSV", trained)
    used = [*trained, "fold"]
    _add(stages, "forecast", "forecast the test subjects' runs and score it", used)
    text = "tell the test subjects apart, by two runs or the halves of one, and score it"
    _add(stages, "identify", text, used)
    text = "find test subjects' images by their networks and the other way, and prompt classes"
    _add(stages, "retrieve", text, used)
    _add_embed(_add(stages, "embed", "write embeddings of runs", used))
    export = _add(stages, "export", "write a pretrained model to be shared", used)
    export.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    text = "map where in the brain what a fine-tuned model says comes from, with checks of the map"
    _add_explain(_add(stages, "explain", text, used))
    _add_predict(stages)
    _add_compare(stages)
    _add(stages, "report", "write the report over all results", [])
    _add(stages, "summary", "print the main figures of all results", [])
    text = "check a dataset's arrays against the digests in its manifests"
    _add_verify(_add(stages, "verify", text, batched))
    _add_estimate(_add(stages, "estimate", "tell what a dataset would need in space and time", []))
    _add(stages, "status", "tell which results are missing or out of date, and why", [])
    text = "keep results that only changed code has put out of date, as you know it gives the same"
    _add(stages, "accept", text, [])
    text = "write data/DATASET/manifest.tsv, by which DVC can watch data that it does not hold"
    _add(stages, "manifest", text, ["dataset"])
    text = "record the finished results of config/config.yaml in DVC"
    record = stages.add_parser("record", help=text, description=text.capitalize() + ".")
    record.set_defaults(config=[Path("config/config.yaml")], set=[])  # which is what DVC records
    return parser


def _add(
    stages: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    options: Sequence[str],
) -> argparse.ArgumentParser:
    stage = stages.add_parser(name, help=text, description=text.capitalize() + ".")
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
        "subject": {"help": "a subject, such as sub-01 (default: all in turn)"},
        "batch": {"type": int, "help": "which of `compute.batches` jobs (default: all in turn)"},
        "fold": {
            "help": "of a cross-validation, such as fold-0 (default: all in turn; embed, export "
            "and explain need one)"
        },
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


def _add_explain(stage: argparse.ArgumentParser) -> None:
    text = "a name under the dataset's `targets` (default: all; with --output, the only one)"
    stage.add_argument("--target", help=text)
    text = "a folder that is not there yet (default: the model's own, as `snakemake explain`)"
    stage.add_argument("--output", type=Path, metavar="FOLDER", help=text)
    text = "these alone (default: test subjects, as many as explain.subjects)"
    stage.add_argument("--subjects", nargs="+", metavar="SUBJECT", help=text)
    text = "which is explained against the others (default: the last of the target's `classes`)"
    stage.add_argument("--class", dest="of_class", metavar="CLASS", help=text)
    text = "gradients taken for each window (default: explain.steps)"
    stage.add_argument("--steps", type=int, metavar="N", help=text)
    stage.add_argument("--windows", type=int, help="windows a run (default: explain.windows)")
    text = "finetune/TARGET of the same model trained on permuted labels, to compare its map"
    stage.add_argument("--permuted", type=Path, metavar="FOLDER", help=text)
    text = "write the map of each subject too"
    stage.add_argument("--subject-maps", action="store_true", help=text)


def _add_verify(stage: argparse.ArgumentParser) -> None:
    every = ["volumes", "tokens", "rois", "anat", "codes"]
    text = "whose arrays (default: all that there are)"
    stage.add_argument("--stage", nargs="+", choices=every, dest="of_stages", help=text)
    stage.add_argument("--jobs", type=int, default=1, metavar="N", help="threads (default: 1)")
    text = "check also the files that the arrays were made from"
    stage.add_argument("--sources", action="store_true", help=text)
    text = "compare sizes and keys only; damage inside of a file is not seen"
    stage.add_argument("--quick", action="store_true", help=text)
    text = "write a table of all that is wrong"
    stage.add_argument("--output", type=Path, metavar="FILE", help=text)
    text = "remove arrays that have changed, and the lists of batches where something is wrong"
    stage.add_argument("--discard", action="store_true", help=text)


def _add_estimate(stage: argparse.ArgumentParser) -> None:
    stage.add_argument("--subjects", type=int, required=True)
    stage.add_argument("--runs", type=int, default=1, help="of each subject (default: 1)")
    stage.add_argument("--volumes", type=int, required=True, help="of each run")
    stage.add_argument("--subjects-per-job", type=int, default=256, help="(default: 256)")
    text = "RESULTS/DATASET whose finished batches are measured (default: the package's figures)"
    stage.add_argument("--measured", type=Path, metavar="FOLDER", help=text)
    stage.add_argument("--format", choices=["table", "tsv", "json"], default="table")


def _add_predict(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "predict new scans by a fine-tuned model, with intervals and warnings"
    stage = stages.add_parser("predict", help=text, description=text.capitalize() + ".")
    text = "folder of a fine-tuned model: results/DATASET/MODEL/seed-0/finetune/TARGET"
    stage.add_argument("model", type=Path, metavar="MODEL", help=text)
    text = (
        "NIfTI file of a run (or of a T1w image, for a model that reads these) in the model's "
        "space, or folder of derivatives"
    )
    stage.add_argument("scans", nargs="+", type=Path, metavar="SCAN", help=text)
    stage.add_argument("--output", type=Path, metavar="FILE", help="write the table as TSV")
    text = "a row for each run, or for each subject by all its runs (default: run)"
    stage.add_argument("--level", choices=["run", "subject"], default="run", help=text)
    text = "of intervals and sets of classes (default: 0.9)"
    stage.add_argument("--confidence", type=float, default=0.9, metavar="SHARE", help=text)
    text = "brain mask of the one scan given (default: found by its BIDS name)"
    stage.add_argument("--mask", type=Path, metavar="FILE", help=text)
    text = "space of scans whose names do not tell it, such as MNI152NLin2009cAsym"
    stage.add_argument("--space", help=text)
    text = "which res- to take from folders that hold several"
    stage.add_argument("--resolution", metavar="RES", help=text)
    text = "of scans without a sidecar that tells it"
    stage.add_argument("--repetition-time", type=float, metavar="SECONDS", help=text)
    text = "predict also where the repetition time is far from those of the training"
    stage.add_argument("--any-repetition-time", action="store_true", help=text)
    stage.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    text = "write a NIfTI map of where each prediction comes from"
    stage.add_argument("--explain", type=Path, metavar="FOLDER", help=text)
    text = "of a model that reads regions, the atlas that it was trained with: a file or a name"
    stage.add_argument("--atlas", metavar="ATLAS", help=text)
    text = "of a model that reads codes, the folder of the tokenizer that it was trained with"
    stage.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=text)


def _add_compare(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "rank the models of several runs on the same test subjects, with paired comparisons"
    stage = stages.add_parser("compare", help=text, description=text.capitalize() + ".")
    text = "results folder of a run, or a folder of a dataset, model or evaluation in it"
    stage.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=text)
    stage.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a folder")
    text = "resamples of the subjects (default: 2000)"
    stage.add_argument("--bootstrap", type=int, default=2000, metavar="N", help=text)
    text = "coverage of the intervals (default: 0.95)"
    stage.add_argument("--confidence", type=float, default=0.95, metavar="SHARE", help=text)
    text = "shuffles for p (default: 5000)"
    stage.add_argument("--permutations", type=int, default=5000, metavar="N", help=text)
    text = "of resamples and shuffles (default: 0)"
    stage.add_argument("--seed", type=int, default=0, help=text)


def _add_demo_data(stages: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "write a synthetic BIDS dataset with known effects"
    stage = stages.add_parser("demo-data", help=text, description=text.capitalize() + ".")
    stage.add_argument("folder", type=Path)
    stage.add_argument("--subjects", type=int, default=120)
    stage.add_argument("--volumes", type=int, default=80, help="volumes a run")
    stage.add_argument("--voxel-size", type=float, default=4.0, help="mm")
    stage.add_argument("--repetition-time", type=float, default=2.0, help="seconds")
    stage.add_argument("--runs", type=int, default=1, help="runs a subject")
    stage.add_argument("--seed", type=int, default=0)
