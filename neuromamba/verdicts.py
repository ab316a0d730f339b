"""Say in words what a table of metrics shows, and no more than it shows.

All follows from `better` and `p` of the comparisons, as `neuromamba.correction` leaves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from neuromamba.baseline_notes import BASELINES, CONFOUNDS, join
from neuromamba.collect import Evaluation
from neuromamba.correction import ALPHA
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
    "brier": Metric(
        "Brier score",
        "mean squared error of the probabilities; smaller is better, and with two classes 0.25 is "
        "what saying one half to everyone gets",
    ),
    "ece": Metric(
        "ECE",
        "expected calibration error: how far the probabilities are from how often they come true, "
        "over ten bins of equal width; smaller is better, and 0 says nothing of how well the "
        "classes are told apart. Resamples make it larger, for which its interval is moved back. "
        "Models and baselines learn as if all classes were equally common, so their probabilities "
        "are off where they are not",
    ),
    "mae": Metric("MAE", "mean absolute error in the target's unit; smaller is better"),
    "pearson_r": Metric("Pearson r", "correlation of predicted with true values"),
    "r2": Metric(
        "R²",
        "share of the variance explained: 0 is as good as always naming the mean of the test "
        "subjects, below 0 is worse",
    ),
}
P_VERSUS = {"chance": "chance", "fc": "FC baseline", "confounds": "confound model"}


@dataclass(frozen=True)
class Cell:
    """One value with its interval; `best` where it is shown to be better than the other."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One predictor's metrics, and p of the first of them by what it is compared with.

    `is_mean` rows are of the seeds of a model together.
    """

    label: str
    cells: dict[str, Cell]
    n: int
    is_model: bool
    p: dict[str, str]
    is_mean: bool = False


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


def p_value(p: float) -> str:
    """A p value to three digits; `n/a` where there is none."""
    if not np.isfinite(p):
        return "n/a"
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def result_rows(evaluations: Sequence[Evaluation]) -> list[Row]:
    """Rows of one target's table: each model and seed, then the baselines once.

    A cell is best where a paired test tells it apart: a model's, when it is better than the FC
    baseline; the baseline's, when it is better than every model.
    """
    rows = []
    verdicts = [_versus(e, "fc").set_index("metric")["better"] for e in evaluations]
    for evaluation, better in zip(evaluations, verdicts, strict=True):
        won = {name for name in better.index if better[name] == evaluation.model}
        label = f"{evaluation.model}, seed {evaluation.seed}"
        compared = {name: _compared_p(_versus(evaluation, name)) for name in P_VERSUS}
        row = _row(evaluation.metrics, evaluation.model, label, won)
        p = {name: value for name, value in compared.items() if value} | row.p
        rows.append(replace(row, is_model=True, p=p))
    first = evaluations[0].metrics
    won = {name for name in verdicts[0].index if all(v[name] == "fc" for v in verdicts)}
    for name, label in BASELINES.items():
        if (first["predictor"] == name).any():
            rows.append(_row(first, name, label, won if name == "fc" else set()))
    return rows


def _row(metrics: pd.DataFrame, predictor: str, label: str, won: set[str]) -> Row:
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
    p = {"chance": p_value(_p(found.iloc[0]))}
    return Row(label, cells, int(found["n"].iloc[0]), False, p)


def _compared_p(table: pd.DataFrame) -> str:
    return p_value(table.iloc[0].get("p_holm", table.iloc[0]["p"])) if len(table) else ""


def _p(row: pd.Series) -> float:
    """p against chance, corrected where `corrected` has been at work on it: not of baselines."""
    known = row.get("p_holm", np.nan)
    return float(row["p"] if known is None or pd.isna(known) else known)


def verdict(evaluation: Evaluation, alpha: float = ALPHA) -> str:
    """Sentences on the first metric: against the FC baseline, the confounds, and guessing."""
    row = _versus(evaluation, "fc").iloc[0]
    name, model = str(row["metric"]), f"{evaluation.model} (seed {evaluation.seed})"
    difference = float(row["difference"])
    if not np.isfinite(difference):
        label = METRICS[name].label
        return f"{model} cannot be compared with the FC baseline: {label} is not defined here."
    shown = _difference(row)
    if row["better"] == evaluation.model:
        text = f"{model} is better than the FC baseline ({shown})"
    elif row["better"] == "fc":
        text = f"{model} does not beat the FC baseline; it is worse ({shown})"
    else:
        ahead = (difference > 0) == HIGHER_IS_BETTER[name]
        side = "level" if difference == 0 else "ahead" if ahead else "behind"
        # An interval over subjects may leave out 0 where the corrected tests, of which one is also
        # about other training subjects, show nothing.
        apart = row["low"] > 0 or row["high"] < 0
        who = "the tests of it" if apart else "these test subjects"
        text = (
            f"{model} does not beat the FC baseline: it is {side}, by a difference that {who} "
            f"cannot tell from none ({shown})"
        )
    parts = (_against_confounds(evaluation), _against_guessing(evaluation, alpha))
    return " ".join([f"{text}.", *(part for part in parts if part)])


def _difference(row: pd.Series) -> str:
    values = interval(row["difference"], row["low"], row["high"])
    return f"difference in {METRICS[str(row['metric'])].label} {values}, {tell_p(row)}"


def tell_p(row: pd.Series) -> str:
    """Say which p a comparison has: over folds there are two, of which the larger is corrected."""
    over_folds, test = float(row.get("p_resampled", np.nan)), "the corrected t-test over folds"
    if "p_holm" not in row:
        also = f", and by {test} p {p_value(over_folds)}" if np.isfinite(over_folds) else ""
        return f"p {p_value(row['p'])}{also}"
    how = ", corrected for the number of comparisons"
    if np.isfinite(over_folds):
        how = f", the larger of that by swaps and that by {test} ({p_value(over_folds)}){how}"
    return f"p {p_value(row['p_holm'])}{how}"


def _against_confounds(evaluation: Evaluation) -> str:
    table = _versus(evaluation, "confounds")
    if not len(table):
        return ""
    row = table.iloc[0]
    used = evaluation.notes.get("baselines", {}).get("confounds", {}).get("columns")
    known = join([CONFOUNDS[name] for name in used]) if used else "head motion and site"
    if row["better"] == evaluation.model:
        return f"It is better than what {known} alone predict ({_difference(row)})."
    how = "is worse than" if row["better"] == "confounds" else "does not beat"
    return f"It {how} the confound model, what {known} alone predict ({_difference(row)})."


def _against_guessing(evaluation: Evaluation, alpha: float) -> str:
    constant = "majority" if class_names(evaluation.predictions) else "mean"
    row = _versus(evaluation, constant).iloc[0]
    what = "chance" if constant == "majority" else "always naming the training mean"
    own = evaluation.metrics[evaluation.metrics["predictor"] == evaluation.model].iloc[0]
    # Chance has a test of its own, by shuffled labels; the mean is a predictor like another. So is
    # the majority over folds, whose models share subjects: shuffling labels then claims too much.
    folds = "folds" in evaluation.notes
    chance = constant == "majority" and _p(own) <= alpha and not folds
    if chance or ((folds or constant == "mean") and row["better"] == evaluation.model):
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
    once = [name for name in ("subject", "state") if name in evaluation.predictions]
    true = evaluation.predictions.drop_duplicates(once)["y_true"]
    common = true.value_counts(normalize=True)
    return (
        f"Guessing gives an AUROC of 0.5 and a balanced accuracy of {1 / len(classes):.2g}; "
        f"naming the commonest class ({common.index[0]}) for everyone gives an accuracy of "
        f"{number(common.iloc[0])}."
    )
