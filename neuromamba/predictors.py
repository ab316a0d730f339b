"""What each predictor in a table of predictions says of the subjects, fold by fold.

Design choices
--------------
- The models of different folds do not give their scores on one scale, so pooling the scores before
  ranking them biases the AUROC: under cross-validation a metric is the mean over folds of its value
  within a fold (Forman and Scholz 2010, doi:10.1145/1882471.1882479; Airola et al. 2011,
  doi:10.1016/j.csda.2010.11.018). A test set without folds is one fold.
- So is a difference of two predictors: the mean of the differences within the folds in which both
  are defined, and not the difference of two means, which may be of other folds.
- What is drawn, shuffled or swapped is a subject, with all its rows: those of the repeats of a
  cross-validation, and those of several seeds.
- A fold in which a metric is undefined (one class, and no AUROC) is left out of that mean.
- Of states a subject has several labels, and a row for each. All of them are drawn or swapped
  together, and labels are shuffled within the subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba.events import sample_name, subject_of
from neuromamba.files import InputError
from neuromamba.permutations import Floats, Ints, mean_of_defined, split_rows
from neuromamba.statistics import p_of_chance, p_of_difference
from neuromamba.weighted_metrics import Metrics, classification_metrics, regression_metrics

PROBABILITY = "prob_"


def class_names(predictions: pd.DataFrame) -> list[str]:
    """The classes of a table of predictions, in order; none for regression."""
    columns = [str(column) for column in predictions.columns]
    return [c.removeprefix(PROBABILITY) for c in columns if c.startswith(PROBABILITY)]


@dataclass(frozen=True)
class Predictor:
    """What one predictor says of the subjects.

    Attributes
    ----------
    subjects
        Their names, sorted; of states, those of the samples, which stand in the place of subjects.
    true
        (subject,) number of the true class, or true value.
    predicted
        (row, class) probabilities, or (row,) values: the rows of each fold after one another.
    folds
        By the fold's name, (row,) numbers of its subjects; one without a name for a holdout.
    people
        (sample,) number of the subject that it is of; `None` where each subject is one sample.
    """

    subjects: tuple[str, ...]
    true: npt.NDArray[Any]
    predicted: Floats
    folds: dict[str, Ints]
    people: Ints | None = None

    @property
    def is_holdout(self) -> bool:
        return list(self.folds) == [""]

    @property
    def n_subjects(self) -> int:
        return len(self.true) if self.people is None else int(self.people.max()) + 1

    @property
    def strata(self) -> Ints:
        """(subject,) within what subjects are drawn: their class, where they have one."""
        drawn_by_class = self._is_classifier and self.people is None
        return self.true if drawn_by_class else np.zeros(self.n_subjects, np.int64)

    @property
    def metrics(self) -> Metrics:
        """Means over folds as a function of the subjects' weights."""
        return lambda weight: _mean_over_folds(self.of_folds(weight))

    def minus(self, other: Predictor) -> Metrics:
        """As `metrics`, of the difference to another predictor, tested in the same folds."""

        def difference(weight: Floats) -> dict[str, Floats]:
            own, others = self.of_folds(weight), other.of_folds(weight)
            return _mean_over_folds({name: own[name] - others[name] for name in own})

        return difference

    def of_folds(self, weight: Floats) -> dict[str, Floats]:
        """Of each metric, the (fold, resample) values by weights (resample, subject)."""
        if self.people is not None:
            weight = weight.take(self.people, axis=1)
        found = [make(weight.take(who, axis=1)) for who, make in self._parts]
        return {name: np.stack([each[name] for each in found]) for name in found[0]}

    def by_fold(self) -> dict[str, Floats]:
        """Of each metric, the (fold,) values."""
        found = self.of_folds(np.ones((1, self.n_subjects)))
        return {name: values[:, 0] for name, values in found.items()}

    def against_chance(self, permutations: int, seed: int) -> dict[str, float]:
        folds = list(self.folds.values())
        return p_of_chance(self.true, self.predicted, permutations, seed, folds, self.people)

    def against(self, other: Predictor, permutations: int, seed: int) -> dict[str, float]:
        both, folds = (self.predicted, other.predicted), list(self.folds.values())
        return p_of_difference(self.true, *both, permutations, seed, folds, self.people)

    @property
    def _is_classifier(self) -> bool:
        return self.predicted.ndim == 2

    @cached_property
    def _parts(self) -> list[tuple[Ints, Metrics]]:
        """The subjects of each fold, and its metrics as a function of their weights."""
        make = classification_metrics if self._is_classifier else regression_metrics
        folds = list(self.folds.values())
        parts = zip(folds, split_rows(self.predicted, folds), strict=True)
        return [(who, make(self.true[who], predicted)) for who, predicted in parts]


def _mean_over_folds(values: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: mean_of_defined(of_folds) for name, of_folds in values.items()}


