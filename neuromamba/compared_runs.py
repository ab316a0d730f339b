"""The evaluations of several runs, brought together where they are of the same test.

Design choices
--------------
- Two evaluations are of the same test where the target has the same name and classes, and the same
  subjects have the same labels in the same folds. Nothing else is compared: a difference between
  test sets can be larger than any between models. What differs is told in words.
- Predictions alone are read, so that runs of any config, and of other versions, can be compared.
- The baselines of two runs on the same test ought to be the same. Where one is, it stands once;
  where it is not (other preprocessing, another atlas, other training subjects), it stands once for
  each of what was found, and every model is compared with that of its own run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from neuromamba.baseline_notes import BASELINES
from neuromamba.files import InputError, digest_json, read_json
from neuromamba.metrics import class_names, read_predictions
from neuromamba.predictors import PROBABILITY, name_samples, read_predictors

FILE = "predictions.tsv"
PLACES = [
    FILE,
    f"*/{FILE}",
    f"evaluate/*/{FILE}",
    f"seed-*/evaluate/*/{FILE}",
    f"*/seed-*/evaluate/*/{FILE}",
    f"*/*/seed-*/evaluate/*/{FILE}",
]
"""Where evaluations lie below the folder of a target, model, seed, dataset, or of results."""
ROUNDING = 1e-4
"""Largest difference of two predictions that are the same: of probabilities, or of SDs."""


@dataclass(frozen=True)
class Entry:
    """One evaluation.

    Attributes
    ----------
    results
        The results folder of its run.
    run
        What the run is called, unlike the others.
    dataset, model, seed, target
        What was evaluated on what.
    predictions, notes
        `predictions.tsv`, and `notes.json` where there is one.
    parameters
        Of the model, where its training is beside the evaluation.
    """

    results: Path
    run: str
    dataset: str
    model: str
    seed: int
    target: str
    predictions: pd.DataFrame
    notes: dict[str, Any]
    parameters: int | None = None

    @property
    def name(self) -> str:
        """`run/dataset/model/seed-0/target`."""
        return f"{self.run}/{self.dataset}/{self.model}/seed-{self.seed}/{self.target}"

    @property
    def test(self) -> pd.DataFrame:
        """Who was tested: `subject` (and state), `fold` (empty for a holdout), `y_true`, sorted."""
        own = name_samples(self.predictions[self.predictions["predictor"] == self.model])
        test = own.assign(fold=own.get("fold", ""))[["subject", "fold", "y_true"]]
        if not class_names(self.predictions):
            test = test.assign(y_true=test["y_true"].astype(float))
        return test.sort_values(["fold", "subject"], ignore_index=True)

    @property
    def key(self) -> str:
        """The same for evaluations of the same test."""
        classes = class_names(self.predictions)
        return digest_json([self.target, classes, self.test.to_numpy().tolist()])


@dataclass(frozen=True)
class Reference:
    """A baseline's predictions, and the entries that it is of."""

    baseline: str
    predictions: pd.DataFrame
    entries: tuple[Entry, ...]


def read_entries(runs: Sequence[Path]) -> tuple[list[Entry], dict[str, str]]:
    """The evaluations in some folders, and by file why others cannot be used.

    Raises
    ------
    InputError
        When a folder has none, or none of all can be used.
    """
    paths: dict[Path, None] = {}
    for run in runs:
        # The folder alone is resolved: its files may be links into the cache of DVC.
        folder = run.resolve()
        found = [path for place in PLACES for path in sorted(folder.glob(place)) if _about(path)]
        if not found:
            what = "has no evaluations" if run.is_dir() else "is not a folder"
            raise InputError(
                f"{run} {what}; name a results folder, in which are "
                f"DATASET/MODEL/seed-N/evaluate/TARGET/{FILE}, or a folder below it"
            )
        paths |= dict.fromkeys(found)
    names = name_runs([path.parents[5] for path in paths])
    entries, refused = [], {}
    for path in paths:
        try:
            entries.append(_read_entry(path, names[path.parents[5]]))
        except InputError as error:
            refused[str(path)] = " ".join(str(error).replace(str(path), "the file").split())
    if not entries:
        raise InputError("; ".join(f"{path}: {reason}" for path, reason in refused.items()))
    return entries, refused


