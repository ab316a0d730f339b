"""Rules between the sections of a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from neuromamba.config.data import Qc, Rois, Volumes
from neuromamba.config.dataset import Dataset
from neuromamba.config.models import Model


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
            if missing := [need for need in model.needs if need not in dataset.arrays]:
                raise ValueError(
                    f"{place} (family {model.family}) needs {', '.join(missing)}, which are made "
                    f"of images, and dataset {name} has ROI series (`series`) alone: take a model "
                    f"that needs {', '.join(dataset.arrays)}, or a dataset with images"
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
