"""Linear fits of a few numbers of each subject, their penalty chosen by cross-validation.

They are what a linear probe (`probe`) puts into the head of a model; see there for the choices.

The weights of a linear model with an L2 penalty are a combination of training rows. So it is fitted
on coordinates within their span, which are as many as subjects, where features are more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold

from neuromamba.inner_folds import class_folds
from neuromamba.platt import fit_sigmoids

PENALTIES = np.logspace(-3, 4, 8)
"""Inverse penalty (`C`) of features whose squares sum to 1 in a subject, on average."""
NEVER = -1e3
"""Logit of a class without a training subject: its probability is 0 even in float64, and sums with
it in float32, of which maps are made, keep four digits after the point."""

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Linear:
    """A fitted layer: weights (output, feature), bias (output,), and how it was chosen.

    Attributes
    ----------
    penalty
        Inverse penalty.
    folds
        Inner folds that chose it; 0 where a class has too few subjects for any, which leaves 1.
    score
        Mean AUROC over them, or mean squared error in z units; `None` without folds.
    """

    weights: Floats
    bias: Floats
    penalty: float
    folds: int
    score: float | None

    @property
    def chosen(self) -> dict[str, float | int | None]:
        """How the penalty was chosen, for a record of it."""
        return {"inverse_penalty": self.penalty, "folds": self.folds, "score": self.score}


def fit_classes(
    x: Floats,
    labels: Labels,
    outputs: int,
    folds: int,
    seed: int,
    people: Sequence[str] | None = None,
) -> Linear:
    """The logistic regression of balanced classes with the highest AUROC in the inner folds.

    Parameters
    ----------
    x
        (subject, feature), whose squares sum to about 1 in a subject.
    labels
        (subject,) numbers of their classes, from 0 to `outputs` - 1; two at least occur.
    folds, seed
        Inner folds, fewer where the rarest class is smaller, and what seeds their shuffling.
    people
        (subject,) names; those of the same name are in one inner fold.
    """
    present, y = np.unique(labels, return_inverse=True)
    x, basis = _within_span(x)
    # Weights that were given to the search would also weight the AUROC that chooses.
    model, chosen, score = LogisticRegression(class_weight="balanced", max_iter=5000), 1.0, None
    inner = class_folds(y, people, folds, seed)
    folds = 0 if inner is None else len(inner)
    slope, offset = 1.0, 0.0
    if inner is not None:
        search = GridSearchCV(model, {"C": PENALTIES}, scoring="roc_auc_ovr", cv=inner)
        search.fit(x, y)
        model, chosen, score = search.best_estimator_, search.best_params_["C"], search.best_score_
        sigmoid = fit_sigmoids(model, x, y, inner) if len(present) == 2 else None
        if sigmoid is not None:
            (slope,), (offset,) = sigmoid
    else:
        model.fit(x, y)
    lines, bias = model.coef_ @ basis * slope, model.intercept_ * slope + offset
    if len(present) == 2:
        lines, bias = np.vstack([-lines, lines]) / 2, np.concatenate([-bias, bias]) / 2
    weights, biases = np.zeros((outputs, basis.shape[1])), np.full(outputs, NEVER)
    weights[present], biases[present] = lines, bias
    return Linear(weights, biases, float(chosen), folds, score)


def fit_number(x: Floats, z: Floats, folds: int, seed: int) -> Linear:
    """The ridge regression with the lowest squared error in the inner folds.

    Parameters are those of `fit_classes`, with the target `z` (subject,) in place of classes.
    """
    x, basis = _within_span(x)
    folds = min(folds, len(z))
    if folds < 2:
        model = Ridge(alpha=1.0).fit(x, z)
        return Linear(model.coef_[None] @ basis, np.array([model.intercept_]), 1.0, 0, None)
    inner = KFold(folds, shuffle=True, random_state=seed)
    grid = {"alpha": 1 / PENALTIES}
    search = GridSearchCV(Ridge(), grid, scoring="neg_mean_squared_error", cv=inner).fit(x, z)
    model, chosen = search.best_estimator_, 1 / search.best_params_["alpha"]
    bias = np.array([model.intercept_])
    return Linear(model.coef_[None] @ basis, bias, float(chosen), folds, -float(search.best_score_))


def _within_span(x: Floats) -> tuple[Floats, Floats]:
    """Rows in an orthonormal basis of their span, and that basis (coordinate, feature)."""
    if x.shape[1] <= len(x):
        return x, np.eye(x.shape[1])
    directions, coordinates = np.linalg.qr(x.T)
    return coordinates.T, directions.T
