"""Attribution maps of new scans: where in the brain what is predicted of each comes from.

    {folder}/dataset_description.json
    {folder}/sub-01/sub-01_task-rest_space-{space}_desc-attribution_statmap.nii.gz, .json

Integrated gradients of the predicted class or value, made by the code of `neuromamba explain`, as
the volumes `strength` and `signed` (see `attribution_maps`). A scan is prepared once more for its
map, and the first one again for the choice of the steps: which class is to be explained is known
only after all runs of a row have been seen, and what they were seen by is not kept. So one run is
held at a time, and the gradients take far longer.

A map of one person has no checks but the completeness of its sums. Those of the model's maps are
made by `neuromamba explain`, and should be read first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from neuromamba import __version__
from neuromamba.attribution_checks import judge_completeness
from neuromamba.attribution_maps import KINDS, Summed, map_name, write_map
from neuromamba.attribution_maskers import Masker, choose_masker
from neuromamba.calibration_file import Level
from neuromamba.explainer import STEPS, Explainer, choose_class, choose_steps
from neuromamba.files import InputError, write_json
from neuromamba.new_scans import NewScan
from neuromamba.predicted import JOINT, Outcome, group_outcomes
from neuromamba.predictor import Predictor
from neuromamba.scan_windows import scan_windows

DESCRIPTION = "dataset_description.json"
CHECKS = "only completeness is checked here; run `neuromamba explain` for those of the model's maps"


def refuse_unmapped(
    predictor: Predictor, scans: Sequence[NewScan], level: Level, folder: Path
) -> None:
    """Raise `InputError` when there can be no maps, or two of them would have the same name."""
    _masker_of(predictor)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--explain {folder} is a file; give a folder")
    # By subject, the runs of a person in one folder are one row.
    rows = {
        (_entities(one, level), one.root, one.source.bold if level == "run" else None)
        for one in scans
        if one.source
    }
    names = Counter(name for name, *_ in rows)
    twice = sorted(name for name, count in names.items() if count > 1)
    if twice:
        raise InputError(
            f"--explain: several of the scans are named {', '.join(twice[:5])}, and so would be "
            "their maps; predict them in turns, with a folder of maps for each"
        )


def add_maps(
    predictor: Predictor,
    outcomes: Sequence[Outcome],
    table: pd.DataFrame,
    level: Level,
    folder: Path,
) -> pd.DataFrame:
    """Write the map of each row with a prediction, and name it in a new column `map`.

    Where there can be no map, the row has the reason among its warnings.

    Parameters
    ----------
    outcomes, table, level
        What the predictions were made of, and their table by `predicted.tabulate`.
    folder
        Made if it is not there; maps of the same names are replaced.
    """
    masker = _masker_of(predictor)
    # No weight needs a gradient, which is most of what the gradients would hold.
    predictor.network.requires_grad_(False)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / DESCRIPTION).exists():
        write_json(folder / DESCRIPTION, _description())
    names: list[str | None] = []
    warnings: list[str | None] = []
    rows = list(zip(group_outcomes(outcomes, level), table.to_dict("records"), strict=True))
    steps = _choose_steps(predictor, masker, outcomes)
    for group, row in tqdm(rows, desc="explain", unit=level, mininterval=1.0):
        seen = [one.scan for one in group if one.observed is not None]
        name, told = None, [row["warning"]] if pd.notna(row["warning"]) else []
        if seen:
            positive = choose_class(predictor, _class_of(row))
            explainer = Explainer(predictor, masker, positive, steps)
            try:
                name = _write(explainer, seen, row["prediction"], level, folder)
            except InputError as error:
                told.append(f"no map: {' '.join(str(error).split())}")
        names.append(name)
        warnings.append(JOINT.join(told) or None)
    table = table.copy()
    table["map"], table["warning"] = names, warnings
    return table


def _choose_steps(predictor: Predictor, masker: Masker, outcomes: Sequence[Outcome]) -> int:
    """As many as the first scan takes that has a map."""
    explainer = Explainer(predictor, masker, choose_class(predictor, None))
    for scan in (one.scan for one in outcomes if one.observed is not None):
        assert scan.source is not None
        try:
            with scan_windows(predictor, scan.source) as (windows, _):
                return choose_steps(explainer, windows, scan.source.subject)
        except InputError:
            continue  # its row tells why it has no map
    return STEPS[-1]


def _write(
    explainer: Explainer, scans: Sequence[NewScan], prediction: Any, level: Level, folder: Path
) -> str:
    """Write the map of some runs of one person together; returns its name within the folder."""
    predictor, masker, summed = explainer.predictor, explainer.masker, Summed(explainer.masker)
    subject, sources = str(scans[0].subject), []
    for scan in scans:
        assert scan.source is not None
        with scan_windows(predictor, scan.source) as (windows, _):
            explainer.add(summed, predictor.network, windows, windows.spaced(explainer.count))
        sources.append(str(scan.source.bold))
    one = summed.map(subject)
    name = map_name(_entities(scans[0], level), predictor.space)
    path = folder / subject / name
    path.parent.mkdir(exist_ok=True)
    about = {
        **explainer.describe(),
        "prediction": prediction,
        "Sources": sources,
        "windows": len(one.change),
        "completeness": judge_completeness(one.change, one.total),
        "checks": CHECKS,
    }
    write_map(path, {k: masker.paint(getattr(one, k)) for k in KINDS}, masker.affine, about)
    return f"{subject}/{name}"


def _masker_of(predictor: Predictor) -> Masker:
    needs, atlas = predictor.network.needs, predictor.atlas
    return choose_masker(needs, predictor.volumes, predictor.tokens, atlas)


def _entities(scan: NewScan, level: Level) -> str:
    return str(scan.run if level == "run" else scan.subject)


def _class_of(row: dict[Any, Any]) -> str | None:
    """The predicted class; `None` of a number."""
    return row["prediction"] if isinstance(row["prediction"], str) else None


def _description() -> dict[str, Any]:
    return {
        "Name": "Attribution maps of predictions",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "NeuroMamba", "Version": __version__}],
    }
