"""The page of a leaderboard: a table, a plot and a few sentences for each test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

import neuromamba
from neuromamba.baseline_notes import BASELINES
from neuromamba.boards import Board, Settings, named, place, versus_fc
from neuromamba.compared_runs import Entry, reference_labels, seen_by, who_disagree
from neuromamba.templates import environment
from neuromamba.verdicts import (
    METRICS,
    P_VERSUS,
    Row,
    interval,
    number,
    p_value,
    result_rows,
    verdict,
    where_chance_is,
)

WIDTH, LEFT, RIGHT, HEIGHT, TOP = 640, 14, 626, 40, 8
"""Of a plot, in its own units: its width, what is left for the axis, and the height of a row."""


@dataclass(frozen=True)
class Line:
    """One predictor of a table.

    Attributes
    ----------
    row
        Its figures as text.
    curve
        Value, low and high of the first metric.
    words, parameters, n_train
        Of a model: how it compares with FC, its size, and the labelled subjects of its training.
    """

    row: Row
    curve: tuple[float, float, float]
    words: str = ""
    parameters: int | None = None
    n_train: int | None = None

    @property
    def value(self) -> float:
        return self.curve[0]


def render(page: dict[str, Any]) -> str:
    """The HTML of what `describe` gives."""
    return environment().get_template("compare.html.j2").render(page)


def describe(
    boards: Sequence[Board], entries: Sequence[Entry], refused: dict[str, str], settings: Settings
) -> dict[str, Any]:
    """Everything that the page's template shows."""
    tables = [describe_board(board, settings) for board in boards]
    told = [f"{path} is left out: {reason}" for path, reason in refused.items()]
    return {
        "tables": tables,
        "runs": {entry.run: str(entry.results) for entry in entries},
        "refused": refused,
        "warnings": [*told, *(text for table in tables for text in table["warnings"])],
        "settings": settings,
        "confidence": f"{settings.confidence:.0%}",
        "alpha": f"{1 - settings.confidence:.3g}",
        "metrics": METRICS,
        "number": number,
        "version": neuromamba.__version__,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def describe_board(board: Board, settings: Settings) -> dict[str, Any]:
    """What the page shows of one test."""
    first, lines = board.entries[0], lines_of(board)
    test = first.test
    datasets = ", ".join(dict.fromkeys(entry.dataset for entry in board.entries))
    fc = [line.value for line in lines if line.row.label == BASELINES["fc"]]
    return {
        "target": first.target,
        "title": f"{datasets}: {first.target}",
        "n": int(test["subject"].nunique()),
        "folds": int(test["fold"].nunique()),
        "repeats": int(test.groupby("subject")["fold"].nunique().max()),
        "differs": board.differs,
        "lines": lines,
        "columns": list(board.evaluations[0].metrics["metric"].unique()),
        "tests": {
            key: label for key, label in P_VERSUS.items() if any(key in x.row.p for x in lines)
        },
        "first": METRICS[board.first_metric].label,
        "plot": plot(lines, fc[0] if fc else None),
        "verdicts": [verdict(e, 1 - settings.confidence) for e in board.evaluations],
        "pairs": describe_pairs(board),
        "chance": where_chance_is(board.evaluations[0]),
        "warnings": warn_of(board),
    }


def lines_of(board: Board) -> list[Line]:
    """The predictors of a table, best first."""
    curve = board.metrics[board.metrics["metric"] == board.first_metric]
    values = {
        str(row["predictor"]): (float(row["value"]), float(row["low"]), float(row["high"]))
        for row in curve.to_dict("records")
    }
    rows = result_rows(board.evaluations)
    lines = []
    for entry, evaluation, row in zip(board.entries, board.evaluations, rows, strict=False):
        about = (versus_fc(evaluation)[0], entry.parameters, entry.notes.get("n_train"))
        lines.append(Line(row, values[named(entry)], *about))
    for k, label in enumerate(reference_labels(board.references)):
        reference = board.references[k]
        owner = board.entries.index(reference.entries[0])
        others = [e for j, e in enumerate(board.evaluations) if j != owner]
        found = result_rows([board.evaluations[owner], *others])
        row = next(row for row in found if row.label == BASELINES[reference.baseline])
        lines.append(Line(replace(row, label=label), values[f"reference {k}"]))
    return sorted(lines, key=lambda line: place(line.value, board.first_metric))


def plot(lines: Sequence[Line], fc: float | None) -> dict[str, Any]:
    """Where everything lies in the plot of the first metric; `None` for what is not defined."""
    known = [v for line in lines for v in line.curve if np.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    ticks = MaxNLocator(6).tick_values(low, high if high > low else low + 1)
    start, stop = float(ticks[0]), float(ticks[-1])

    def x(value: float) -> float | None:
        share = (value - start) / (stop - start)
        return round(LEFT + share * (RIGHT - LEFT), 1) if np.isfinite(value) else None

    bottom = TOP + HEIGHT * len(lines)
    return {
        "width": WIDTH,
        "height": bottom + 44,
        "top": TOP,
        "bottom": bottom,
        "rows": [
            dict(
                zip(("y", "x", "low", "high"), (TOP + HEIGHT * k, *map(x, line.curve)), strict=True)
            )
            for k, line in enumerate(lines)
        ],
        "ticks": [{"x": x(float(tick)), "text": f"{tick:.6g}"} for tick in ticks],
        "fc": None if fc is None else x(fc),
    }


def describe_pairs(board: Board) -> list[dict[str, str]]:
    """Every two models in the first metric, in words."""
    rows = board.pairs[board.pairs["metric"] == board.first_metric]
    found = []
    for row in rows.to_dict("records"):
        words = "neither is shown to be better"
        if isinstance(row["better"], str):
            words = f"{row['better']} is better"
        found.append(
            {
                "first": row["predictor"],
                "second": row["versus"],
                "difference": interval(row["difference"], row["low"], row["high"]),
                "p": p_value(float(row["p_holm"])),
                "words": words,
            }
        )
    return found


def warn_of(board: Board) -> list[str]:
    """What a reader of the table has to know: baselines that disagree, subjects that were seen."""
    target = board.entries[0].target
    told = [
        f"{target}: the {BASELINES[name]} is not the same in "
        f"{' and '.join(map(', '.join, groups))}; it stands once for each, and every model is "
        "compared with that of its own run"
        for name, groups in who_disagree(board.references).items()
    ]
    for model, count in seen_by(board.entries).items():
        told.append(
            f"{target}: {model} was trained on {number(count)} of the test subjects, so its "
            "figures are not those of unseen subjects"
        )
    return told
