"""Predictions of new scans as a table, and in words.

Columns of the table
--------------------
`scan` (the argument), `subject`, `run` (by subject: `runs`, how many), `windows`, `prediction`;

- for classes `probability` (calibrated, of the predicted class), `prob_<class>` (calibrated),
  `uncalibrated_<class>` (as the evaluation has them), `set` (the classes that cannot be excluded
  at the confidence, joined by `|`);
- for a number `z` (in SD of the training subjects from their mean), `low`, `high`;

`distance` (in SD, see `novelty`), `percentile` (of it, among people like those of the training),
`warning`, and `reason`, why there is no prediction; several are joined by ` | `. What is not known
is `n/a`. Where maps are asked for, `map` is the file of that of the row, in their folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd

from neuromamba.calibration import half_width, least_subjects, prediction_set
from neuromamba.calibration_file import VALUE, Level, OfLevel
from neuromamba.fitness import judge_distance
from neuromamba.new_scans import NewScan
from neuromamba.novelty import LEAST_REFERENCE, choose_reference
from neuromamba.observe import Observed, merge_runs
from neuromamba.predictor import Predictor

SHOWN = 50
"""Rows that are printed where all are written to a file."""
JOINT = " | "
"""Between the warnings of a row, and between its reasons."""
NAMED = 5
"""Names that are printed for a warning that many have."""


@dataclass(frozen=True)
class Outcome:
    """What became of a scan: it was seen, perhaps with warnings, or there is a reason why not."""

    scan: NewScan
    observed: Observed | None = None
    warnings: list[str] = field(default_factory=list)
    reason: str | None = None


def tabulate(
    predictor: Predictor, outcomes: Sequence[Outcome], level: Level, confidence: float
) -> pd.DataFrame:
    """The table of predictions, a row for each run, or for each subject of each folder."""
    rows = []
    for group in group_outcomes(outcomes, level):
        scan, seen = group[0].scan, [one for one in group if one.observed is not None]
        row: dict[str, Any] = {"scan": scan.given, "subject": scan.subject}
        row["run" if level == "run" else "runs"] = scan.run if level == "run" else len(seen)
        warnings = list(dict.fromkeys(text for one in seen for text in one.warnings))
        lost = [f"{one.scan.run}: {one.reason}" for one in group if one.observed is None]
        if seen:
            row |= _predict(predictor, seen, level, confidence, warnings)
            warnings += [f"left out: {text}" for text in lost]
        row["warning"] = JOINT.join(warnings) or None
        row["reason"] = None if seen else JOINT.join(str(one.reason) for one in group)
        rows.append(row)
    return pd.DataFrame(rows, columns=_columns(predictor, level))


def group_outcomes(outcomes: Sequence[Outcome], level: Level) -> Iterator[list[Outcome]]:
    """The outcomes of each row; those of nobody known stand alone."""
    if level == "run":
        yield from ([one] for one in outcomes)
        return
    ordered = sorted(outcomes, key=_person)
    for (_, subject), group in groupby(ordered, key=_person):
        of_row = list(group)
        yield from [of_row] if subject else [[one] for one in of_row]


def _person(one: Outcome) -> tuple[str, str]:
    return one.scan.root, one.scan.subject or ""


def _columns(predictor: Predictor, level: Level) -> list[str]:
    names = predictor.classes
    probabilities = [f"{kind}_{name}" for kind in ("prob", "uncalibrated") for name in names]
    own = ["probability", *probabilities, "set"] if names else ["z", "low", "high"]
    first = ["scan", "subject", "run" if level == "run" else "runs", "windows", "prediction"]
    return [*first, *own, "distance", "percentile", "warning", "reason"]


def _predict(
    predictor: Predictor,
    seen: Sequence[Outcome],
    level: Level,
    confidence: float,
    warnings: list[str],
) -> dict[str, Any]:
    """The cells of one prediction; warnings of it are added to those given."""
    runs = [one.observed for one in seen if one.observed is not None]
    values, features = merge_runs(runs)
    known = predictor.calibration.levels[level] if predictor.calibration else None
    say = _predict_class if predictor.classes else _predict_number
    cells = {"windows": sum(len(one.values) for one in runs)}
    cells |= say(predictor, values, known, confidence, warnings)
    distance, rank, unlike = judge_distance(predictor, level, features)
    warnings += unlike
    return cells | {"distance": distance, "percentile": rank}


def _predict_class(
    predictor: Predictor,
    values: Sequence[float],
    known: OfLevel | None,
    confidence: float,
    warnings: list[str],
) -> dict[str, Any]:
    names, given = predictor.classes, np.array(values)
    rescaling = known.rescaling if known else None
    calibrated = rescaling.apply(given) if rescaling else given
    best = int(given.argmax())
    cells: dict[str, Any] = {"prediction": names[best], "probability": float(calibrated[best])}
    cells |= {f"prob_{name}": float(p) for name, p in zip(names, calibrated, strict=True)}
    cells |= {f"uncalibrated_{name}": float(p) for name, p in zip(names, given, strict=True)}
    if (likely := int(calibrated.argmax())) != best:
        warnings.append(
            f"{names[likely]} is more probable by how common classes are among validation subjects"
        )
    if known:
        by_name = dict(zip(names, values, strict=True))
        kept = prediction_set(by_name, known.scores, confidence)
        cells["set"] = "|".join(kept) or "none"
        if not kept:
            warnings.append("unlike the validation subjects of every class")
    return cells


def _predict_number(
    predictor: Predictor,
    values: Sequence[float],
    known: OfLevel | None,
    confidence: float,
    warnings: list[str],
) -> dict[str, Any]:
    assert predictor.training_scale is not None
    (value,), (mean, sd) = values, predictor.training_scale
    width = half_width(known.scores[VALUE], confidence) if known else None
    low, high = (None, None) if width is None else (value - width, value + width)
    return {"prediction": value, "z": (value - mean) / sd, "low": low, "high": high}


# --- In words -------------------------------------------------------------------------------------


def summarize(
    predictor: Predictor, table: pd.DataFrame, level: Level, confidence: float, written: bool
) -> str:
    """Model, what its figures rest on, predictions, warnings and refusals, as text."""
    names = ["run"] if level == "run" else ["subject", "runs"]
    names += ["prediction"]
    names += ["probability", "set"] if predictor.classes else ["z", "low", "high"]
    good = table[table["reason"].isna()]
    lines = notes(predictor, level, confidence)
    if len(good):
        shown = good.head(SHOWN) if written else good
        body = shown[[*names, "percentile"]].astype(object)
        body = body.where(body.notna(), "n/a")
        body[""] = shown["warning"].notna().map({True: "!", False: ""})
        text = body.to_string(index=False, float_format="{:.3g}".format)
        lines += ["", text]
        lines += [f"... and {len(good) - SHOWN} more"] * (written and len(good) > SHOWN)
    for column in ("warning", "reason"):
        lines += _told(table, column, names[0])
    count = f"{len(good)} predicted, {len(table) - len(good)} refused"
    return "\n".join([*lines, "", count])


def _told(table: pd.DataFrame, column: str, unit: str) -> list[str]:
    """Each different text of a column, with the names of some that it is said of."""
    said: dict[str, list[str]] = {}
    for row in table[table[column].notna()].to_dict("records"):
        name = next(str(row[key]) for key in (unit, "subject", "scan") if isinstance(row[key], str))
        for text in row[column].split(JOINT):
            said.setdefault(text, []).append(name)
    return [""] * bool(said) + [
        f"{column}: {', '.join(names[:NAMED])}"
        + f" and {len(names) - NAMED} more" * (len(names) > NAMED)
        + f": {text}"
        for text, names in said.items()
    ]


def notes(predictor: Predictor, level: Level, confidence: float) -> list[str]:
    """What the columns of a table mean for this model, and what they do not."""
    calibration = predictor.calibration
    head = (
        f"{predictor.target}, by a model trained on {predictor.dataset} (space {predictor.space})"
    )
    if calibration is None:
        return [
            head,
            "uncalibrated: the model is from before there were calibrations, so probabilities are "
            "as it gives them, and there are no intervals and distances; how its volumes were made "
            "is taken from the config.yaml of its results",
        ]
    known, count = calibration.levels[level], calibration.subjects["validation"]
    of = f"{count} validation subjects"
    lines = [head]
    least, share = least_subjects(confidence), f"{confidence:.0%}"
    if predictor.classes:
        how = f"probability: {known.note}, so it is as the model gives it"
        if known.rescaling:
            how = f"probability: calibrated by {of}, for classes as common as among these"
        few = [name for name, scores in known.scores.items() if len(scores) < least]
        lines += [how, f"set: has the true class of at least {share} of the people of each class"]
        if few:
            lines[-1] += (
                f"; fewer than {least} of {of} are {' or '.join(few)}, so all sets have that"
            )
    elif len(known.scores[VALUE]) < least:
        lines.append(f"low, high: missing, {of} are fewer than the {least} that {share} take")
    else:
        lines.append(f"low, high: hold the true value of at least {share} of people like the {of}")
    return [*lines, _on_distance(known)]


def _on_distance(known: OfLevel) -> str:
    part, reference = choose_reference(known.distances["training"], known.distances["validation"])
    if not reference:
        return "percentile: missing, as training subjects are too few"
    text = f"percentile: of the distance from training, among {len(reference)} {part} subjects"
    few = len(reference) < LEAST_REFERENCE
    return text + (f"; fewer than {LEAST_REFERENCE}, so it warns of nobody" if few else "")