def _about(path: Path) -> tuple[str, str, int, str] | None:
    """Dataset, model, seed and target of a file of predictions, if it is a whole evaluation's."""
    if len(path.parts) < 7:  # the root, five folders and the file
        return None
    *_, dataset, model, seed, stage, target, _ = path.parts
    number = re.fullmatch(r"seed-(\d+)", seed)
    return (dataset, model, int(number[1]), target) if number and stage == "evaluate" else None


def name_runs(folders: Sequence[Path]) -> dict[Path, str]:
    """Short names that tell folders apart: `a` and `b` of `/data/a/results` and `/data/b/results`.

    What all paths end in is left out, and of the rest as many last parts are taken as are needed.
    """
    every = list(dict.fromkeys(folders))
    ends = [folder.parts for folder in every]
    while len(every) > 1 and len({parts[-1:] for parts in ends}) == 1:
        ends = [parts[:-1] for parts in ends]
    for count in range(1, max(map(len, ends)) + 1):
        names = ["/".join(parts[-count:]) for parts in ends]
        if len(set(names)) == len(every):
            break
    return dict(zip(every, names, strict=True))


def _read_entry(path: Path, run: str) -> Entry:
    about = _about(path)
    assert about is not None, f"{path} was listed"
    dataset, model, seed, target = about
    predictions = read_predictions(path)
    lacking = {"subject", "predictor", "y_true", "y_pred"} - set(predictions)
    if lacking:
        raise InputError(f"it has no column {', '.join(sorted(lacking))}; evaluate it again")
    constant = "majority" if class_names(predictions) else "mean"
    lacking = {model, "fc", constant} - set(predictions["predictor"])
    if lacking:
        raise InputError(f"it has no predictions by {', '.join(sorted(lacking))}; evaluate again")
    read_predictors(predictions)
    notes = path.with_name("notes.json")
    trained = sorted((path.parents[2] / "finetune" / target).glob("**/model.json"))
    parameters = read_json(trained[0]).get("parameters") if trained else None
    facts = read_json(notes) if notes.exists() else {}
    names = (dataset, model, seed, target)
    return Entry(path.parents[5], run, *names, predictions, facts, parameters)


