"""The figure of the scaling study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

from neuromamba.figures import GREY, STYLE
from neuromamba.scaling_cells import PF_DAY, Curves
from neuromamba.scaling_fit import Fit

MARKERS = "osD^vP*Xph"


def draw_scaling(
    path: Path,
    kind: str,
    points: pd.DataFrame,
    curves: Curves,
    best: Fit | None,
    every: Fit | None,
    confidence: float,
) -> None:
    """Validation loss against training compute, both logarithmic, with the fits.

    Parameters
    ----------
    path, kind
        Where to write, and `svg` or `png`.
    points, curves
        As `average_seeds` and `read_cells` of `scaling_cells` give them.
    best, every
        The fits on the frontier, which gets a band, and to all points.
    confidence
        Of the band, by the fit's resamples.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axis = figure.subplots()
        sizes = points.drop_duplicates("model").sort_values("parameters")
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.82, len(sizes)))
        colours = dict(zip(sizes["model"], shades, strict=True))
        marks = dict(zip(sorted(set(points["fraction"])), MARKERS * 9, strict=False))
        for (model, _, _), curve in curves.items():
            colour = colours[model]
            axis.plot(curve["flops"], curve["loss"], color=colour, alpha=0.45, linewidth=0.8)
        _draw_fits(axis, best, every, confidence)
        for point in points.to_dict("records"):
            colour, x = colours[point["model"]], point["flops"]
            axis.plot([x, x], [point["low"], point["high"]], color=colour)
            axis.plot(
                x,
                point["loss"],
                marks[point["fraction"]],
                color=colour,
                markeredgecolor="black" if point["frontier"] else "white",
                markersize=7,
            )
        laws = [fit.law(fit.flops) for fit in (best, every) if fit]
        _set_axes(axis, points, np.concatenate([points["low"], points["high"], *laws]))
        counts = sizes.set_index("model")["parameters"]
        labels = {f"{name}, {_short(counts[name])}": colours[name] for name in counts.index}
        _legend(figure, labels, marks, best, every)
        # Neither date nor version, so that the same study gives the same file.
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        figure.savefig(path, format=kind, dpi=150, metadata=metadata)


def _draw_fits(axis: Axes, best: Fit | None, every: Fit | None, confidence: float) -> None:
    if every:
        grid = np.geomspace(every.flops.min(), every.flops.max(), 100)
        axis.plot(grid, every.law(grid), color=GREY, linestyle=":", linewidth=1.2)
    if best:
        grid = np.geomspace(best.flops.min(), best.flops.max(), 100)
        if best.resamples:
            tail = (1 - confidence) / 2
            values = np.array([law(grid) for law in best.resamples])
            low, high = np.quantile(values, [tail, 1 - tail], axis=0)
            axis.fill_between(grid, low, high, color="black", alpha=0.12, linewidth=0)
        axis.plot(grid, best.law(grid), color="black", linewidth=1.4)


def _set_axes(axis: Axes, points: pd.DataFrame, shown: npt.NDArray[np.float64]) -> None:
    """Scales, limits and labels, so that the losses `shown` are in view."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set(
        xlabel="training compute C (FLOPs)",
        ylabel="validation loss",
    )
    # The start of a training is far above where trainings end, and would press that together.
    low, high = float(shown.min()), float(shown.max())
    room = 0.08 * (high / low - 1) + 0.002
    axis.set_ylim(low * (1 - room), high * (1 + 2.5 * room))
    axis.set_xlim(points["flops"].min() / 1.6, points["flops"].max() * 1.6)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%.4g"))
    axis.yaxis.set_minor_locator(NullLocator())
    days = axis.secondary_xaxis("top", functions=(_to_days, _from_days))
    days.set_xlabel("PF-days")


def _to_days(flops: Any) -> Any:
    return flops / PF_DAY


def _from_days(days: Any) -> Any:
    return days * PF_DAY


def _legend(
    figure: Figure,
    colours: Mapping[str, Any],
    marks: Mapping[float, str],
    best: Fit | None,
    every: Fit | None,
) -> None:
    """What colours (by label), markers and lines mean, beside the axes."""

    def dot(marker: str, colour: Any, label: str, edge: str = "white") -> Line2D:
        return Line2D(
            [], [], marker=marker, color=colour, linestyle="", markeredgecolor=edge, label=label
        )

    handles = [dot("s", colour, label) for label, colour in colours.items()]
    handles += [dot(mark, GREY, f"{100 * share:g} % of subjects") for share, mark in marks.items()]
    handles += [
        dot("o", "white", "on the frontier", "black"),
        Line2D([], [], color=GREY, alpha=0.4, linewidth=0.8, label="during training"),
    ]
    if best:
        handles.append(Line2D([], [], color="black", label=f"frontier: {_exponent(best)}"))
    if every:
        label = f"all points: {_exponent(every)}"
        handles.append(Line2D([], [], color=GREY, linestyle=":", label=label))
    figure.legend(handles=handles, loc="outside right upper")


def _exponent(fit: Fit) -> str:
    floor = f"c = {fit.law.floor:.3g}, " if fit.law.floor else ""
    return f"{floor}b = {fit.law.exponent:.2g} [{fit.low:.2g}, {fit.high:.2g}]"


def _short(count: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"
