"""The tables of a leaderboard: what is of the same test, scored and compared with one another.

Design choices
--------------
- All metrics, intervals and p are computed anew from the predictions, with one number of resamples
  and one seed for everybody: two models are always compared on the same resamples.
- Every two models of a test are compared, and each with the baselines of its run. p is corrected by
  Holm over the whole leaderboard: over all pairs of models, and over all models for a baseline, in
  the first metric of each table, and in each other metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pandas as pd
from tqdm import tqdm

from neuromamba.collect import Evaluation
from neuromamba.compared_runs import (
    Entry,
    Reference,
    find_references,
    group_entries,
    what_differs,
)
from neuromamba.correction import corrected
from neuromamba.metrics import HIGHER_IS_BETTER, compare, compute_metrics
from neuromamba.statistics import correct

BETTER, WORSE, LEVEL = "better than FC", "worse than FC", "not shown to be better than FC"


@dataclass(frozen=True)
class Settings:
    """Resamples, coverage, shuffles and seed, in the order in which `metrics` takes them."""

    bootstrap: int = 2000
    confidence: float = 0.95
    seed: int = 0
    permutations: int = 5000

    @property
    def ordered(self) -> tuple[int, float, int, int]:
        return self.bootstrap, self.confidence, self.seed, self.permutations


@dataclass(frozen=True)
class Board:
    """One table of the leaderboard: what was evaluated on one test.

    Attributes
    ----------
    entries, evaluations
        The same models in the same order, best first; evaluations have the new figures.
    references
        The baselines, each once for every set of predictions.
    metrics
        Of all predictors, by the names of `named`, and `reference <k>`.
    pairs
        Comparisons of every two models, as `metrics.compare` gives them.
    differs
        Why this is not in the first table of its target; empty for the first.
    """

    entries: list[Entry]
    evaluations: list[Evaluation]
    references: list[Reference]
    metrics: pd.DataFrame
    pairs: pd.DataFrame
    differs: str = ""

    @property
    def first_metric(self) -> str:
        return str(self.metrics["metric"].iloc[0])


def make_boards(entries: Sequence[Entry], settings: Settings) -> list[Board]:
    """Score and compare what is of the same test, with p corrected over all of it."""
    groups = group_entries(entries)
    boards: list[Board] = []
    first: dict[str, Entry] = {}
    for group in groups:
        board = _score(group, settings)
        one = first.setdefault(group[0].target, group[0])
        differs = "" if one is group[0] else what_differs(one, group[0])
        boards.append(replace(board, differs=differs))
    return _correct(boards, 1 - settings.confidence)


def named(entry: Entry) -> str:
    """What an entry is called among the predictors of its board."""
    return f"{entry.model}, seed {entry.seed}"


def _score(group: Sequence[Entry], settings: Settings) -> Board:
    """The board of one test; nothing is corrected yet."""
    references = find_references(group)
    tables = {named(e): e.predictions[e.predictions["predictor"] == e.model] for e in group}
    tables |= {f"reference {k}": one.predictions for k, one in enumerate(references)}
    predictions = pd.concat([t.assign(predictor=name) for name, t in tables.items()])
    metrics = compute_metrics(predictions, *settings.ordered)
    first = str(metrics["metric"].iloc[0])
    value = metrics[metrics["metric"] == first].set_index("predictor")["value"]
    entries = sorted(group, key=lambda e: place(float(value[named(e)]), first))

    def versus(one: str, other: str) -> pd.DataFrame:
        two = pd.concat([tables[name].assign(predictor=name) for name in (one, other)])
        return compare(two, one, other, *settings.ordered)

    evaluations = []
    target = group[0].target
    for entry in tqdm(entries, desc=f"{target}: baselines", unit="model", delay=2.0):
        own = {k: one.baseline for k, one in enumerate(references) if entry in one.entries}
        names = {f"reference {k}": name for k, name in own.items()} | {named(entry): entry.model}
        compared = pd.concat([versus(named(entry), f"reference {k}") for k in own])
        evaluation = Evaluation(
            entry.dataset,
            entry.model,
            entry.seed,
            entry.target,
            _renamed(metrics, names, ["predictor"]),
            _renamed(compared, names, ["predictor", "versus", "better"]),
            entry.predictions,
            entry.notes,
        )
        evaluations.append(evaluation)
    both = list(combinations([named(entry) for entry in entries], 2))
    bar = tqdm(both, desc=f"{target}: models", unit="pair", delay=2.0)
    pairs = [versus(one, other) for one, other in bar]
    columns = ["predictor", "versus", "metric", "difference", "low", "high", "p", "better"]
    together = pd.concat(pairs, ignore_index=True) if pairs else pd.DataFrame(columns=columns)
    return Board(entries, evaluations, references, metrics, together)


def place(value: float, metric: str) -> tuple[bool, float]:
    """What sorts the best first, and what is not defined last."""
    return not math.isfinite(value), -value if HIGHER_IS_BETTER[metric] else value


def _renamed(table: pd.DataFrame, names: dict[str, str], columns: list[str]) -> pd.DataFrame:
    """The rows of some predictors, which get other names."""
    table = table[table["predictor"].isin(names)].reset_index(drop=True)
    return table.assign(**{c: table[c].map(names) for c in columns})


def _correct(boards: Sequence[Board], alpha: float) -> list[Board]:
    """The boards with `p_holm`, over all of them; see `neuromamba.correction`."""
    evaluations = iter(corrected([e for board in boards for e in board.evaluations], alpha))
    pairs = pd.concat([board.pairs for board in boards], keys=range(len(boards)))
    first = [board.first_metric for board in boards]
    kind = [
        "" if name == first[k] else name
        for (k, _), name in zip(pairs.index, pairs["metric"], strict=True)
    ]
    p = pairs.reindex(columns=["p", "p_resampled"]).astype(float).max(axis=1)
    pairs["p_holm"] = p.groupby(kind).transform(lambda part: correct(part.to_numpy(float)))
    pairs["better"] = pairs["better"].where(pairs["p_holm"] <= alpha, None)
    found = []
    for k, board in enumerate(boards):
        of_board = pairs[pairs.index.get_level_values(0) == k].droplevel(0)
        own = [next(evaluations) for _ in board.entries]
        found.append(replace(board, evaluations=own, pairs=of_board))
    return found


def versus_fc(evaluation: Evaluation) -> tuple[str, pd.Series]:
    """The comparison with the FC baseline in the first metric: in words, and its row."""
    row = evaluation.comparison[evaluation.comparison["versus"] == "fc"].iloc[0]
    words = {evaluation.model: BETTER, "fc": WORSE}.get(row["better"], LEVEL)
    return words, row
