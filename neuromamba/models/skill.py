"""How much better than an honest predictor a prediction is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def skills(errors: Mapping[str, Number]) -> dict[str, Number]:
    """``skill_<predictor>`` for every ``mse_<predictor>`` beside ``mse_model``.

    Parameters
    ----------
    errors : mapping of str to float or Tensor
        Mean squared errors over the same targets; other keys are ignored. To summarise several
        batches, pass the errors' averages over the batches, not the average of the skills.

    Returns
    -------
    dict
        1 - mse_model / mse_<predictor>: 0 is as good as the predictor, 1 is perfect, below 0 is
        worse. A predictor's error is taken to be at least 1e-12, since a run that does not change
        has no skill to show. Empty where there is no ``mse_model``.
    """
    if "mse_model" not in errors:
        return {}
    return {
        name.replace("mse_", "skill_", 1): 1 - errors["mse_model"] / _at_least(error, 1e-12)
        for name, error in errors.items()
        if name.startswith("mse_") and name != "mse_model"
    }


def _at_least(value: Number, minimum: float) -> Number:
    return value.clamp(min=minimum) if isinstance(value, Tensor) else max(value, minimum)
