"""What a model has to beat: other people's brains without a foundation model, and no brain at all.

- `fc`: functional connectivity (the first kind of `rois.connectivity`) with logistic or ridge
  regression. `fc-svm`, `fc-kernel-ridge`: the same features with other linear models.
- `fc-regress`: as `fc`, with the confounds regressed out of the features. `fc-combat`: with the
  effects of sites taken out of them by ComBat (`neuromamba.combat`), fitted on whom it learns from.
- `fc-partial`, `fc-tangent`: logistic or ridge regression on partial correlations and on tangent
  space.
- `roi-mean`: on the mean and SD of each ROI's series, that is, without any connectivity.
- `confounds`: on age, sex, site, head motion and the like (`neuromamba.confound_model`).
- `majority`, `mean`: on nothing; always there.

All predict the same test subjects. They learn from the training *and* validation parts of the
split: the model uses its validation subjects to choose a step, a baseline uses all of them to
choose a penalty, and neither sees a test subject.

Of states the features are those of the volumes of each state (`neuromamba.excerpts`), and a sample,
which is a subject in a state, stands in the place of a subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba.combat import fit_combat
from neuromamba.config import Evaluate
from neuromamba.config.evaluation import Baseline
from neuromamba.confound_model import design
from neuromamba.events import subject_of
from neuromamba.files import InputError
from neuromamba.inner_folds import class_folds
from neuromamba.linear_models import Confounds, Method, predict_class, predict_number
from neuromamba.metrics import PROBABILITY
from neuromamba.roi_features import Connectivity, Stores, load_connectivity
from neuromamba.series_features import load_moments, load_tangent
from neuromamba.states import States

METHODS: dict[str, Method] = {"fc-svm": "svm", "fc-kernel-ridge": "kernel-ridge"}
"""Baselines with another model than logistic or ridge regression."""
NO_FEATURES = ("majority", "mean")
BASELINES = (*get_args(Baseline), *NO_FEATURES)


@dataclass(frozen=True)
class Subjects:
    """Who is evaluated on what.

    Attributes
    ----------
    classes
        Class names, the positive one last; empty for a number.
    train, test
        True label of each subject that has one, sorted by subject: `train` holds the training and
        the validation part of the split. Of states, of each sample.
    unlabelled, without_runs
        Subjects of the split without a label, and with one but without a usable run.
    states
        Of states, what the events tell.
    """

    classes: list[str]
    train: pd.Series
    test: pd.Series
    unlabelled: int
    without_runs: int = 0
    states: States | None = None

    @property
    def columns(self) -> list[str]:
        """What a table of predictions has: `prob_<class>`, or `value`."""
        return [PROBABILITY + name for name in self.classes] or ["value"]

    @property
    def people(self) -> list[str]:
        """Whose the rows of `train` are."""
        return [subject_of(name) for name in self.train.index]

    @property
    def tested(self) -> list[str]:
        """The subjects that are tested, each once."""
        return sorted({subject_of(name) for name in self.test.index})


def predict_baselines(
    settings: Evaluate, subjects: Subjects, stores: Stores, confounds: pd.DataFrame, seed: int
) -> tuple[dict[str, pd.DataFrame], dict[str, dict[str, Any]]]:
    """Predictions of the test subjects by each of `evaluate.baselines`, and notes on how.

    Parameters
    ----------
    settings
        Which baselines, and inner folds.
    subjects
        Whom to learn from and whom to predict.
    stores, confounds
        The `rois/{run}.zarr` of each subject, and the table of `confounds_of`.
    seed
        Of the inner folds.

    Returns
    -------
    predicted, notes
        By baseline: a table indexed by test subject with `subjects.columns`, and JSON-able facts.

    Raises
    ------
    InputError
        When the ROI stores cannot be read or have too little in common, or when there are no
        confounds to learn from, or no sites to harmonise.
    """
    train, test = list(subjects.train.index), list(subjects.test.index)
    matrix, matrix_test, used = design(confounds, train, test)
    _refuse_no_confounds(settings, used)
    predicted: dict[str, pd.DataFrame] = {}
    notes: dict[str, dict[str, Any]] = {}
    kind, features = "", None
    # Those of the same features follow each other, and only the features in use are held.
    for name in sorted(settings.baselines, key=_features_of):
        if name == "confounds":
            predicted[name], how = _predict(subjects, matrix, matrix_test, settings, seed)
            notes[name] = {**how, "columns": used}
            continue
        if features is None or kind != _features_of(name):
            kind, features = _features_of(name), None
            features = _load(kind, stores, train, test)
        method = METHODS.get(name, "linear")
        regressed = (matrix, matrix_test) if name == "fc-regress" else None
        seen, facts = features, _describe(features)
        if name == "fc-combat":
            seen, facts["harmonised"] = _harmonise(features, confounds, train, test)
        predicted[name], how = _predict(
            subjects, seen.train, seen.test, settings, seed, method, regressed
        )
        out = used if regressed else []
        notes[name] = {**how, **facts, "confounds_regressed": out}
    return {n: predicted[n] for n in settings.baselines}, {n: notes[n] for n in settings.baselines}


def _refuse_no_confounds(settings: Evaluate, used: Sequence[str]) -> None:
    if not used and {"confounds", "fc-regress"} & {*settings.baselines}:
        raise InputError(
            f"evaluate.confounds ({', '.join(settings.confounds)}): none of them is known of the "
            "training subjects and differs between them; name others, or leave confounds and "
            "fc-regress out of evaluate.baselines"
        )


def _describe(features: Connectivity) -> dict[str, Any]:
    return {
        "kind": features.kind,
        "n_rois": features.n_rois,
        "n_rois_dropped": features.n_dropped,
        "share_missing": features.missing,
        "n_features": features.train.shape[1],
    }


def _harmonise(
    features: Connectivity, confounds: pd.DataFrame, train: Sequence[str], test: Sequence[str]
) -> tuple[Connectivity, dict[str, int]]:
    """The features without the effects of sites; how many sites, and whom they stayed with."""
    site = confounds["site"] if "site" in confounds else pd.Series(dtype=object)
    sites, sites_test = (site.reindex(list(people)).tolist() for people in (train, test))
    combat = fit_combat(features.train, sites)
    facts = {
        "sites": len(combat.sites),
        "train_left": int((~combat.knows(sites)).sum()),
        "test_left": int((~combat.knows(sites_test)).sum()),
    }
    harmonised = combat.harmonise(features.train, sites)
    return replace(
        features, train=harmonised, test=combat.harmonise(features.test, sites_test)
    ), facts


def _features_of(name: str) -> str:
    return "fc" if name in (*METHODS, "fc-regress", "fc-combat") else name


def _load(kind: str, stores: Stores, train: Sequence[str], test: Sequence[str]) -> Connectivity:
    match kind:
        case "fc-tangent":
            return load_tangent(stores, train, test)
        case "roi-mean":
            return load_moments(stores, train, test)
        case "fc-partial":
            return load_connectivity(stores, train, test, "partial")
    return load_connectivity(stores, train, test)


def _predict(
    subjects: Subjects,
    train: npt.NDArray[np.floating],
    test: npt.NDArray[np.floating],
    settings: Evaluate,
    seed: int,
    method: Method = "linear",
    regressed: Confounds | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Predictions in the form of `predict_baselines`, and the inverse penalty with its folds."""
    how = (settings.inner_folds, seed, method, regressed)
    index = subjects.test.index
    if subjects.classes:
        present = [name for name in subjects.classes if (subjects.train == name).any()]
        labels = np.array([present.index(name) for name in subjects.train], dtype=np.int64)
        inner = class_folds(labels, subjects.people, settings.inner_folds, seed)
        values, chosen = predict_class(train, labels, test, *how, subjects.people)
        table = pd.DataFrame(values, index, [PROBABILITY + name for name in present])
        table = table.reindex(columns=subjects.columns, fill_value=0.0)
        return table, {"inverse_penalty": chosen, "folds": len(inner or [])}
    numbers = subjects.train.to_numpy(float)
    # Standardised, so that one grid of penalties suits every unit.
    mean, sd = numbers.mean(), numbers.std()
    scaled, chosen = predict_number(train, (numbers - mean) / sd, test, *how)
    table = pd.DataFrame({"value": mean + sd * scaled}, index)
    return table, {"inverse_penalty": chosen, "folds": min(settings.inner_folds, len(numbers))}


def no_features(labels: pd.Series, classes: Sequence[str]) -> dict[str, Any]:
    """What to predict without looking: class shares, or the mean, of the training labels.

    Returns
    -------
    dict
        Share of each class by name; or `value`, when there are no `classes`.
    """
    if not classes:
        return {"value": float(labels.astype(float).mean())}
    return {name: float((labels == name).mean()) for name in classes}
