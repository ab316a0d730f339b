"""Probabilities to be taken at their word, and intervals, by how a model does on new subjects.

Choices
-------
- Probabilities become softmax(scale * log p + bias): temperature scaling (Guo et al. 2017, arXiv
  1706.04599) with a bias for each class (Alexandari et al. 2020, arXiv 1901.06852), which for two
  classes is Platt's scaling. The bias is needed because classes are weighted in training: the
  result is meant for people among whom classes are as common as among those it was fitted on.
- Few subjects change little: the fit is the most probable one under normal priors about the
  identity. It is kept only where it lowers the log loss of subjects that it was not fitted on.
- Intervals and sets are split conformal (Lei et al. 2018, arXiv 1604.04173): of new subjects who
  are exchangeable with those it was fitted on, at least the wanted share lies within, whatever the
  model is worth. Sets are by class (Vovk 2012, arXiv 1209.2673), so that this also holds for
  the people of each class; they rest on probabilities as the model gives them, to which nothing has
  been fitted. The step of the training that is kept was chosen by the same subjects, which makes
  both a little too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

MIN_SUBJECTS = 10
"""Fewer subjects change no probability (our choice)."""
SCALE_SD, BIAS_SD = 0.5, 1.0
"""Of the normal priors of log(scale) and of each bias, about 0 (our choice)."""
FOLDS = 10
"""Parts that subjects are put in by turns, to be scored by a fit on the others."""
LEAST_PROBABILITY = 1e-12
"""Keeps logarithms finite."""


@dataclass(frozen=True)
class Rescaling:
    """How probabilities are changed.

    Attributes
    ----------
    scale, bias
        softmax(scale * log p + bias), a bias for each class.
    log_loss, log_loss_unchanged
        Mean over subjects that the fit had not seen, after and before.
    """

    scale: float
    bias: tuple[float, ...]
    log_loss: float
    log_loss_unchanged: float

    def apply(self, probabilities: Floats) -> Floats:
        """(subject, class) probabilities, or those of one subject, to calibrated ones."""
        return np.asarray(softmax(_logits(probabilities, self.scale, np.array(self.bias)), axis=-1))


def fit_rescaling(probabilities: Floats, labels: Labels, classes: Sequence[str]) -> Rescaling | str:
    """Learn how a model's probabilities are to be changed, or why they are left as they are.

    Parameters
    ----------
    probabilities
        (subject, class) of subjects that the model was not trained on.
    labels
        (subject,) number of each one's class.
    classes
        Their names.
    """
    if len(labels) < MIN_SUBJECTS:
        return f"{len(labels)} validation subjects are too few to calibrate by ({MIN_SUBJECTS})"
    absent = [name for k, name in enumerate(classes) if k not in labels]
    if absent:
        return f"no validation subject is {' or '.join(absent)}"
    before = _log_losses(probabilities, labels, 1.0, np.zeros(len(classes)))
    after = np.empty_like(before)
    fold = np.arange(len(labels)) % min(FOLDS, len(labels))
    for part in range(fold.max() + 1):
        scored = fold == part
        fit = _fit(probabilities[~scored], labels[~scored])
        after[scored] = _log_losses(probabilities[scored], labels[scored], *fit)
    if not after.mean() < before.mean():
        return "the model's own probabilities fit validation subjects best"
    scale, bias = _fit(probabilities, labels)
    return Rescaling(scale, tuple(bias.tolist()), float(after.mean()), float(before.mean()))


def class_scores(
    probabilities: Floats, labels: Labels, classes: Sequence[str]
) -> dict[str, list[float]]:
    """How strange each class's subjects are as one of it: 1 - its probability, ascending."""
    return {
        name: np.sort(1 - probabilities[labels == k, k]).tolist() for k, name in enumerate(classes)
    }


def prediction_set(
    probabilities: Mapping[str, float], scores: Mapping[str, Sequence[float]], confidence: float
) -> list[str]:
    """The classes that cannot be excluded at a confidence; none, where a scan is like no class.

    Parameters
    ----------
    probabilities
        Of each class, as the model gives them.
    scores
        From `class_scores`.
    confidence
        Share of the people of each class whose set is to have it, at least.
    """
    return [
        name
        for name, probability in probabilities.items()
        if p_value(scores[name], 1 - probability) > 1 - confidence + 1e-12
    ]


def p_value(reference: Sequence[float], value: float) -> float:
    """Share of the reference and the value itself that are at least as large as the value."""
    return (1 + int(np.sum(np.asarray(reference) >= value))) / (len(reference) + 1)


def half_width(errors: Sequence[float], confidence: float) -> float | None:
    """Half the width of an interval around a prediction.

    Parameters
    ----------
    errors
        Absolute errors of subjects that the model was not trained on.
    confidence
        Share of new subjects whose value is to lie within, at least.

    Returns
    -------
    float or None
        The ceil((n + 1) * confidence)-th smallest error; `None` with fewer than `least_subjects`.
    """
    rank = math.ceil((len(errors) + 1) * confidence - 1e-9)
    return None if rank > len(errors) else float(np.sort(errors)[rank - 1])


def least_subjects(confidence: float) -> int:
    """How many subjects an interval, or a class of a set, takes."""
    return math.ceil(1 / (1 - confidence) - 1e-9) - 1


def _fit(probabilities: Floats, labels: Labels) -> tuple[float, Floats]:
    """The most probable scale, and bias of each class."""
    logs = _logs(probabilities)
    truth = np.eye(logs.shape[1])[labels]

    def cost(parameters: Floats) -> tuple[float, Floats]:
        scale, bias = np.exp(parameters[0]), parameters[1:]
        logits = scale * logs + bias
        error = softmax(logits, axis=1) - truth
        loss = -np.sum(truth * log_softmax(logits, axis=1))
        loss += np.sum(np.square(parameters / deviations)) / 2
        slope = np.concatenate([[scale * np.sum(logs * error)], error.sum(axis=0)])
        return float(loss), slope + parameters / np.square(deviations)

    deviations = np.array([SCALE_SD] + [BIAS_SD] * logs.shape[1])
    found = minimize(cost, np.zeros(len(deviations)), jac=True, method="L-BFGS-B")
    return float(np.exp(found.x[0])), np.asarray(found.x[1:])


def _log_losses(probabilities: Floats, labels: Labels, scale: float, bias: Floats) -> Floats:
    logs = log_softmax(_logits(probabilities, scale, bias), axis=1)
    return np.asarray(-logs[np.arange(len(labels)), labels])


def _logits(probabilities: Floats, scale: float, bias: Floats) -> Floats:
    return scale * _logs(probabilities) + bias


def _logs(probabilities: Floats) -> Floats:
    return np.log(np.maximum(probabilities, LEAST_PROBABILITY))
