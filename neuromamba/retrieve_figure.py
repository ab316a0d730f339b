"""The figure of a retrieval: how often the own one is among the k most similar."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from neuromamba.figures import COLOURS, GREY, STYLE
from neuromamba.files import atomic_path


def draw_retrieval(path: Path, ranks: Mapping[str, npt.NDArray[np.int64]], title: str) -> None:
    """Write an SVG of recall against k for each direction.

    Parameters
    ----------
    path
        Where to.
    ranks
        By direction, (person,) from 1; all people can be chosen from.
    title
        Whose figure it is.
    """
    n = len(next(iter(ranks.values())))
    k = np.arange(1, n + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = figure.subplots()
        for colour, style, (name, found) in zip(COLOURS, ("-", "--"), ranks.items(), strict=False):
            recall = 100 * (found[:, None] <= k).mean(axis=0)
            axis.step(k, recall, where="post", color=colour, linestyle=style, label=name)
        axis.plot(k, 100 * k / n, color=GREY, linewidth=1, linestyle=":", label="chance")
        axis.set(xlabel="k most similar", ylabel="own one among them, %", ylim=(0, 102))
        axis.legend(frameon=False, loc="lower right")
        figure.suptitle(f"Retrieval, {title}: {n} test subjects", fontsize=10)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
