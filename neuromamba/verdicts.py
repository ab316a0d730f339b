"""Say in words what a table of metrics shows, and no more than it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from neuromamba.collect import Evaluation
from neuromamba.metrics import HIGHER_IS_BETTER, class_names


@dataclass(frozen=True)
class Metric:
    """How a metric is called and what it means."""

    label: str
    meaning: str


METRICS = {
    "auroc": Metric(
        "AUROC",
        "how often a subject of the positive class gets a higher score than one of the other: "
        "0.5 is guessing, 1 is perfect (with more than two classes, the mean of each against the "
        "rest)",
    ),
    "balanced_accuracy": Metric(
        "balanced accuracy",
        "share of subjects put in the right class, averaged over the classes so that the rarest "
        "counts as much as the commonest",
    ),
    "accuracy": Metric("accuracy", "share of subjects put in the right class"),
    "mae": Metric("MAE", "mean absolute error in the target's unit; smaller is better"),
    "pearson_r": Metric("Pearson r", "correlation of predicted with true values"),
    "r2": Metric(
        "R²",
        "share of the variance explained: 0 is as good as always naming the mean of the test "
        "subjects, below 0 is worse",
    ),
}
BASELINES = {
    "fc": "FC baseline",
    "majority": "majority class",
    "mean": "mean of training labels",
}


@dataclass(frozen=True)
class Cell:
    """One value with its interval; `best` where it is shown to be better than the other."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One predictor's metrics."""

    label: str
    cells: dict[str, Cell]
    n: int
    is_model: bool


def number(value: float | int | None, digits: int | None = None) -> str:
    """A number to about three digits, a count in full; `n/a` where there is none."""
    if value is None or not np.isfinite(value):
        return "n/a"
    if isinstance(value, (int, np.integer)):
        return f"{value:,}"
    rounded = round(float(value), _digits(value) if digits is None else digits)
    # Adding 0 makes -0.0 a plain 0.
    return f"{rounded + 0.0:.{_digits(value) if digits is None else digits}f}"


def _digits(value: float) -> int:
    size = abs(value)
    return 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3


def interval(value: float, low: float, high: float, digits: int | None = None) -> str:
    """A value with its interval in brackets, all to the same digit; `n/a` if it is not defined."""
    if not np.isfinite(value):
        return "n/a"
    if digits is None:
        digits = min(_digits(part) for part in (value, low, high))
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def result_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Rows of one target's table: each model and seed, then the baselines once.

    A cell is best where a paired bootstrap tells it apart: a model's, when it is better than the
    FC baseline; the baseline's, when it is better than every model.
    """
    rows = []
    verdicts = [_versus(e, "fc").set_index("metric")["better"] for e in evaluations]
    for evaluation, better in zip(evaluations, verdicts, strict=True):
        won = {name for name in better.index if better[name] == evaluation.model}
        label = f"{evaluation.model}, seed {evaluation.seed}"
        rows.append(_row(evaluation.metrics, evaluation.model, label, won, True))
    first = evaluations[0].metrics
    won = {name for name in verdicts[0].index if all(v[name] == "fc" for v in verdicts)}
    for name, label in BASELINES.items():
        if (first["predictor"] == name).any():
            rows.append(_row(first, name, label, won if name == "fc" else set(), False))
    return rows


def _row(metrics: pd.DataFrame, predictor: str, label: str, won: set[str], model: bool) -> Row:
    found = metrics[metrics["predictor"] == predictor].set_index("metric")
    # All predictors of a column to the same digit: that of the table's largest value.
    largest = metrics.set_index("metric")["value"].abs().groupby(level=0).max()
    cells = {
        str(name): Cell(
            interval(row["value"], row["low"], row["high"], _digits(largest[str(name)])),
            name in won,
        )
        for name, row in found.iterrows()
    }
    return Row(label, cells, int(found["n"].iloc[0]), model)


def verdict(evaluation: Evaluation) -> str:
    """One or two sentences on the first metric: against the FC baseline, and against guessing."""
    row = _versus(evaluation, "fc").iloc[0]
    name, model = str(row["metric"]), f"{evaluation.model} (seed {evaluation.seed})"
    label, difference = METRICS[name].label, float(row["difference"])
    if not np.isfinite(difference):
        return f"{model} cannot be compared with the FC baseline: {label} is not defined here."
    shown = f"difference in {label} {interval(difference, row['low'], row['high'])}"
    if row["better"] == evaluation.model:
        text = f"{model} is better than the FC baseline ({shown})"
    elif row["better"] == "fc":
        text = f"{model} does not beat the FC baseline; it is worse ({shown})"
    else:
        ahead = (difference > 0) == HIGHER_IS_BETTER[name]
        side = "level" if difference == 0 else "ahead" if ahead else "behind"
        text = (
            f"{model} does not beat the FC baseline: it is {side}, by a difference that these "
            f"test subjects cannot tell from none ({shown})"
        )
    return f"{text}. {_against_guessing(evaluation)}"


def _against_guessing(evaluation: Evaluation) -> str:
    constant = "majority" if class_names(evaluation.predictions) else "mean"
    row = _versus(evaluation, constant).iloc[0]
    what = "chance" if constant == "majority" else "always naming the training mean"
    if row["better"] == evaluation.model:
        return f"It is better than {what}."
    if row["better"] == constant:
        return f"It is worse than {what}."
    return f"It is not shown to be better than {what}."


def _versus(evaluation: Evaluation, other: str) -> pd.DataFrame:
    return evaluation.comparison[evaluation.comparison["versus"] == other]


def where_chance_is(evaluation: Evaluation) -> str:
    """What guessing would get."""
    classes = class_names(evaluation.predictions)
    if not classes:
        constant = evaluation.metrics.set_index(["predictor", "metric"])["value"]
        return (
            f"Without looking at the scans, naming the training mean for everyone gives an MAE of "
            f"{number(constant[('mean', 'mae')])}; r is then not defined, and guessing gives 0."
        )
    true = evaluation.predictions.drop_duplicates("subject")["y_true"]
    common = true.value_counts(normalize=True)
    return (
        f"Guessing gives an AUROC of 0.5 and a balanced accuracy of {1 / len(classes):.2g}; "
        f"naming the commonest class ({common.index[0]}) for everyone gives an accuracy of "
        f"{number(common.iloc[0])}."
    )
