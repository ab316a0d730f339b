"""Probabilities of decision values: Platt's sigmoid, of classes that count the same.

Source: J. Platt, "Probabilistic outputs for support vector machines" (1999), whose held-out
decision values are here those of a cross-validation. The sigmoid is fitted to decision values in
units of their own spread, under a normal prior of SD 1 of its slope in place of Platt's smoothed
targets: under a strong penalty, decision values are so small that scikit-learn's optimiser stops
where it starts (of 24 subjects who were told apart without an error it made probabilities of 0.499
and 0.501).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from neuromamba.inner_folds import Splits

Floats = npt.NDArray[np.float64]


def fit_sigmoids(
    model: Any, x: Floats, labels: npt.NDArray[np.int64], inner: Splits
) -> tuple[Floats, Floats] | None:
    """Slope and offset of the logit of each class by its held-out decision values.

    Parameters
    ----------
    model
        A classifier with `decision_function`; it is not changed.
    x, labels
        (subject, feature), and (subject,) numbers of their classes, counted from 0 without a gap.
    inner
        Folds whose scored parts are all subjects, each once.

    Returns
    -------
    slope, offset : (decision value,)
        Of two classes for the one decision value, which speaks for the second; else of each class.
        `None` where a slope is not positive: it was fitted to noise, and would turn the order.
    """
    held_out = cross_val_predict(clone(model), x, labels, cv=inner, method="decision_function")
    values = np.asarray(held_out, dtype=np.float64).reshape(len(labels), -1)
    spread = values.std(axis=0)
    if not spread.all():
        return None
    slope, offset = np.empty(len(spread)), np.empty(len(spread))
    for column in range(len(spread)):
        positive = labels == (column if len(spread) > 1 else 1)
        sigmoid = LogisticRegression(class_weight="balanced")
        sigmoid.fit(values[:, [column]] / spread[column], positive)
        slope[column] = sigmoid.coef_[0, 0] / spread[column]
        offset[column] = sigmoid.intercept_[0]
    return (slope, offset) if slope.min() > 0 else None
