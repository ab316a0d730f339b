"""What several seeds of a model show together: a row of the table, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from neuromamba.collect import Evaluation
from neuromamba.config import Config
from neuromamba.seed_summary import summarize_seeds
from neuromamba.verdicts import METRICS, Cell, Row, interval, number, p_value


def seed_summaries(config: Config, evaluations: Sequence[Evaluation]) -> dict[str, pd.DataFrame]:
    """`summarize_seeds` of each model of one target that has two seeds or more."""
    settings = config.evaluate
    models: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        models.setdefault(evaluation.model, []).append(evaluation)
    return {
        model: summarize_seeds(
            of_model,
            settings.bootstrap,
            settings.confidence,
            config.splits.seed,
            settings.permutations,
        )
        for model, of_model in models.items()
        if len(of_model) > 1
    }


def with_means(
    rows: Sequence[Row], evaluations: Sequence[Evaluation], summaries: dict[str, pd.DataFrame]
) -> list[Row]:
    """The rows of `result_rows` with one more after the last seed of each model that has several.

    The first rows are those of the evaluations, in their order.
    """
    last = {evaluation.model: k for k, evaluation in enumerate(evaluations)}
    found = []
    for k, row in enumerate(rows):
        found.append(row)
        for model in (name for name, at in last.items() if at == k and name in summaries):
            found.append(_mean_row(model, summaries[model]))
    return found


def _mean_row(model: str, summary: pd.DataFrame) -> Row:
    first = summary.iloc[0]
    cells = {}
    for row in summary.to_dict("records"):
        value = interval(row["value"], row["low"], row["high"])
        # The SD stands where the eye looks for it: beside the value, before its interval.
        spread = f" ({number(row['sd'])}) ["
        cells[str(row["metric"])] = Cell(value.replace(" [", spread, 1))
    p = {"chance": p_value(first["p_chance"]), str(first["versus"]): p_value(first["p"])}
    label = f"{model}, mean of {int(first['n_seeds'])} seeds (SD)"
    return Row(label, cells, int(first["n"]), False, p, is_mean=True)


def mean_verdict(model: str, summary: pd.DataFrame) -> str:
    """How the seeds of a model together do against FC, in the first metric."""
    row = summary.iloc[0]
    name, n_seeds = METRICS[str(row["metric"])].label, int(row["n_seeds"])
    start = f"The mean of the {n_seeds} seeds of {model}"
    if pd.isna(row["difference"]):
        return f"{start} cannot be compared with the FC baseline: {name} is not defined here."
    difference = interval(row["difference"], row["difference_low"], row["difference_high"])
    if row["better"] == model:
        how = "is better than the FC baseline"
    elif row["better"] == row["versus"]:
        how = "is worse than the FC baseline"
    else:
        how = "is not shown to differ from the FC baseline"
    return (
        f"{start} {how} (difference in {name} {difference}, p {p_value(row['p'])}, not corrected "
        f"for the number of comparisons; SD over seeds {number(row['sd'])}). Against chance its p "
        f"is {p_value(row['p_chance'])}."
    )
