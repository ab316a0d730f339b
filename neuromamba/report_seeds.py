"""What several seeds of a model show together: a row of the table, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from neuromamba.collect import Evaluation
from neuromamba.config import Config
from neuromamba.correction import corrected
from neuromamba.files import InputError
from neuromamba.seed_summary import summarize_seeds
from neuromamba.verdicts import METRICS, Cell, Row, interval, number, p_value, tell_p


@dataclass(frozen=True)
class Means:
    """What the seeds of each model of one target show together.

    Attributes
    ----------
    summaries
        `summarize_seeds` of each model that has two seeds or more, with `p_holm` and
        `p_chance_holm`; `better` is missing where `p_holm` shows nothing.
    refused
        Of each other model with several seeds, a sentence on why there is no mean of them.
    """

    summaries: dict[str, pd.DataFrame]
    refused: dict[str, str]


def seed_means(config: Config, evaluations: Mapping[str, Sequence[Evaluation]]) -> dict[str, Means]:
    """Of each target of a dataset, the means over seeds, p corrected over all models and targets.

    A family is made up as one of single seeds is, see `neuromamba.correction`.
    """
    found = {target: _summarize(config, of) for target, of in evaluations.items()}
    means = [
        # In the form of an evaluation, so that the families are made up as those of evaluations.
        replace(
            next(e for e in evaluations[target] if e.model == model),
            metrics=summary[["metric"]].assign(predictor=model, p=summary["p_chance"]),
            comparison=summary,
        )
        for target, of in found.items()
        for model, summary in of.summaries.items()
    ]
    for one in corrected(means, 1 - config.evaluate.confidence):
        chance = one.metrics["p_holm"]
        found[one.target].summaries[one.model] = one.comparison.assign(p_chance_holm=chance)
    return found


def _summarize(config: Config, evaluations: Sequence[Evaluation]) -> Means:
    """The means of one target, p as they are."""
    settings = config.evaluate
    models: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        models.setdefault(evaluation.model, []).append(evaluation)
    means = Means({}, {})
    for model, seeds in models.items():
        if len(seeds) < 2:
            continue
        try:
            means.summaries[model] = summarize_seeds(
                seeds,
                settings.bootstrap,
                settings.confidence,
                config.splits.seed,
                settings.permutations,
            )
        except InputError as error:
            means.refused[model] = f"There is no mean of the seeds of {model}: {error}."
    return means


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
    p = {"chance": p_value(first["p_chance_holm"]), str(first["versus"]): p_value(first["p_holm"])}
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
    # Over folds it is too small to go by (see `statistics`).
    chance = f" Against chance its p is {p_value(row['p_chance_holm'])}."
    chance = "" if pd.notna(row["p_resampled"]) else chance
    return (
        f"{start} {how} (difference in {name} {difference}, {tell_p(row)}; SD over seeds "
        f"{number(row['sd'])}).{chance}"
    )