def group_entries(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The entries of each test; the tests of a target follow each other, the largest first."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.key, []).append(entry)
    targets = list(dict.fromkeys(entry.target for entry in entries))
    order = {key: (targets.index(g[0].target), -len(g)) for key, g in groups.items()}
    return [qualify(groups[key], entries) for key in sorted(groups, key=lambda key: order[key])]


def qualify(group: Sequence[Entry], everybody: Sequence[Entry]) -> list[Entry]:
    """The entries with models named by run too where runs share a name, and so with datasets."""
    several = len({entry.dataset for entry in group}) > 1
    named = []
    for entry in group:
        same = {other.results for other in everybody if other.model == entry.model}
        parts = [entry.run] * (len(same) > 1) + [entry.dataset] * several
        model = f"{entry.model} ({', '.join(parts)})" if parts else entry.model
        own = entry.predictions["predictor"]
        predictions = entry.predictions.assign(predictor=own.where(own != entry.model, model))
        named.append(replace(entry, model=model, predictions=predictions))
    return named


def what_differs(first: Entry, other: Entry) -> str:
    """In words, why two evaluations of one target are not of the same test."""
    classes = [class_names(entry.predictions) for entry in (first, other)]
    if classes[0] != classes[1]:
        shown = [", ".join(of) or "a number" for of in classes]
        return f"the target is {shown[1]}, not {shown[0]}"
    labels = [entry.test.groupby("subject")["y_true"].first() for entry in (first, other)]
    gone, new = (
        labels[0].index.difference(labels[1].index),
        labels[1].index.difference(labels[0].index),
    )
    parts = []
    if len(gone) or len(new):
        parts.append(
            f"{len(labels[1])} test subjects, not {len(labels[0])}: {len(new)} are others"
            f"{_some(new)}, {len(gone)} are missing{_some(gone)}"
        )
    both = labels[0].index.intersection(labels[1].index)
    changed = both[(labels[0][both] != labels[1][both]).to_numpy()]
    if len(changed):
        parts.append(f"{len(changed)} subjects have another label{_some(changed)}")
    folds = [entry.test["fold"].nunique() for entry in (first, other)]
    if folds[0] != folds[1]:
        shown = [f"{n} folds" if n > 1 else "a holdout" for n in folds]
        parts.append(f"they were tested in {shown[1]}, not {shown[0]}")
    elif not parts:
        parts.append("the subjects were put in other folds")
    return "; ".join(parts)


def _some(names: pd.Index) -> str:
    shown = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    return f" ({shown})" if shown else ""


def find_references(group: Sequence[Entry]) -> list[Reference]:
    """The baselines of entries of one test, each once for every set of predictions there is."""
    found: list[Reference] = []
    for baseline in BASELINES:
        of_baseline: list[Reference] = []
        for entry in group:
            rows = entry.predictions[entry.predictions["predictor"] == baseline]
            if rows.empty:
                continue
            same = [k for k, one in enumerate(of_baseline) if agree(one.predictions, rows)]
            if same:
                one = of_baseline[same[0]]
                of_baseline[same[0]] = replace(one, entries=(*one.entries, entry))
            else:
                of_baseline.append(Reference(baseline, rows, (entry,)))
        found += of_baseline
    return found


def agree(first: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two tables of one baseline's predictions of the same test are so but for rounding."""
    order = [name for name in ("fold", "subject", "state") if name in first]
    tables = [table.sort_values(order) for table in (first, other)]
    columns = [PROBABILITY + name for name in class_names(first)] or ["y_pred"]
    one, two = (table[columns].astype(float).to_numpy() for table in tables)
    scale = 1.0 if class_names(first) else max(float(first["y_true"].astype(float).std()), 1e-12)
    return one.shape == two.shape and bool(np.abs(one - two).max() <= ROUNDING * scale)


def who_disagree(references: Sequence[Reference]) -> dict[str, list[list[str]]]:
    """By baseline that is not the same everywhere, the names of those who agree with each other.

    These are runs, or entries where a run does not agree with itself.
    """
    by_baseline: dict[str, list[Reference]] = {}
    for reference in references:
        by_baseline.setdefault(reference.baseline, []).append(reference)
    told = {}
    for baseline, several in by_baseline.items():
        if len(several) > 1:
            runs = [list(dict.fromkeys(e.run for e in one.entries)) for one in several]
            within = len({run for of in runs for run in of}) < sum(map(len, runs))
            named = [[e.name for e in one.entries] for one in several]
            told[baseline] = named if within else runs
    return told


def reference_labels(references: Sequence[Reference]) -> list[str]:
    """What each reference is called: with those whose it is where they disagree."""
    apart = {name: iter(groups) for name, groups in who_disagree(references).items()}
    return [
        BASELINES[one.baseline]
        + (f" ({', '.join(next(apart[one.baseline]))})" if one.baseline in apart else "")
        for one in references
    ]


def seen_by(group: Sequence[Entry]) -> Mapping[str, int]:
    """Of entries whose model has seen test subjects, how many."""
    counts = {f"{e.model}, seed {e.seed}": len(e.notes.get("seen_subjects", [])) for e in group}
    return {name: count for name, count in counts.items() if count}
