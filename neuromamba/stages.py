"""The stages of the pipeline: what each is set by, what code it runs, and what comes before it.

The workflow's rules, `dvc.yaml` and the keys that tell whether a result is current all follow this
one table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuromamba.config import Classification, Config, Dataset, Model
from neuromamba.layout import Layout
from neuromamba.qc_rules import has_rules, rules_of
from neuromamba.raw_listing import raw_subjects

BATCHED = ("volumes", "tokens", "rois")
"""Stages that make an array of each run."""
BY_BATCH = (*BATCHED, "anat", "qc")
STAGES = (
    "preprocess",
    "index",
    *BY_BATCH,
    "excluded",
    "overview",
    "splits",
    "pretrain",
    "finetune",
    "evaluate",
    "scores",
    "report",
    "forecast",
    "cell",
    "scaling",
)
"""`cell` is one pretraining of the scaling study."""


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
        case "tokens" | "rois":
            return [replace(job, stage="volumes")]
        case "qc":
            return [replace(job, stage="tokens")]
        case "splits":
            made = [*_batches(config, members, "tokens"), *_batches(config, members, "rois")]
            return [Job("excluded", job.dataset), *made]
        case "excluded":
            made = [one for stage in BATCHED for one in _batches(config, members, stage)]
            return made + _checked(config, members)
        case "overview":
            return [Job("excluded", job.dataset), *_batches(config, members, "qc")]
        case "pretrain" | "cell":
            splits = [Job("splits", name) for name in members]
            tokens = _batches(config, members, "tokens")
            return [*splits, *tokens, *_checked(config, members)]
        case "finetune":
            first = [Job("splits", job.dataset), _pretrain(config, job)]
            return first + _checked(config, members)
        case "evaluate":
            tuned = replace(job, stage="finetune")
            rois = _batches(config, members, "rois")
            return [Job("splits", job.dataset), tuned, *rois, *_checked(config, members)]
        case "scores":
            targets = config.datasets[job.dataset].targets
            evaluated = [replace(job, stage="evaluate", target=target) for target in targets]
            return [Job("excluded", job.dataset), _pretrain(config, job), *evaluated]
        case "forecast":
            first = [Job("splits", job.dataset), _pretrain(config, job)]
            return [*first, *_batches(config, members, "tokens"), *_checked(config, members)]
        case "scaling":
            return _cells(config, job.dataset)
        case "report":
            return _scored(config)
    raise ValueError(f"{job.stage!r} is no stage")


def _batches(config: Config, datasets: list[str], stage: str) -> list[Job]:
    numbers = range(config.compute.batches)
    return [Job(stage, name, batch=number) for name in datasets for number in numbers]


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


def _scored(config: Config) -> list[Job]:
    return [
        Job("scores", name, model=model, seed=seed)
        for name in config.datasets
        for model in config.models
        for seed in config.seeds
    ]


def output_of(config: Config, job: Job) -> Path:
    """The file that a job writes last."""
    layout = Layout.of(config, job.dataset)
    match job.stage:
        case "preprocess":
            return layout.preprocess(job.subject)
        case "index":
            return layout.index
        case "overview":
            return layout.overview
        case "volumes" | "tokens" | "rois" | "anat" | "qc":
            assert job.batch is not None
            return layout.manifest(job.stage, job.batch)
        case "splits":
            return layout.split
        case "excluded":
            return layout.excluded
        case "pretrain":
            return layout.pretrain(job.model, job.seed) / "model.json"
        case "cell":
            return layout.cell(job.model, job.fraction, job.seed) / "model.json"
        case "finetune":
            return layout.finetune(job.model, job.seed, job.target) / "model.json"
        case "evaluate":
            return layout.evaluate(job.model, job.seed, job.target) / "metrics.tsv"
        case "scores":
            return layout.scores(job.model, job.seed) / "metrics.json"
        case "forecast":
            return layout.forecast(job.model, job.seed) / "forecast.json"
        case "scaling":
            return layout.scaling / "fit.json"
        case "report":
            return layout.results / "report" / "index.html"
    raise ValueError(f"{job.stage!r} is no stage")


def modules_of(config: Config, job: Job) -> tuple[str, ...]:
    """The modules that a job's stage begins in, and that of its model's family."""
    if job.stage == "preprocess":
        # What fMRIPrep made stays, however our code that calls it changes.
        return ("ants_engine",) if config.preprocess.engine == "ants" else ()
    first = {"index": "bids", "cell": "pretrain"}.get(job.stage, job.stage)
    if not job.model or job.stage == "scores":
        return (first,)
    return (first, f"models.{model_of(config, job).family}")


def model_of(config: Config, job: Job) -> Model:
    """The settings of a job's model; those of the scaling study may be models of its own."""
    models = config.study().models if job.stage == "cell" else config.models
    return models[job.model]


