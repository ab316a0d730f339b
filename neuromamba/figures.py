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


def loss_curves(trainings: Mapping[str, Sequence[pd.DataFrame]]) -> str:
    """Loss over steps, one colour per label.

    Parameters
    ----------
    trainings
        By label, the rows of each fold's `metrics.jsonl`: `step`, `split`, `loss`, `skill_*`.
        Several folds are thin lines of one colour.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        for colour, (label, tables) in zip(colours(), trainings.items(), strict=False):
            name = f"{label}, " if len(trainings) > 1 else ""
            for k, table in enumerate(tables):
                _loss_lines(axis, table, name if k == 0 else None, colour, len(tables) > 1)
        axis.set(title="Loss", xlabel="step", ylabel="loss")
        _legend(figure, axis, len(trainings))
        return as_svg(figure)


def skill_curves(trainings: Mapping[str, Sequence[pd.DataFrame]]) -> str | None:
    """Skills on the validation subjects, as `loss_curves`; `None` where there are none."""
    columns = {str(column) for tables in trainings.values() for t in tables for column in t}
    skills = sorted(column for column in columns if column.startswith("skill_"))
    if not skills:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        for colour, (label, tables) in zip(colours(), trainings.items(), strict=False):
            # One training: a colour for each predictor. Several: a colour for each training.
            own, name = (colour, f"{label}, ") if len(trainings) > 1 else (None, "")
            for k, table in enumerate(tables):
                _skill_lines(axis, table, skills, name if k == 0 else None, own, len(tables) > 1)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title="Skill on the validation subjects", xlabel="step", ylabel="skill")
        _keep_in_view(axis)
        _legend(figure, axis, len(trainings))
        return as_svg(figure)


def _legend(figure: Figure, axis: Axes, trainings: int) -> None:
    """Of one training beside the lines, of several below them, where there is room."""
    if trainings == 1:
        axis.legend(loc="best")
        return
    figure.set_size_inches(4.6, 3.2 + 0.2 * len(axis.get_legend_handles_labels()[0]))
    figure.legend(loc="outside lower left")


def _look(fold: bool) -> dict[str, Any]:
    """Of a line: that of one fold of several is thin."""
    return {"linewidth": 0.7, "alpha": 0.6} if fold else {"marker": "o", "markersize": 3}


def _loss_lines(axis: Axes, table: pd.DataFrame, name: str | None, colour: str, fold: bool) -> None:
    """Both losses of one training; without a name they are not in the legend."""
    train, validation = (table[table["split"] == part] for part in ("train", "validation"))
    look: dict[str, Any] = {
        "color": colour,
        "alpha": 0.45,
        "linewidth": 0.5 if fold else 1.0,
        "linestyle": "--",
    }
    axis.plot(train["step"], train["loss"], **look, label=_known(name, "training"))
    axis.plot(
        validation["step"],
        validation["loss"],
        color=colour,
        label=_known(name, "validation"),
        **_look(fold),
    )


def _known(name: str | None, what: str) -> str | None:
    return None if name is None else f"{name}{what}"


def _skill_lines(
    axis: Axes,
    table: pd.DataFrame,
    skills: Sequence[str],
    name: str | None,
    colour: str | None,
    fold: bool,
) -> None:
    rows = table[table["split"] == "validation"]
    for k, skill in enumerate(column for column in skills if column in rows):
        axis.plot(
            rows["step"],
            rows[skill],
            color=colour or COLOURS[k],
            linestyle=("-", "--", ":")[k % 3],
            label=_known(name, f"over {skill.removeprefix('skill_')}"),
            **_look(fold),
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
        return as_svg(figure)


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
        return as_png(figure)


def colours() -> list[str]:
    """Colours without an end."""
    return COLOURS * 50


def as_svg(figure: Figure) -> str:
    """A figure as the `data:` address of an SVG, the same for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def as_png(figure: Figure) -> str:
    """A figure as the `data:` address of a PNG."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
