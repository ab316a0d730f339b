"""Figures of what predictors say of the test subjects, each as a `data:` address.

Of a cross-validation a subject may have several rows, one for each fold that it was tested in. ROC
curves are then means over the folds, as their areas are; all other figures show every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, roc_curve

from neuromamba.baseline_notes import BASELINES
from neuromamba.figures import COLOURS, GREY, STYLE, as_svg
from neuromamba.metrics import PROBABILITY
from neuromamba.weighted_metrics import ECE_BINS

Predictors = Mapping[str, pd.DataFrame]
"""By label, one predictor's rows of a `predictions.tsv`."""
ACROSS = 3
"""Panels in a row."""
MOST_INSIDE = 3
"""Lines that a legend within the axes leaves room for."""
LINES = ("-", "-.", ":")
BASELINE_COLOUR = "#222222"
STEPS = np.linspace(0, 1, 101)


def roc_curves(predictors: Predictors, positive: str) -> str:
    """ROC curves of two classes, of which `positive` is to be found."""
    with matplotlib.rc_context(STYLE):
        figure, axis = _square()
        for k, (label, table) in enumerate(predictors.items()):
            curve = _mean_roc(table, positive)
            if curve is not None:
                axis.plot(*curve, label=label, **_look(k, label))
        axis.set(xlabel=f"others called {positive}", ylabel=f"{positive} called {positive}")
        return _finish(figure, axis, "chance", "ROC on the test subjects")


def _mean_roc(
    table: pd.DataFrame, positive: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """False and true positive rates, averaged over folds that have both classes."""
    parts = [part for _, part in table.groupby("fold")] if "fold" in table else [table]
    curves = []
    for part in parts:
        true = part["y_true"].astype(str) == positive
        if true.nunique() == 2:
            curves.append(roc_curve(true, part[PROBABILITY + positive])[:2])
    if len(curves) < 2:
        return curves[0] if curves else None
    # Vertical averages; each curve begins at the origin.
    mean = np.mean([np.interp(STEPS, *curve) for curve in curves], axis=0)
    return np.insert(STEPS, 0, 0.0), np.insert(mean, 0, 0.0)


def calibration_curves(predictors: Predictors, classes: list[str]) -> str:
    """How often what was predicted came true, by its probability.

    Of two classes the probability is that of the second, of more classes that of the class which
    was chosen.
    """
    with matplotlib.rc_context(STYLE):
        figure, axis = _square()
        for k, (label, table) in enumerate(predictors.items()):
            true, probability = _forecasts(table, classes)
            share, predicted = calibration_curve(true, probability, n_bins=ECE_BINS)
            axis.plot(predicted, share, marker="o", markersize=3, label=label, **_look(k, label))
        if len(classes) == 2:
            axis.set(
                xlabel=f"predicted probability of {classes[1]}", ylabel=f"share of {classes[1]}"
            )
        else:
            axis.set(xlabel="probability of the class chosen", ylabel="share of right choices")
        return _finish(figure, axis, "calibrated", f"Calibration, {ECE_BINS} bins")


def _forecasts(table: pd.DataFrame, classes: list[str]) -> tuple[Any, Any]:
    """(row,) whether an event came true, and the probability that it was given."""
    if len(classes) == 2:
        return table["y_true"].astype(str) == classes[1], table[PROBABILITY + classes[1]]
    probability = table[[PROBABILITY + name for name in classes]]
    return table["y_true"].astype(str) == table["y_pred"].astype(str), probability.max(axis=1)


def confusion_matrices(predictors: Predictors, classes: list[str]) -> str:
    """Shares of each true class (row) by predicted class, with the numbers of predictions."""

    def draw(axis: Axes, table: pd.DataFrame, colour: str) -> None:
        true, predicted = table["y_true"].astype(str), table["y_pred"].astype(str)
        counts = confusion_matrix(true, predicted, labels=classes)
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(*shares.shape):
            ink = "white" if shares[row, column] > 0.6 else "black"
            text = f"{shares[row, column]:.0%}\n{counts[row, column]}"
            axis.text(column, row, text, ha="center", va="center", color=ink)
        axis.set(xlabel="predicted", ylabel="true")
        names = [name if len(name) <= 12 else f"{name[:11]}…" for name in classes]
        axis.set_xticks(range(len(classes)), names, rotation=30 if len(classes) > 2 else 0)
        axis.set_yticks(range(len(classes)), names)

    return _panels(predictors, draw)


def scatter_plots(predictors: Predictors) -> str:
    """True against predicted values, a point for each prediction."""

    def draw(axis: Axes, table: pd.DataFrame, colour: str) -> None:
        true, predicted = table["y_true"].astype(float), table["y_pred"].astype(float)
        ends = [true.min(), true.max()]
        axis.plot(ends, ends, color=GREY, linewidth=0.8)
        axis.scatter(true, predicted, s=14, color=colour, alpha=0.6, linewidths=0)
        axis.set(xlabel="true", ylabel="predicted")

    return _panels(predictors, draw)


def _panels(predictors: Predictors, draw: Callable[[Axes, pd.DataFrame, str], None]) -> str:
    """A panel for each predictor, on the same scales."""
    across = min(len(predictors), ACROSS)
    down = -(-len(predictors) // across)
    with matplotlib.rc_context(STYLE):
        size = (3.2 * across, 3.2 * down)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
        for k, (axis, (label, table)) in enumerate(zip(axes, predictors.items(), strict=False)):
            draw(axis, table, _colour(k, label))
            axis.set_title(label)
        for axis in axes[len(predictors) :]:
            axis.set_axis_off()
        for axis in axes[len(predictors) - across : len(predictors)]:
            # Shared axes have their ticks in the last row alone, which may end before this panel.
            axis.tick_params(labelbottom=True)
        return as_svg(figure)


def _square() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    return figure, figure.subplots()


def _colour(k: int, label: str) -> str:
    """Models have colours in their order; the baseline has its own on every page."""
    return BASELINE_COLOUR if label == BASELINES["fc"] else COLOURS[k % len(COLOURS)]


def _look(k: int, label: str) -> dict[str, Any]:
    style = "--" if label == BASELINES["fc"] else LINES[k % len(LINES)]
    return {"linestyle": style, "color": _colour(k, label)}


def _finish(figure: Figure, axis: Axes, line: str, title: str) -> str:
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label=line)
    axis.set_aspect("equal")
    axis.set_title(title)
    handles = axis.get_legend_handles_labels()[0]
    if len(handles) > MOST_INSIDE:
        figure.set_size_inches(4.2, 4.2 + 0.2 * len(handles))
        figure.legend(loc="outside lower left")
    else:
        axis.legend(loc="best")
    return as_svg(figure)
