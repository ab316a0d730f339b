"""The stages of the pipeline: what each is set by, what code it runs, and what comes before it.

The workflow's rules, `dvc.yaml` and the keys that tell whether a result is current all follow this
one table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from neuromamba.config import Config, Dataset, Model
from neuromamba.layout import Layout
from neuromamba.qc_rules import has_rules
from neuromamba.raw_listing import raw_subjects

BATCHED = ("volumes", "tokens", "rois")
"""Stages that make an array of each run."""
TESTED = ("tokens", "rois")
"""Those of which a subject needs what its dataset has, to be trained on and tested."""
BY_BATCH = (*BATCHED, "anat", "qc", "codes")
STAGES = (
    "preprocess",
    "index",
    *BATCHED,
    "anat",
    "qc",
    "excluded",
    "overview",
    "splits",
    "tokenizer",
    "codes",
    "baselines",
    "pretrain",
    "finetune",
    "evaluate",
    "scores",
    "report",
    "forecast",
    "identify",
    "retrieve",
    "explain",
    "cell",
    "scaling",
    "ablations",
)
"""`cell` is one pretraining of the scaling study."""


STUDIES = ("forecast", "identify", "retrieve")
"""What is asked of a pretrained model as it is."""

_MODULES = {
    "index": "bids",
    "cell": "pretrain",
    "baselines": "baseline_predictions",
    "ablations": "compare",
}
"""Modules that are not named as their stage."""


@dataclass(frozen=True)
class Job:
    """One job of the pipeline: a stage, and which of its parts."""

    stage: str
    dataset: str = ""
    subject: str = ""
    batch: int | None = None
    fold: str = ""
    model: str = ""
    seed: int = 0
    target: str = ""
    fraction: float = 0.0

    def __str__(self) -> str:
        parts = [self.dataset, self.subject, self.model, self.target, self.fold]
        if self.batch is not None:
            parts.append(f"batch {self.batch}")
        if self.model:
            parts.append(f"seed {self.seed}")
        if self.fraction:
            parts.append(f"fraction {self.fraction:g}")
        return f"{self.stage} ({', '.join(filter(None, parts))})" if any(parts) else self.stage


def all_jobs(config: Config) -> list[Job]:
    """The jobs of the report and of the pages on quality, each after those it needs."""
    found: dict[Job, None] = {}

    def visit(job: Job) -> None:
        if job not in found:
            for earlier in jobs_before(config, job):
                visit(earlier)
            found[job] = None

    for name in config.datasets:
        visit(Job("overview", name))
    visit(Job("report"))
    return list(found)


def jobs_before(config: Config, job: Job) -> list[Job]:
    """The jobs whose results a job works on."""
    members = list(config.members(job.dataset)) if job.dataset else []
    match job.stage:
        case "preprocess":
            return []
        case "index":
            names = raw_subjects(config, job.dataset)
            return [Job("preprocess", job.dataset, subject=name) for name in names]
        case "volumes" | "anat":
            return [Job("index", job.dataset)]
        case "rois" if "volumes" not in config.datasets[job.dataset].arrays:
            return [Job("index", job.dataset)]
        case "tokens" | "rois":
            return [replace(job, stage="volumes")]
        case "qc":
            return [replace(job, stage="tokens")]
        case "tokenizer":
            made = _arrays(config, members, ["volumes"])
            return [Job("splits", job.dataset), *made, *_checked(config, members)]
        case "codes":
            volumes = replace(job, stage="volumes", fold="")
            first = [Job("splits", job.dataset), replace(job, stage="tokenizer", batch=None)]
            return [volumes, *(first if config.codes.trained else [])]
        case "splits":
            return [Job("excluded", job.dataset), *_arrays(config, members, TESTED)]
        case "excluded":
            return _arrays(config, members, BATCHED) + _checked(config, members)
        case "overview":
            has_images = config.datasets[job.dataset].series is None
            qc = _batches(config, members, "qc") if has_images else []
            return [Job("excluded", job.dataset), *qc]
        case "pretrain" | "cell":
            splits = [Job("splits", name) for name in members]
            # The scaling study is of the first fold.
            fold = config.splits.names[0] if job.stage == "cell" else job.fold
            made = _arrays(config, members, model_of(config, job).arrays, fold)
            return [*splits, *made, *_checked(config, members)]
        case "finetune":
            fresh = model_of(config, job).finetune.start == "fresh"
            made = _arrays(config, members, model_of(config, job).arrays, job.fold)
            first = made if fresh else [_pretrain(config, job)]
            return [Job("splits", job.dataset), *first, *_checked(config, members)]
        case "baselines":
            # Whoever has no tokens is not tested either.
            made = _arrays(config, members, TESTED)
            return [Job("splits", job.dataset), *made, *_checked(config, members)]
        case "evaluate" if is_pooled(config, job):
            folds = [replace(job, fold=name) for name in config.splits.names]
            return [Job("splits", job.dataset), *folds, *_checked(config, members)]
        case "evaluate":
            references = Job("baselines", job.dataset, target=job.target, fold=job.fold)
            trained = [replace(job, stage="finetune"), references]
            return [Job("splits", job.dataset), *trained, *_checked(config, members)]
        case "explain":
            # A map is compared with those of the other seeds.
            seeds = dict.fromkeys([job.seed, *config.seeds])
            tuned = [replace(job, stage="finetune", seed=seed) for seed in seeds]
            return [Job("splits", job.dataset), *tuned, *_checked(config, members)]
        case "scores":
            targets = config.datasets[job.dataset].targets
            evaluated = [replace(job, stage="evaluate", target=target) for target in targets]
            folds = [replace(job, fold=name) for name in config.splits.names]
            trained = [_pretrain(config, fold) for fold in folds]
            return [Job("excluded", job.dataset), *trained, *evaluated]
        case "forecast" | "identify" | "retrieve":
            first = [Job("splits", job.dataset), _pretrain(config, job)]
            besides = {"rois"} if job.stage == "identify" else set()
            wanted = {*model_of(config, job).arrays, *besides}
            read = [one for one in (*BATCHED, "anat", "codes") if one in wanted]
            made = _arrays(config, members, read, job.fold)
            return [*first, *made, *_checked(config, members)]
        case "scaling":
            return _cells(config, job.dataset)
        case "ablations":
            return [Job("scores", job.dataset, model=m, seed=s) for m, s in compared_by(config)]
        case "report":
            return [*_scored(config), *(Job("overview", name) for name in config.datasets)]
    raise ValueError(f"{job.stage!r} is no stage")


def extra_jobs(config: Config) -> list[Job]:
    """What the report shows where it has been made, though it asks for none of it."""
    jobs = []
    for name, model, seed in product(config.datasets, config.models, config.seeds):
        for fold in config.splits.names:
            job = Job("forecast", name, model=model, seed=seed, fold=fold)
            if model in config.pretrained_models:
                jobs += [replace(job, stage=stage) for stage in STUDIES]
            targets = config.datasets[name].subject_targets
            jobs += [replace(job, stage="explain", target=target) for target in targets]
        if model in config.ablations:
            jobs.append(Job("scores", name, model=model, seed=seed))
    return jobs + [Job("scaling", name) for name in (*config.datasets, *config.mixtures)]


def tested_arrays(dataset: Dataset) -> list[str]:
    """The arrays that a run must have for its subject to be trained on and tested.

    Volumes are not among them, for where there are tokens there are volumes.
    """
    return [stage for stage in TESTED if stage in dataset.arrays]


def is_pooled(config: Config, job: Job) -> bool:
    """Whether an evaluation puts those of all folds together."""
    return job.stage == "evaluate" and config.splits.protocol != "holdout" and not job.fold


def _batches(config: Config, datasets: list[str], stage: str, fold: str = "") -> list[Job]:
    numbers = range(config.compute.batches)
    return [Job(stage, name, batch=number, fold=fold) for name in datasets for number in numbers]


def _arrays(
    config: Config, datasets: list[str], stages: Iterable[str], fold: str = ""
) -> list[Job]:
    """The jobs of those of `stages` that make an array of a dataset's runs or subjects.

    Codes by a tokenizer that is trained on a fold's training subjects are that fold's own.
    """
    own = fold if config.codes.trained else ""
    return [
        job
        for stage in stages
        for name in datasets
        if stage in config.datasets[name].readable
        for job in _batches(config, [name], stage, own if stage == "codes" else "")
    ]


def _checked(config: Config, datasets: list[str]) -> list[Job]:
    """The jobs that tell which runs the rules of quality leave out."""
    return _batches(config, datasets, "qc") if has_rules(config) else []


def _pretrain(config: Config, job: Job) -> Job:
    where, model = config.pretraining_of(job.dataset, job.model)
    return Job("pretrain", where, model=model, seed=job.seed, fold=job.fold)


def _cells(config: Config, dataset: str) -> list[Job]:
    study = config.study()
    return [
        Job("cell", dataset, model=model, seed=seed, fraction=fraction)
        for model in study.models
        for fraction in study.scaling.fractions
        for seed in study.seeds
    ]


def compared_by(config: Config) -> list[tuple[str, int]]:
    """The models and seeds that stand in the table of ablations."""
    whole = [str(model.ablation_of) for model in config.ablations.values()]
    return list(product(dict.fromkeys([*whole, *config.ablations]), config.seeds))


def _scored(config: Config) -> list[Job]:
    """The results that the report is about; those of ablations are asked for by themselves."""
    return [
        Job("scores", name, model=model, seed=seed)
        for name in config.datasets
        for model in config.whole_models
        for seed in config.seeds
    ]


def output_of(config: Config, job: Job) -> Path:
    """The file that a job writes last."""
    layout = Layout.of(config.in_fold(job.fold), job.dataset)
    match job.stage:
        case "preprocess":
            return layout.preprocess(job.subject)
        case "index":
            return layout.index
        case "overview":
            return layout.overview
        case "tokenizer":
            return layout.tokenizer / "model.json"
        case "volumes" | "tokens" | "rois" | "anat" | "qc" | "codes":
            assert job.batch is not None
            return layout.manifest(job.stage, job.batch)
        case "splits":
            return layout.split if config.splits.protocol == "holdout" else layout.folds
        case "excluded":
            return layout.excluded
        case "pretrain":
            return layout.pretrain(job.model, job.seed) / "model.json"
        case "cell":
            return layout.cell(job.model, job.fraction, job.seed) / "model.json"
        case "finetune":
            return layout.finetune(job.model, job.seed, job.target) / "model.json"
        case "baselines":
            return layout.baselines(job.target) / "notes.json"
        case "evaluate":
            return layout.evaluate(job.model, job.seed, job.target) / "metrics.tsv"
        case "scores":
            return layout.scores(job.model, job.seed) / "metrics.json"
        case "forecast":
            return layout.forecast(job.model, job.seed) / "forecast.json"
        case "identify":
            return layout.identify(job.model, job.seed) / "identify.json"
        case "retrieve":
            return layout.retrieve(job.model, job.seed) / "retrieve.json"
        case "explain":
            return layout.explain(job.model, job.seed, job.target) / "explain.json"
        case "scaling":
            return layout.scaling / "fit.json"
        case "ablations":
            return layout.ablations / "leaderboard.json"
        case "report":
            return layout.results / "report" / "index.html"
    raise ValueError(f"{job.stage!r} is no stage")


def modules_of(config: Config, job: Job) -> tuple[str, ...]:
    """The modules that a job's stage begins in, and that of its model's family."""
    if job.stage == "preprocess":
        # What fMRIPrep made stays, however our code that calls it changes.
        return ("ants_engine",) if config.preprocess.engine == "ants" else ()
    first = _MODULES.get(job.stage, job.stage)
    if job.stage == "rois" and config.datasets[job.dataset].series is not None:
        first = "series_rois"
    if is_pooled(config, job):
        return ("pool",)
    if not job.model or job.stage == "scores":
        return (first,)
    return (first, f"models.{model_of(config, job).family}")


def model_of(config: Config, job: Job) -> Model:
    """The settings of a job's model; those of the scaling study may be models of its own."""
    models = config.study().models if job.stage == "cell" else config.models
    return models[job.model]
