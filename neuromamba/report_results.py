"""The report's section on one target: rows, words and figures of its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from neuromamba import figures, result_figures
from neuromamba.baseline_notes import BASELINES, describe_baselines
from neuromamba.collect import Data, Evaluation, collect_trainings
from neuromamba.config import Config, State, Target
from neuromamba.metrics import class_names
from neuromamba.report_data import describe_labels
from neuromamba.report_seeds import Means, mean_verdict, with_means
from neuromamba.report_training import describe_trainings, draw_curves, label_of
from neuromamba.verdicts import P_VERSUS, result_rows, verdict, where_chance_is


def describe_target(
    config: Config, data: Data, target: str, evaluations: Sequence[Evaluation], means: Means
) -> dict[str, Any]:
    """What the page shows of one target; `rows` is empty where nothing was evaluated.

    p of the evaluations and of the means over their seeds are corrected.
    """
    settings = config.datasets[data.name].targets[target]
    trainings = list(collect_trainings(config, data.name, target))
    described: dict[str, Any] = {
        "name": target,
        "settings": settings,
        "question": ask(target, settings),
        "labels": ""
        if isinstance(settings, State)
        else describe_labels(data, target, settings.kind),
        "curves": draw_curves(trainings),
        "trainings": describe_trainings(trainings),
        "rows": [],
    }
    if not evaluations:
        return described
    first = evaluations[0]
    rows, alpha = result_rows(evaluations), 1 - config.evaluate.confidence
    return described | {
        "rows": with_means(rows, evaluations, means.summaries),
        "columns": list(rows[0].cells),
        "tests": {name: label for name, label in P_VERSUS.items() if name in rows[0].p},
        "baselines": describe_baselines(first.notes, bool(settings.class_names)),
        "notes": first.notes,
        "folds": count_folds(first.predictions),
        "seen": sorted({subject for e in evaluations for subject in e.notes["seen_subjects"]}),
        **_verdicts(evaluations, means, alpha),
        "chance": where_chance_is(first),
        "figures": draw_results(evaluations),
    }


def ask(target: str, settings: Target) -> str:
    """The question that an evaluation answers."""
    what = f"people's {target} from scans"
    if isinstance(settings, State):
        what = (
            f"in which state ({', '.join(settings.classes)}) parts of scans were taken, {target},"
        )
    return (
        f"Does a model tell {what} of people it has never seen, and does it do so better than "
        "functional connectivity?"
    )


def _verdicts(
    evaluations: Sequence[Evaluation], means: Means, alpha: float
) -> dict[str, list[str]]:
    """All sentences, and those that answer the question: of several seeds only their mean's."""
    together = [mean_verdict(model, summary) for model, summary in means.summaries.items()]
    together += means.refused.values()
    own = [(evaluation.model, verdict(evaluation, alpha)) for evaluation in evaluations]
    return {
        "answers": [*together, *(text for model, text in own if model not in means.summaries)],
        "verdicts": [*together, *(text for _, text in own)],
    }


def count_folds(predictions: pd.DataFrame) -> int:
    """How many folds predictions are of: 1 for a holdout."""
    return int(predictions["fold"].nunique()) if "fold" in predictions else 1


def draw_results(evaluations: Sequence[Evaluation]) -> list[dict[str, str]]:
    """The figures of the predictions: `source`, `alt`, `caption`, `width`."""
    predictors = _by_label(evaluations)
    classes = class_names(evaluations[0].predictions)
    width = "wide" if len(predictors) > 1 else ""
    if not classes:
        r = ", ".join(f"{label} r {_correlation(t)}" for label, t in predictors.items())
        return [
            {
                "source": result_figures.scatter_plots(predictors),
                "alt": f"Scatter plots of true and predicted values: {r}",
                "caption": "Each point is a prediction of a test subject; on the grey line it "
                "would be right.",
                "width": width,
            }
        ]
    drawn = [
        _calibration(predictors, classes),
        {
            "source": result_figures.confusion_matrices(predictors, classes),
            "alt": f"Confusion matrices of {', '.join(predictors)}: {_hits(predictors)}",
            "caption": "Confusion: the share and number of each true class (row) that is put in "
            "each class (column).",
            "width": width,
        },
    ]
    if len(classes) == 2:
        drawn.insert(0, _roc(predictors, classes[1], count_folds(evaluations[0].predictions)))
    return drawn


def _roc(predictors: result_figures.Predictors, positive: str, folds: int) -> dict[str, str]:
    mean = " Curves are means over the folds that have both classes." if folds > 1 else ""
    return {
        "source": result_figures.roc_curves(predictors, positive),
        "alt": f"ROC curves of {', '.join(predictors)}; the areas are in the table as AUROC",
        "caption": "How many of one class are found (up) at the price of how many false alarms "
        f"(right), as the threshold falls. The area below is the AUROC.{mean}",
        "width": "",
    }


def _calibration(predictors: result_figures.Predictors, classes: list[str]) -> dict[str, str]:
    what = "this probability" if len(classes) == 2 else "this probability, the highest of all"
    return {
        "source": result_figures.calibration_curves(predictors, classes),
        "alt": f"Calibration curves of {', '.join(predictors)}; the table has the mean distance "
        "from the diagonal as ECE",
        "caption": f"How often a class is true (up) where it gets {what} (right). On the dotted "
        "line, probabilities can be taken at their word.",
        "width": "",
    }


def _by_label(evaluations: Sequence[Evaluation]) -> dict[str, pd.DataFrame]:
    """Predictions of each model and, once, of the FC baseline."""
    tables = {}
    for evaluation in evaluations[: len(figures.COLOURS) - 1]:
        own = evaluation.predictions["predictor"] == evaluation.model
        tables[label_of(evaluation)] = evaluation.predictions[own]
    first = evaluations[0].predictions
    return tables | {BASELINES["fc"]: first[first["predictor"] == "fc"]}


def _hits(predictors: result_figures.Predictors) -> str:
    parts = []
    for label, table in predictors.items():
        right = table["y_true"].astype(str) == table["y_pred"].astype(str)
        parts.append(f"{label} has {right.sum()} of {len(right)} right")
    return "; ".join(parts)


def _correlation(table: pd.DataFrame) -> str:
    true, predicted = (table[name].astype(float) for name in ("y_true", "y_pred"))
    if true.nunique() < 2 or predicted.nunique() < 2:
        return "not defined"
    return f"{np.corrcoef(true, predicted)[0, 1]:.2f}"
