"""The figure of a forecast: errors and skills over time."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuromamba.figures import COLOURS, STYLE
from neuromamba.files import atomic_path

LABELS = {
    "model": "the model",
    "persistence": "persistence",
    "context_mean": "context mean",
    "autoregression": "autoregression",
    "run_mean": "mean of the run, which has seen the future",
}
MARKERS = "osD^v"


def draw_forecast(path: Path, table: pd.DataFrame, confidence: float, title: str) -> None:
    """Write an SVG of the errors of each forecast, and of the model's skill over the others.

    Parameters
    ----------
    path
        Where to.
    table
        The rows of a `forecast.tsv`: `horizon`, `seconds`, `n`, `mse_*`, `skill_*` with bounds.
    confidence
        Coverage of the bounds.
    title
        What the forecasts are of.
    """
    in_seconds = bool(table["seconds"].notna().all())
    time = table["seconds"] if in_seconds else table["volumes"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        _errors(left, table, time)
        _skills(right, table, time, confidence)
        unit = "s" if in_seconds else "volumes"
        for axis in (left, right):
            axis.set_xlabel(f"time after the last known volume ({unit})")
            axis.set_xticks(time[:: 1 + len(time) // 10])
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        subjects = int(table["n"].iloc[0])
        figure.suptitle(f"Forecasts by {title} of {subjects} test subjects", fontsize=10)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _errors(axis: Axes, table: pd.DataFrame, time: pd.Series) -> None:
    for colour, marker, (name, label) in zip(COLOURS, MARKERS, LABELS.items(), strict=False):
        width, order = (2.5, 3) if name == "model" else (1.5, 2)
        (line,) = axis.plot(time, table[f"mse_{name}"], f"{marker}-", color=colour, ms=4)
        line.set(label=label, linewidth=width, zorder=order)
    axis.set(title="Error", ylabel="mean squared error (normalised units)")
    axis.set_ylim(bottom=0)


def _skills(axis: Axes, table: pd.DataFrame, time: pd.Series, confidence: float) -> None:
    for colour, marker, name in zip(COLOURS, MARKERS, LABELS, strict=False):
        if name != "model":
            column = f"skill_{name}"
            low, high = table[f"{column}_low"], table[f"{column}_high"]
            axis.fill_between(time, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(time, table[column], f"{marker}-", color=colour, ms=4)
    axis.axhline(0, color="black", linewidth=0.8)
    title = f"Skill over each of the others, with {confidence:.0%} intervals"
    axis.set(title=title, ylabel="skill (0: no better, 1: perfect)")
