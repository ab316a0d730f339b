"""The report's figures, each as a `data:` address that a page can hold.

Lines are SVG, pictures of voxels PNG. Colours are those of Okabe and Ito, which stay apart for
colour-blind readers; what a colour means is also told by a line's style or by its place.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from neuromamba.metrics import PROBABILITY, class_names
from neuromamba.weighted_metrics import ECE_BINS

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
GREY = "#666666"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "neuromamba",
}
SLICES = 7


def loss_curves(trainings: Mapping[str, pd.DataFrame]) -> str:
    """Loss over steps, one colour per training.

    Parameters
    ----------
    trainings
        By label, the rows of a `metrics.jsonl`: `step`, `split`, `loss`, `skill_*`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        for colour, (label, table) in zip(_colours(), trainings.items(), strict=False):
            _loss_lines(axis, table, label if len(trainings) > 1 else "", colour)
        axis.set(title="Loss", xlabel="step", ylabel="loss")
        axis.legend(loc="best")
        return _svg(figure)


def skill_curves(trainings: Mapping[str, pd.DataFrame]) -> str | None:
    """Skills on the validation subjects, as `loss_curves`; `None` where there are none."""
    columns = {str(column) for table in trainings.values() for column in table}
    skills = sorted(column for column in columns if column.startswith("skill_"))
    if not skills:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        for colour, (label, table) in zip(_colours(), trainings.items(), strict=False):
            _skill_lines(axis, table, skills, colour, label if len(trainings) > 1 else "")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title="Skill on the validation subjects", xlabel="step", ylabel="skill")
        _keep_in_view(axis)
        axis.legend(loc="best")
        return _svg(figure)


def _loss_lines(axis: Axes, table: pd.DataFrame, label: str, colour: str) -> None:
    train, validation = (table[table["split"] == part] for part in ("train", "validation"))
    name = f"{label}, " if label else ""
    axis.plot(
        train["step"], train["loss"], color=colour, alpha=0.45, linewidth=1, label=f"{name}training"
    )
    axis.plot(
        validation["step"],
        validation["loss"],
        color=colour,
        marker="o",
        markersize=3,
        label=f"{name}validation",
    )


def _skill_lines(
    axis: Axes, table: pd.DataFrame, skills: Sequence[str], colour: str, label: str
) -> None:
    rows = table[table["split"] == "validation"]
    known = [name for name in skills if name in rows]
    for k, name in enumerate(known):
        # One training: a colour for each predictor. Several: a colour for each training.
        axis.plot(
            rows["step"],
            rows[name],
            color=colour if label else COLOURS[k],
            linestyle=("-", "--", ":")[k % 3],
            marker="o",
            markersize=3,
            label=(f"{label}, " if label else "") + f"over {name.removeprefix('skill_')}",
        )