def read_predictors(predictions: pd.DataFrame) -> dict[str, Predictor]:
    """Each predictor by name.

    Parameters
    ----------
    predictions
        As `neuromamba.metrics.compute_metrics` takes them; of states with a column `state`.

    Raises
    ------
    InputError
        When a class has no column, a fold has no name or tests a subject twice, or a subject has
        two labels.
    """
    classes = class_names(predictions)
    number = {label: k for k, label in enumerate(classes)}
    order = ["fold", "subject"] if "fold" in predictions else "subject"
    found = {}
    for name, rows in name_samples(predictions).groupby("predictor", sort=False):
        rows = _check_folds(str(name), rows).sort_values(order)
        if classes:
            unknown = set(rows["y_true"].astype(str)) - set(number)
            if unknown:
                raise InputError(f"predictions of {name}: no column for class {min(unknown)!r}")
            rows = rows.assign(y_true=rows["y_true"].astype(str).map(number).astype(np.int64))
            probability = rows[[PROBABILITY + label for label in classes]].to_numpy(float)
            found[str(name)] = _read_predictor(str(name), rows, probability)
        else:
            rows = rows.assign(y_true=rows["y_true"].astype(float))
            values = np.asarray(rows["y_pred"].astype(float), dtype=np.float64)
            found[str(name)] = _read_predictor(str(name), rows, values)
    return found


def name_samples(predictions: pd.DataFrame) -> pd.DataFrame:
    """Predictions in which a subject's state, where there are states, is part of its name."""
    if "state" not in predictions:
        return predictions
    pairs = zip(predictions["subject"], predictions["state"].astype(str), strict=True)
    return predictions.assign(subject=[sample_name(*pair) for pair in pairs])


def _check_folds(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one predictor, refused where the folds are not those of a cross-validation."""
    if "fold" not in rows:
        return rows
    if nowhere := int(rows["fold"].isna().sum()):
        raise InputError(
            f"predictions of {name}: {nowhere} row(s) are of no fold; evaluate every fold again"
        )
    rows = rows.assign(fold=rows["fold"].astype(str))
    if (twice := rows.duplicated(["fold", "subject"])).any():
        first = rows[twice].iloc[0]
        raise InputError(
            f"predictions of {name}: {first['fold']} tests {first['subject']} twice; evaluate that "
            "fold again"
        )
    return rows


def _read_predictor(name: str, rows: pd.DataFrame, predicted: Floats) -> Predictor:
    """One predictor from its rows in order, `y_true` being numbers."""
    if "fold" not in rows:
        whole, names = {"": np.arange(len(rows))}, tuple(rows["subject"])
        return Predictor(names, rows["y_true"].to_numpy(), predicted, whole, _people(rows, names))
    labels = rows.groupby("subject")["y_true"]
    several = labels.nunique() > 1
    if several.any():
        raise InputError(
            f"predictions of {name}: the label of {several.idxmax()} differs between folds; "
            "evaluate all folds again with one table of subjects"
        )
    true = labels.first()
    who = np.asarray(true.index.get_indexer(pd.Index(rows["subject"])), dtype=np.int64)
    of_fold = rows["fold"].to_numpy()
    folds = {str(fold): who[of_fold == fold] for fold in np.unique(of_fold)}
    names = tuple(true.index)
    return Predictor(names, true.to_numpy(), predicted, folds, _people(rows, names))


def _people(rows: pd.DataFrame, names: Sequence[str]) -> Ints | None:
    """(sample,) number of the subject of each, where the rows are of states."""
    if "state" not in rows:
        return None
    subjects = [subject_of(name) for name in names]
    return np.unique(subjects, return_inverse=True)[1].astype(np.int64)


def refuse_unlike(name: str, one: Predictor, second: str, other: Predictor) -> None:
    """Refuse two predictors that were not tested on the same subjects in the same folds.

    Raises
    ------
    InputError
        Naming both.
    """
    same = one.subjects == other.subjects and one.folds.keys() == other.folds.keys()
    same = same and all(np.array_equal(who, other.folds[k]) for k, who in one.folds.items())
    if not same or not np.array_equal(one.true, other.true):
        raise InputError(
            f"predictions: {name} and {second} are of other subjects, labels or folds; "
            "evaluate both again on the same splits"
        )


def join_seeds(seeds: Mapping[int, Predictor]) -> Predictor:
    """One predictor whose metrics are means over seeds, which tested the same subjects.

    Every seed's folds follow those of the seed before it.
    """
    first, *_ = seeds.values()
    folds = {f"seed-{k} {name}": who for k, one in seeds.items() for name, who in one.folds.items()}
    predicted = np.concatenate([one.predicted for one in seeds.values()])
    return Predictor(first.subjects, first.true, predicted, folds, first.people)
