"""The figure of an identification: how well each predictor tells subjects apart."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuromamba.figures import COLOURS, GREY, STYLE
from neuromamba.files import atomic_path

LABELS = {
    "model": "the model",
    "model-still": "the model, on still windows",
    "fc": "FC baseline",
    "mean-image": "mean image (anatomy)",
    "brain-shape": "shape of the brain mask (anatomy)",
}
PAIRS = {
    "sessions": "two sessions of each",
    "runs": "two runs of each",
    "halves": "the halves of one run of each",
    "all": "two sessions, two runs, or the halves of one run of each",
}


def draw_identification(path: Path, table: pd.DataFrame, confidence: float, title: str) -> None:
    """Write an SVG of the accuracy and the percentile rank of each predictor.

    Parameters
    ----------
    path
        Where to.
    table
        The rows of an `identify.tsv`; those with the `pairs` of the first are drawn.
    confidence
        Coverage of the bounds.
    title
        Whose figure it is.
    """
    shown = table[table["pairs"] == table["pairs"].iloc[0]]
    row = shown.iloc[0]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.6 + 0.42 * len(shown)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _points(left, shown, "accuracy", 100, 100 * row["chance"])
        _points(right, shown, "percentile_rank", 1, 50)
        left.set_yticks(range(len(shown)), [LABELS[name] for name in shown["predictor"]])
        left.invert_yaxis()
        left.set(title="Identified", xlabel="% of the subjects")
        right.set(title="Others that are less similar", xlabel="%, median over the subjects")
        what = f"{int(row['n'])} test subjects, by {PAIRS[row['pairs']]}"
        note = f"{confidence:.0%} intervals; dotted: chance"
        figure.suptitle(f"Identification, {title}\n{what} ({note})", fontsize=10)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _points(axis: Axes, table: pd.DataFrame, name: str, scale: float, chance: float) -> None:
    value = table[name].to_numpy(float) * scale
    bounds = [table[f"{name}_{side}"].to_numpy(float) * scale for side in ("low", "high")]
    # Of a median, the interval may lie on one side of the value.
    errors = np.maximum([value - bounds[0], bounds[1] - value], 0)
    for k in range(len(table)):
        look = {"color": COLOURS[k % len(COLOURS)], "marker": "osD^v"[k % 5]}
        axis.errorbar(value[k], k, xerr=errors[:, [k]], capsize=3, **look)  # type: ignore[arg-type]
    axis.axvline(chance, color=GREY, linewidth=1, linestyle=":")
    axis.set_xlim(-4, 104)
