"""Rules between the sections of a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neuromamba.config.data import Codes, Qc, Rois, Volumes
from neuromamba.config.dataset import Dataset
from neuromamba.config.models import Cinp, Model, RoiModel


def refuse_what_needs_images(
    datasets: Mapping[str, Dataset],
    models: Sequence[tuple[str, Model]],
    qc: Qc,
    volumes: Volumes,
    rois: Rois,
) -> None:
    """Refuse settings that only images can follow where a dataset has ROI series alone.

    A rule of quality that were silently not applied would pass for one that all runs meet.

    Parameters
    ----------
    datasets
        By name.
    models
        Each with its place in the config.
    qc, volumes, rois
        Sections of the config.

    Raises
    ------
    ValueError
        Naming the dataset, what it cannot follow, and what to do.
    """
    asked = _of_images(qc, volumes, rois)
    for name, dataset in datasets.items():
        if dataset.series is None:
            continue
        if asked:
            raise ValueError(
                f"{', '.join(asked)} can be applied to images alone, and dataset {name} has ROI "
                "series (`series`), which are used as they are: leave the setting out, and name "
                f"the runs that are not good enough by `exclude` in the YAML file of {name}"
            )
        for place, model in models:
            if missing := [one for one in model.arrays if one not in dataset.readable]:
                raise ValueError(
                    f"{place} (family {model.family}) needs {', '.join(missing)}, which are made "
                    f"of images, and dataset {name} has ROI series (`series`) alone: take a model "
                    f"that needs {', '.join(dataset.arrays)}, or a dataset with images"
                )


def refuse_states(datasets: Mapping[str, Dataset], models: Sequence[tuple[str, Model]]) -> None:
    """Refuse models that cannot tell states, which are of volumes as they were scanned.

    Those are models that resample the series of runs, and models of whole runs.

    Raises
    ------
    ValueError
        Naming the dataset, the model, and what to do.
    """
    for name, dataset in datasets.items():
        for place, model in models:
            if dataset.state_targets and isinstance(model, Cinp):
                raise ValueError(
                    f"{place} (family {model.family}) reads whole runs, and dataset {name} has the "
                    f"state {next(iter(dataset.state_targets))!r} among its targets, which is told "
                    "of parts of runs: remove the target, or take a model that reads windows"
                )
            if not dataset.state_targets or not isinstance(model, RoiModel):
                continue
            if model.repetition_time is not None:
                raise ValueError(
                    f"{place}.repetition_time is {model.repetition_time:g} s, and dataset {name} "
                    f"has the state {next(iter(dataset.state_targets))!r} among its targets, "
                    "which is told of volumes as they were scanned: set repetition_time to null, "
                    "or remove the target"
                )


def refuse_wrong_codes(
    codes: Codes,
    volumes: Volumes,
    mixtures: Mapping[str, Mapping[str, float]],
    models: Sequence[tuple[str, Model]],
) -> None:
    """Refuse settings of `codes` that cannot serve a model which reads codes.

    Raises
    ------
    ValueError
        Naming the model, what is wrong, and what to do.
    """
    for place, model in models:
        if "codes" not in model.arrays:
            continue
        if codes.tokenizer == "dc-ae" and codes.weights is None:
            raise ValueError(
                f"{place} (family {model.family}) reads codes, and codes.weights is null: name a "
                "folder with the weights of a DC-AE or a name on the hub, or set codes.tokenizer "
                "to slices, which is trained here"
            )
        if len(set(volumes.shape)) > 1 or volumes.shape[0] % 3:
            raise ValueError(
                f"{place} (family {model.family}) reads codes, which are made of cubes whose edge "
                f"is a multiple of 3, and volumes.shape is {volumes.shape}"
            )
        members = mixtures.get(model.pretrain.mixture or "", {})
        if codes.trained and len(members) > 1:
            raise ValueError(
                f"{place}.pretrain.mixture is {model.pretrain.mixture!r}, and with codes.tokenizer "
                "slices each dataset has a tokenizer of its own, whose codes mean something else: "
                "take dc-ae, or leave the mixture out"
            )


def _of_images(qc: Qc, volumes: Volumes, rois: Rois) -> list[str]:
    """The settings that judge or change images, where they do anything."""
    rules = [key for key, field in Qc.model_fields.items() if field.default is None]
    asked = [f"qc.{key}" for key in rules if getattr(qc, key) is not None]
    if volumes.denoise.in_time or volumes.denoise.smoothing:
        asked.append("volumes.denoise")
    if rois.min_coverage > 0:
        asked.append("rois.min_coverage")
    return asked


def refuse_wrong_bases(models: Mapping[str, Model], studied: Mapping[str, Model]) -> None:
    """Refuse a `base` that has no such pretraining as the model needs.

    Parameters
    ----------
    models, studied
        By name, those of the run and those of the scaling study.

    Raises
    ------
    ValueError
        Naming the model, what is wrong, and what to do.
    """
    for name, model in studied.items():
        if model.base is not None:
            raise ValueError(
                f"scaling.models.{name} has a base ({model.base}), and so no pretraining of "
                "its own that could be studied"
            )
    for name, model in models.items():
        if model.base is None:
            if model.finetune.start == "fresh":
                raise ValueError(
                    f"models.{name}.finetune.start is fresh, so a pretraining of its own would be "
                    "for nothing; name a `base` whose pretraining it leaves out"
                )
            continue
        base = models.get(model.base)
        if base is None or base.base is not None:
            raise ValueError(
                f"models.{name}.base is {model.base!r}, which must be one of `models` "
                f"({', '.join(models)}), with a pretraining of its own"
            )
        apart = {"base", "ablation_of", "finetune"}
        if base.model_dump(exclude=apart) != model.model_dump(exclude=apart):
            raise ValueError(
                f"models.{name} has {model.base} as its base and may differ from it in "
                "`finetune` alone"
            )


def refuse_wrong_ablations(models: Mapping[str, Model]) -> None:
    """Refuse an `ablation_of` what is no whole model; parameter and error as above."""
    for name, model in models.items():
        if model.ablation_of is None:
            continue
        whole = models.get(model.ablation_of)
        if whole is None or whole.ablation_of:
            raise ValueError(
                f"models.{name}.ablation_of is {model.ablation_of!r}, which must be one of "
                f"`models` ({', '.join(models)}), and no ablation itself"
            )
