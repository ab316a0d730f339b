"""A leaderboard over runs: every model that was evaluated on the same test, beside the baselines.

Which evaluations are of the same test is in `compared_runs`, how they are compared in `boards`.
The order is that of the first metric, and an order of values is no order of models: who is shown to
be better than whom is told by the comparisons alone, in words, on the page as in the tables.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

import neuromamba
from neuromamba.boards import Board, Settings, make_boards, named, place, versus_fc
from neuromamba.compare_page import describe, render
from neuromamba.compared_runs import read_entries, reference_labels
from neuromamba.files import InputError, write_json, write_text
from neuromamba.tables import write_table

COLUMNS = [
    "table",
    "target",
    "rank",
    "kind",
    "predictor",
    "run",
    "dataset",
    "seed",
    "n",
    "versus_fc",
    "fc_difference",
    "fc_low",
    "fc_high",
    "fc_p_holm",
    "parameters",
    "n_train",
    "n_seen",
]
COUNTS = ["seed", "parameters", "n_train", "n_seen"]
ENDS = {"value": "", "low": "_low", "high": "_high"}


def run_compare(
    runs: Sequence[Path],
    output: Path,
    bootstrap: int = 2000,
    confidence: float = 0.95,
    permutations: int = 5000,
    seed: int = 0,
) -> None:
    """Write `leaderboard.tsv`, `comparisons.tsv`, `leaderboard.html` and, last, the JSON of them.

    Parameters
    ----------
    runs
        Results folders, or folders of a dataset, model, seed or evaluation in them.
    output
        A folder.
    bootstrap, confidence, permutations, seed
        Resamples, coverage of the intervals, shuffles for p, and what seeds both.

    Raises
    ------
    InputError
        When a folder has no evaluations, or none can be used.
    """
    if bootstrap < 1 or permutations < 1 or not 0 < confidence < 1:
        raise InputError(
            f"--bootstrap {bootstrap} --permutations {permutations} --confidence {confidence}: "
            "the first two are at least 1, the last is between 0 and 1"
        )
    settings = Settings(bootstrap, confidence, seed, permutations)
    entries, refused = read_entries(runs)
    boards = make_boards(entries, settings)
    page = describe(boards, entries, refused, settings)
    for sentence in page["warnings"]:
        warnings.warn(sentence, stacklevel=2)
    table, pairs = tabulate(boards), tabulate_pairs(boards)
    write_table(output / "leaderboard.tsv", table)
    write_table(output / "comparisons.tsv", pairs)
    write_text(output / "leaderboard.html", render(page))
    told = ("target", "n", "folds", "differs", "warnings", "verdicts")
    facts = {
        "neuromamba_version": neuromamba.__version__,
        "settings": asdict(settings),
        "runs": page["runs"],
        "refused": refused,
        "tables": [{key: one[key] for key in told} for one in page["tables"]],
        "leaderboard": _records(table),
        "comparisons": _records(pairs),
    }
    write_json(output / "leaderboard.json", facts)
    count = f"{len(entries)} evaluations in {len(boards)} table(s)"
    tqdm.write(f"{count}: {output / 'leaderboard.html'}", file=sys.stderr)


def tabulate(boards: Sequence[Board]) -> pd.DataFrame:
    """Rows of `leaderboard.tsv`: each predictor of each table, best first.

    `COLUMNS`, then each metric with its `<metric>_low` and `<metric>_high`. `fc_*` is the
    difference to the FC baseline in the table's first metric.
    """
    rows: list[dict[str, Any]] = []
    for number, board in enumerate(boards, start=1):
        found = [*_models(board), *_baselines(board)]
        found.sort(key=lambda row: place(row[board.first_metric], board.first_metric))
        about = {"table": number, "target": board.entries[0].target}
        rows += [{**about, "rank": rank, **row} for rank, row in enumerate(found, start=1)]
    table = pd.DataFrame(rows)
    names = [name for name in table if name not in COLUMNS]
    table = table.reindex(columns=[*COLUMNS, *names])
    return table.astype(dict.fromkeys(COUNTS, "Int64"))


def _models(board: Board) -> list[dict[str, Any]]:
    rows = []
    for entry, evaluation in zip(board.entries, board.evaluations, strict=True):
        words, fc = versus_fc(evaluation)
        row: dict[str, Any] = {"kind": "model", "predictor": named(entry), "run": entry.run}
        row |= {"dataset": entry.dataset, "seed": entry.seed, "versus_fc": words}
        row |= {f"fc_{key}": fc[key] for key in ("difference", "low", "high", "p_holm")}
        row |= {"parameters": entry.parameters, "n_train": entry.notes.get("n_train")}
        row |= {"n_seen": len(entry.notes.get("seen_subjects", []))}
        rows.append(row | _metrics_of(board, named(entry)))
    return rows


def _baselines(board: Board) -> list[dict[str, Any]]:
    rows = []
    for k, label in enumerate(reference_labels(board.references)):
        runs = dict.fromkeys(entry.run for entry in board.references[k].entries)
        row: dict[str, Any] = {"kind": "baseline", "predictor": label, "run": ", ".join(runs)}
        rows.append(row | _metrics_of(board, f"reference {k}"))
    return rows


def _metrics_of(board: Board, predictor: str) -> dict[str, Any]:
    rows = board.metrics[board.metrics["predictor"] == predictor].set_index("metric")
    found: dict[str, Any] = {"n": int(rows["n"].iloc[0])}
    for name, row in rows.iterrows():
        found |= {f"{name}{end}": float(row[key]) for key, end in ENDS.items()}
    return found


def tabulate_pairs(boards: Sequence[Board]) -> pd.DataFrame:
    """Rows of `comparisons.tsv`: every two models, and every model with the baselines of its run.

    Columns `table`, `target`, those of `metrics.compare`, and `p_holm`.
    """
    tables = []
    for number, board in enumerate(boards, start=1):
        parts = [board.pairs] if len(board.pairs) else []
        for entry, evaluation in zip(board.entries, board.evaluations, strict=True):
            table, own = evaluation.comparison, {entry.model: named(entry)}
            columns = {c: table[c].replace(own) for c in ("predictor", "better")}
            parts.append(table.assign(**columns))
        together = pd.concat(parts, ignore_index=True)
        together.insert(0, "table", number)
        together.insert(1, "target", board.entries[0].target)
        tables.append(together)
    return pd.concat(tables, ignore_index=True)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON has them: what is missing is null."""
    plain = table.astype(object).where(table.notna(), None)
    return [
        {
            str(key): getattr(value, "item", lambda value=value: value)()
            for key, value in row.items()
        }
        for row in plain.to_dict("records")
    ]