def settings_of(config: Config, job: Job) -> dict[str, Any]:
    """The settings that a job's result depends on beside those of the jobs before it, JSON-able."""
    if job.stage in ("pretrain", "cell", "finetune", "forecast", "evaluate"):
        return _settings_of_training(config, job)
    dataset = config.datasets.get(job.dataset)
    match job.stage:
        case "preprocess":
            assert dataset is not None
            return {"space": dataset.space, **_settings_of_engine(config)}
        case "index":
            assert dataset is not None
            keys = {"space", "repetition_time"}
            return {"dataset": dataset.model_dump(mode="json", include=keys)}
        case "volumes":
            assert dataset is not None
            own = {"space": dataset.space, "time_patch": config.tokens.time_patch}
            return {"volumes": config.volumes.model_dump(mode="json"), **own}
        case "anat":
            assert dataset is not None
            grid = config.volumes.model_dump(mode="json", include={"shape", "voxel_size"})
            return {"grid": grid, "space": dataset.space, "resolution": dataset.resolution}
        case "qc":
            return {"qc": config.qc.model_dump(mode="json", include={"fd_threshold", "pages"})}
        case "excluded":
            rules = rules_of(config.qc)
            return {"rules": rules} if rules else {}
        case "overview":
            return {"outlier": config.qc.outlier}
        case "tokens" | "rois":
            return {job.stage: getattr(config, job.stage).model_dump(mode="json")}
        case "splits":
            assert dataset is not None
            participants, target = dataset.participants, stratified_by(dataset)
            return {
                "splits": config.splits.model_dump(mode="json"),
                "site_column": participants and participants.site_column,
                "stratified_by": target and {target: target_settings(dataset, target)},
            }
        case "scaling":
            return {key: getattr(config.evaluate, key) for key in ("bootstrap", "confidence")}
    return {}


def _settings_of_engine(config: Config) -> dict[str, Any]:
    engine = config.preprocess.engine
    section = {"docker": "fmriprep", "apptainer": "fmriprep"}.get(engine, engine)
    settings = config.preprocess.model_dump(mode="json")
    return {"engine": engine, section: settings.get(section)}


def _settings_of_training(config: Config, job: Job) -> dict[str, Any]:
    model, evaluate = model_of(config, job), config.evaluate.model_dump(mode="json")
    match job.stage:
        case "pretrain" | "cell":
            # Weights to start from are an input; how many checkpoints there are changes nothing.
            dumped = model.model_dump(mode="json", exclude={"base", "finetune"})
            for key in ("init_from", "keep_checkpoints"):
                dumped["pretrain"].pop(key)
            own: dict[str, Any] = {"model": dumped, "members": config.members(job.dataset)}
            cell = {"fraction": job.fraction, "steps": config.scaling.steps}
            return own | {"seed": job.seed} | (cell if job.stage == "cell" else {})
        case "finetune":
            dumped = model.finetune.model_dump(mode="json", exclude={"keep_checkpoints"})
            target = target_settings(config.datasets[job.dataset], job.target)
            return {"finetune": dumped, "target": target, "seed": job.seed}
        case "forecast":
            kept = ("bootstrap", "confidence", "allow_seen_subjects")
            own = {"forecast": config.forecast.model_dump(mode="json")}
            return own | {"evaluate": {key: evaluate[key] for key in kept}}
    return {"evaluate": evaluate}


def stratified_by(dataset: Dataset) -> str | None:
    """The target that a split is stratified by: the first classification, or else the first."""
    classes = [n for n, target in dataset.targets.items() if isinstance(target, Classification)]
    return next(iter([*classes, *dataset.targets]), None)


def target_settings(dataset: Dataset, name: str) -> dict[str, Any]:
    """A target's section, with its classes as a list, because their order has a meaning."""
    target = dataset.targets[name]
    settings = target.model_dump(mode="json")
    if isinstance(target, Classification):
        settings["classes"] = [list(pair) for pair in target.classes.items()]
    return settings
