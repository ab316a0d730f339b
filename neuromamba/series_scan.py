"""Find tables of ROI series by their names, as BIDS-Derivatives and XCP-D have them.

`sub-01_task-rest_space-MNI152NLin6Asym_seg-CC400_stat-mean_timeseries.tsv`, or `.tsv.gz`; older
programs write `atlas-` for `seg-`. Tables without either, such as those of confounds, hold no ROIs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from neuromamba.bids_folders import func_folders, readable, root_of
from neuromamba.bids_scan import (
    CONFOUNDS,
    FoundRun,
    confounds_name,
    entities_of,
    has_wanted_entities,
)
from neuromamba.config import Dataset
from neuromamba.files import InputError

TABLES = ("_timeseries.tsv", "_timeseries.tsv.gz")
MOTION = (*CONFOUNDS, "_motion.tsv")
"""Tables with framewise displacement, in the order they are looked for; the last is XCP-D's."""


def find_series(dataset: Dataset) -> list[FoundRun]:
    """The tables that the dataset's segmentation and entities select, sorted by run.

    Raises
    ------
    InputError
        When the folder does not exist or holds no such table, or tables of several segmentations
        of which none is chosen; the message lists what there is.
    """
    root = root_of(dataset)
    with readable():
        every = list(_scan(root))
    assert dataset.series is not None
    runs = [run for run in every if has_wanted_entities(run.entities, dataset)]
    wanted = dataset.series.segmentation
    kinds = Counter(segmentation_of(run.entities) for run in runs)
    if wanted is None and len(kinds) > 1:
        raise InputError(
            f"{root} has series of several segmentations: {_listed(kinds)}; choose one by "
            "series.segmentation in the dataset YAML"
        )
    if wanted is not None:
        runs = [run for run in runs if segmentation_of(run.entities) == wanted]
    if not runs:
        raise InputError(_nothing(root, dataset, every))
    return sorted(runs, key=lambda run: (run.name, run.bold))


def segmentation_of(entities: dict[str, str]) -> str | None:
    """The name of the segmentation that a table's regions are of; `None` where it has none."""
    return entities.get("seg", entities.get("atlas"))


def _scan(root: str) -> Iterator[FoundRun]:
    for folder, names, place in func_folders(root):
        for name in names:
            end = next((end for end in TABLES if name.endswith(end)), None)
            if end is None:
                continue
            stem = name.removesuffix(end)
            entities = {**entities_of(place), **entities_of(stem)}
            if segmentation_of(entities) is None:
                continue
            confounds, sidecar = confounds_name(stem, names, MOTION), f"{stem}_timeseries.json"
            yield FoundRun(
                entities=entities,
                bold=f"{folder}/{name}",
                mask="",
                has_mask=False,
                confounds=f"{folder}/{confounds}" if confounds else None,
                sidecar=f"{folder}/{sidecar}" if sidecar in names else None,
            )


def _nothing(root: str, dataset: Dataset, every: list[FoundRun]) -> str:
    wanted = dataset.series and dataset.series.segmentation
    looked = f"sub-*/[ses-*/]func/*_seg-{wanted or '*'}*{TABLES[0]}[.gz]"
    filters = "".join(f", {key} in {values}" for key, values in dataset.entities.items())
    if not every:
        hint = "no file of that form is there; check derivatives in the dataset YAML"
        return f"{root} has no ROI series: looked for {looked}{filters}; {hint}"
    there = _listed(Counter(segmentation_of(run.entities) for run in every))
    return (
        f"{root} has no such ROI series: looked for {looked}{filters}; there are the segmentations "
        f"{there}; change series.segmentation or entities in the dataset YAML"
    )


def _listed(kinds: Counter[str | None]) -> str:
    found = sorted(kinds.items(), key=lambda item: (-item[1], str(item[0])))
    return ", ".join(f"{kind} ({count} files)" for kind, count in found[:10])
