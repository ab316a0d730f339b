"""Correct the p values of a dataset's evaluations for how many of them there are (Holm).

What is compared with the same baseline makes a family, over models, seeds and targets: the first
metric of each target (AUROC or MAE) one, each other metric another. p against chance is a family
too. Whoever reads the report may pick any of its comparisons, so the chance of a single false claim
is what has to be held, not the share of false ones.

A comparison of a cross-validation has two p, by permutation and by the corrected resampled t-test
over the folds. The larger one is corrected, for both are asked for: where one is missing, so is
`p_holm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from neuromamba.collect import Evaluation, collect_evaluations
from neuromamba.config import Config
from neuromamba.statistics import correct

ALPHA = 0.05


def collect_corrected(config: Config, dataset: str) -> dict[str, list[Evaluation]]:
    """The evaluations of each target of a dataset, their p corrected over all of them."""
    targets = config.datasets[dataset].targets
    found = [e for target in targets for e in collect_evaluations(config, dataset, target)]
    found = corrected(found, 1 - config.evaluate.confidence)
    return {target: [e for e in found if e.target == target] for target in targets}


def corrected(evaluations: Sequence[Evaluation], alpha: float = ALPHA) -> list[Evaluation]:
    """Add `p_holm` to the tables of all evaluations of a dataset.

    In `comparison`, `better` is then missing where `p_holm` is over `alpha`; in `metrics` only the
    model's own p against chance is corrected.
    """
    if not evaluations:
        return []
    own = [
        e.metrics[e.metrics["predictor"] == e.model].assign(versus="chance") for e in evaluations
    ]
    chance = _holm(own)
    larger = [larger_p(e.comparison, "fold" in e.predictions) for e in evaluations]
    compared = _holm([e.comparison.assign(p=p) for e, p in zip(evaluations, larger, strict=True)])
    found = []
    for k, evaluation in enumerate(evaluations):
        better = evaluation.comparison["better"].where(compared[k] <= alpha, None)
        comparison = evaluation.comparison.assign(p_holm=compared[k], better=better)
        metrics = evaluation.metrics.assign(p_holm=chance[k])
        found.append(replace(evaluation, metrics=metrics, comparison=comparison))
    return found


def larger_p(comparison: pd.DataFrame, over_folds: bool) -> pd.Series:
    """The p of each comparison; over folds the larger of the two, missing where one of them is."""
    columns = ["p", "p_resampled"] if over_folds else ["p"]
    return comparison.reindex(columns=columns).astype(float).max(axis=1, skipna=False)


def _holm(tables: Sequence[pd.DataFrame]) -> list[pd.Series]:
    """The corrected p of each table's `p`; a family has the same `versus` and kind of metric."""
    parts = [
        table.assign(family=table["versus"] + table["metric"].where(~_of_first_metric(table), ""))
        for table in tables
    ]
    together = pd.concat(parts, keys=range(len(parts)))
    p = together["p"].astype(float)
    holm = p.groupby(together["family"]).transform(lambda p: correct(p.to_numpy(float)))
    return [holm.loc[k] for k in range(len(tables))]


def _of_first_metric(table: pd.DataFrame) -> pd.Series:
    """Which rows of a table are of its first metric."""
    return table["metric"] == table["metric"].iloc[0]
