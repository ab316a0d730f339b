"""The settings that each stage's results depend on, which stand in the records beside them."""

from __future__ import annotations

from typing import Any

from neuromamba.config import Classification, Config, Dataset, Finetune, Optimiser, State
from neuromamba.qc_rules import rules_of
from neuromamba.stages import STUDIES, Job, model_of

TRAINED = {"normalization", "slices"}
"""The settings of `codes` that a tokenizer of our own depends on."""


def settings_of(config: Config, job: Job) -> dict[str, Any]:
    """The settings that a job's result depends on beside those of the jobs before it, JSON-able."""
    if job.stage in ("pretrain", "cell", "finetune", *STUDIES, "explain", "evaluate"):
        return _settings_of_training(config, job)
    dataset = config.datasets.get(job.dataset)
    match job.stage:
        case "preprocess":
            assert dataset is not None
            return {"space": dataset.space, **_settings_of_engine(config)}
        case "index":
            assert dataset is not None
            keys = {"space" if dataset.series is None else "series", "repetition_time"}
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
        case "rois" if dataset is not None and dataset.series is not None:
            own = config.rois.model_dump(mode="json", include={"connectivity", "fisher_z"})
            return {"rois": own, "volumes": {"min_volumes": config.volumes.min_volumes}}
        case "tokenizer":
            return {"codes": config.codes.model_dump(mode="json", include=TRAINED)}
        case "codes":
            return {"codes": _settings_of_codes(config)}
        case "tokens" | "rois":
            return {job.stage: getattr(config, job.stage).model_dump(mode="json")}
        case "splits":
            assert dataset is not None
            participants, target = dataset.participants, stratified_by(dataset)
            states = {"states": True} if dataset.state_targets else {}
            return states | {
                "splits": _settings_of_splits(config),
                "site_column": participants and participants.site_column,
                "stratified_by": target and {target: target_settings(dataset, target)},
            }
        case "baselines":
            assert dataset is not None
            own = config.evaluate.model_dump(
                mode="json", include={"baselines", "confounds", "inner_folds"}
            )
            settings: dict[str, Any] = {
                "evaluate": own,
                "target": target_settings(dataset, job.target),
            }
            if job.target in dataset.state_targets:
                # Whom a window of any model finds in a state is tested.
                settings["windows"] = sorted({model.volumes for model in config.models.values()})
            return settings
        case "ablations":
            how = {"bootstrap", "confidence", "permutations"}
            own = config.evaluate.model_dump(mode="json", include=how)
            return {"evaluate": own, "seed": config.splits.seed}
        case "scaling":
            return {key: getattr(config.evaluate, key) for key in ("bootstrap", "confidence")}
    return {}


def settings_of_recipe(config: Config, job: Job) -> dict[str, Any]:
    """Those of `settings_of` that the jobs after it depend on too.

    Each repeat of the folds is the same, however many there are.
    """
    settings = settings_of(config, job)
    if job.stage == "splits":
        settings["splits"].pop("repeats", None)
    return settings


def _settings_of_codes(config: Config) -> dict[str, Any]:
    """What codes depend on beside a tokenizer that was trained here, or weights in a folder."""
    unused = {"batch_slices", "slices"}
    if not config.codes.on_hub or config.codes.trained:
        unused |= {"weights", "revision"}  # they are an input, and the same wherever they lie
    return config.codes.model_dump(mode="json", exclude=unused)


def _settings_of_splits(config: Config) -> dict[str, Any]:
    unused = {
        "holdout": {"protocol", "folds", "repeats"},
        "k-fold": {"test"},
        "leave-site-out": {"test", "repeats"},
    }
    return config.splits.model_dump(mode="json", exclude=unused[config.splits.protocol])


def _settings_of_engine(config: Config) -> dict[str, Any]:
    engine = config.preprocess.engine
    section = {"docker": "fmriprep", "apptainer": "fmriprep"}.get(engine, engine)
    settings = config.preprocess.model_dump(mode="json")
    return {"engine": engine, section: settings.get(section)}


def _settings_of_training(config: Config, job: Job) -> dict[str, Any]:
    model, evaluate = model_of(config, job), config.evaluate.model_dump(mode="json")
    match job.stage:
        case "pretrain" | "cell":
            elsewhere = {"base", "ablation_of", "finetune", "image_weights"}
            dumped = model.model_dump(mode="json", exclude=elsewhere)
            dumped["pretrain"] = relevant_settings(model.pretrain)
            own: dict[str, Any] = {"model": dumped, "members": config.members(job.dataset)}
            cell = {"fraction": job.fraction, "steps": config.scaling.steps}
            return own | {"seed": job.seed} | (cell if job.stage == "cell" else {})
        case "finetune":
            target = target_settings(config.datasets[job.dataset], job.target)
            tuned: dict[str, Any] = {"finetune": relevant_settings(model.finetune)}
            if model.finetune.fits_head:
                tuned["inner_folds"] = config.evaluate.inner_folds
            return tuned | {"target": target, "seed": job.seed}
        case "forecast":
            kept = ("bootstrap", "confidence", "allow_seen_subjects")
            own = {"forecast": config.forecast.model_dump(mode="json")}
            return own | {"evaluate": {key: evaluate[key] for key in kept}}
        case "identify":
            own = {key: evaluate[key] for key in ("bootstrap", "confidence", "permutations")}
            return {"evaluate": own | {"allow_seen_subjects": evaluate["allow_seen_subjects"]}}
        case "retrieve":
            unused = {"baselines", "confounds"}
            own = {"retrieve": config.retrieve.model_dump(mode="json")}
            return own | {"evaluate": {k: v for k, v in evaluate.items() if k not in unused}}
        case "explain":
            return {"explain": config.explain.model_dump(mode="json")}
    return {"evaluate": evaluate}


def stratified_by(dataset: Dataset) -> str | None:
    """The target that a split is stratified by: the first classification, or else the first number.

    States stratify nothing: all subjects have about the same ones.
    """
    targets = dataset.subject_targets
    classes = [n for n, target in targets.items() if isinstance(target, Classification)]
    return next(iter([*classes, *targets]), None)


def target_settings(dataset: Dataset, name: str) -> dict[str, Any]:
    """A target's section, with its classes as a list, because their order has a meaning."""
    target = dataset.targets[name]
    settings = target.model_dump(mode="json")
    if isinstance(target, Classification | State):
        settings["classes"] = [list(pair) for pair in target.classes.items()]
    return settings


def relevant_settings(settings: Optimiser) -> dict[str, Any]:
    """What a training depends on of its own section, JSON-able."""
    # Weights to start from are an input, and the same wherever they lie; how many checkpoints
    # there are changes nothing.
    unused = {"init_from", "keep_checkpoints"}
    if isinstance(settings, Finetune):
        if settings.mode == "probe":
            # It takes no steps. Only the windows it sees count, and in what batches they are seen.
            seen = {"mode", "start", "batch_size", "evaluation_windows"}
            return settings.model_dump(mode="json", include=seen)
        if settings.mode != "adapters":
            unused.add("adapters")
    return settings.model_dump(mode="json", exclude=unused)