def _keep_in_view(axis: Axes) -> None:
    """Cut off a hopeless start, which would press the rest against the top."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < -1 < high:
        axis.set_ylim(-1, max(0.05, high) + 0.05 * (high + 1))


def distributions(columns: Mapping[str, pd.Series]) -> str:
    """A histogram for each column, titled by its label; missing values are left out."""
    with matplotlib.rc_context(STYLE):
        count = len(columns)
        across = min(count, 4)
        down = -(-count // across)
        figure = Figure(figsize=(2.4 * across, 2.2 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis, (label, values) in zip(axes, columns.items(), strict=False):
            found = values.dropna().to_numpy(dtype=float)
            axis.hist(found, bins=min(20, max(5, len(found) // 4)), color=COLOURS[0])
            axis.axvline(float(np.median(found)), color=COLOURS[1], linestyle="--")
            axis.set_title(label)
            axis.ticklabel_format(useOffset=False, style="plain")
            axis.locator_params(axis="x", nbins=4)
            axis.locator_params(axis="y", nbins=4, integer=True)
        for axis in axes[count:]:
            axis.set_axis_off()
        axes[0].set_ylabel("runs")
        return _svg(figure)


def brain(
    mean: npt.NDArray[np.floating],
    mask: npt.NDArray[np.bool_],
    tokens: npt.NDArray[np.bool_] | None,
    height: npt.NDArray[np.floating],
) -> str:
    """Axial slices of a mean image with the outlines of the brain mask and of the tokens.

    Parameters
    ----------
    mean, mask, tokens
        (z, y, x) on one grid; `tokens` is true in every voxel of a patch that is kept.
    height
        (z,) mm of each slice.
    """
    outline = mask if tokens is None else mask | tokens
    window = tuple(slice(max(0, found.min() - 1), found.max() + 2) for found in np.nonzero(outline))
    levels = np.flatnonzero(mask.any(axis=(1, 2)))
    chosen = np.unique(levels[np.linspace(0, len(levels) - 1, SLICES + 2).round().astype(int)])[
        1:-1
    ]
    shown = np.where(mask, np.nan_to_num(mean), 0.0)
    high = np.percentile(shown[mask], 99)
    with matplotlib.rc_context({**STYLE, "image.interpolation": "nearest"}):
        figure = Figure(figsize=(1.5 * len(chosen), 2.1), facecolor="black")
        axes = figure.subplots(1, len(chosen), squeeze=False)[0]
        figure.subplots_adjust(0.005, 0, 0.995, 0.9, wspace=0.02)
        for axis, level in zip(axes, chosen, strict=True):
            cut = (level, *window[1:])
            axis.imshow(shown[cut], origin="lower", cmap="gray", vmin=0, vmax=high)
            axis.contour(mask[cut], [0.5], colors="#56B4E9", linewidths=0.8)
            if tokens is not None and tokens[cut].any() and not tokens[cut].all():
                axis.contour(tokens[cut], [0.5], colors="#E69F00", linewidths=0.8)
            axis.set_axis_off()
            axis.set_title(f"z = {height[level]:.0f} mm", color="white", loc="center", fontsize=8)
        return _png(figure)


def connectivity(fc: npt.NDArray[np.floating]) -> str:
    """A (roi, roi) matrix of correlations; missing ones are grey."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.6), layout="constrained")
        axis = figure.subplots()
        colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#BBBBBB")
        limit = max(0.1, float(np.nanpercentile(np.abs(fc[~np.eye(len(fc), dtype=bool)]), 99)))
        image = axis.imshow(fc, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set(xlabel="ROI", ylabel="ROI")
        figure.colorbar(image, label="Pearson r", shrink=0.8)
        return _png(figure)


def results(predictors: Mapping[str, pd.DataFrame]) -> str:
    """What the predictors say of the test subjects.

    ROC and reliability curves for two classes, confusion matrices for more, true against predicted
    values for numbers.

    Parameters
    ----------
    predictors
        By label, one predictor's rows of a `predictions.tsv`.
    """
    classes = class_names(next(iter(predictors.values())))
    with matplotlib.rc_context(STYLE):
        if len(classes) == 2:
            return _svg(_two_classes(predictors, classes[1]))
        draw = _confusion if classes else _scatter
        figure = Figure(figsize=(3.2 * len(predictors), 3.3), layout="constrained")
        axes = figure.subplots(1, len(predictors), squeeze=False, sharex=True, sharey=True)[0]
        for axis, colour, (label, table) in zip(axes, _colours(), predictors.items(), strict=False):
            draw(axis, table, classes, colour)
            axis.set_title(label)
        return _svg(figure)


def _two_classes(predictors: Mapping[str, pd.DataFrame], positive: str) -> Figure:
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    roc, reliability = figure.subplots(1, 2)
    styles = ["-", "--", "-.", ":"]
    for k, (label, table) in enumerate(predictors.items()):
        true = table["y_true"].astype(str) == positive
        look: dict[str, Any] = {"linestyle": styles[k % 4], "color": COLOURS[k % len(COLOURS)]}
        if true.nunique() == 2:
            score = table[PROBABILITY + positive]
            false_rate, true_rate, _ = roc_curve(true, score)
            roc.plot(false_rate, true_rate, label=label, **look)
            share, predicted = calibration_curve(true, score, n_bins=ECE_BINS)
            reliability.plot(predicted, share, marker="o", markersize=3, label=label, **look)
    for axis, line in ((roc, "chance"), (reliability, "calibrated")):
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":", label=line)
        axis.set_aspect("equal")
        axis.legend(loc="lower right")
    roc.set(xlabel=f"others called {positive}", ylabel=f"{positive} called {positive}")
    roc.set_title("ROC on the test subjects")
    reliability.set(xlabel=f"predicted probability of {positive}", ylabel=f"share of {positive}")
    reliability.set_title(f"Reliability, {ECE_BINS} bins")
    return figure


def _scatter(axis: Axes, table: pd.DataFrame, classes: Sequence[str], colour: str) -> None:
    true, predicted = table["y_true"].astype(float), table["y_pred"].astype(float)
    axis.plot([true.min(), true.max()], [true.min(), true.max()], color=GREY, linewidth=0.8)
    axis.scatter(true, predicted, s=14, color=colour, alpha=0.7, linewidths=0)
    axis.set(xlabel="true", ylabel="predicted")


def _confusion(axis: Axes, table: pd.DataFrame, classes: Sequence[str], colour: str) -> None:
    order = pd.Index(classes)
    counts = pd.crosstab(
        table["y_true"].astype(str), table["y_pred"].astype(str), normalize="index"
    )
    shares = counts.reindex(index=order, columns=order, fill_value=0.0).to_numpy()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*shares.shape):
        ink = "white" if shares[row, column] > 0.6 else "black"
        axis.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=ink)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_xticks(range(len(order)), order, rotation=30, ha="right")
    axis.set_yticks(range(len(order)), order)


def _colours() -> list[str]:
    return COLOURS * 50


def _svg(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
