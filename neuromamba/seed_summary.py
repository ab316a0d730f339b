"""One model over several seeds: the mean and the spread of its metrics, and how it does against FC.

Design choices
--------------
- A seed is a fixed factor: the interval is of the mean over these seeds, by resamples of the test
  subjects that are the same for every seed. How much the seed matters is the SD, which is no part
  of the interval.
- Averaging metrics is not ensembling: predictions of different seeds are never mixed. Against the
  FC baseline a subject's predictions are swapped for all seeds together, or for none.
- Where a metric is not defined of every seed (one whose training collapsed has no correlation),
  nothing is told of it: without that seed the others would look better than the model is.
- Under cross-validation the differences of a fold are averaged over seeds before the corrected
  resampled t-test, which is of other training subjects and not of other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from neuromamba.collect import Evaluation
from neuromamba.files import InputError
from neuromamba.metrics import (
    HIGHER_IS_BETTER,
    bootstrap,
    difference,
    interval,
    is_shown,
    p_over_folds,
)
from neuromamba.predictors import Predictor, join_seeds, read_predictors, refuse_unlike
from neuromamba.weighted_metrics import Floats


def summarize_seeds(
    evaluations: Sequence[Evaluation],
    resamples: int,
    confidence: float,
    seed: int,
    permutations: int,
    versus: str = "fc",
) -> pd.DataFrame:
    """Mean over seeds of each metric of one model, and its difference to a baseline's.

    Parameters
    ----------
    evaluations
        Of one model and target, of two seeds or more, on the same subjects.
    resamples, confidence, seed, permutations
        As in `neuromamba.metrics.compute_metrics`.
    versus
        The baseline.

    Returns
    -------
    pandas.DataFrame
        Columns `metric`, `n_seeds`, `n` (subjects), `value` (mean over seeds), `sd` (over seeds, of
        a sample), `low`, `high`, `p_chance` (one-sided), `versus`, `difference`, `difference_low`,
        `difference_high`, `p` and `p_resampled` (two-sided, not corrected), `better` (as in
        `neuromamba.metrics.compare`). All but the counts are missing where a seed has no value.

    Raises
    ------
    InputError
        When there are fewer than two seeds, or the seeds were not tested on the same subjects.
    """
    model, own, baseline = _predictors_of(evaluations, versus)
    joined, other = join_seeds(own), join_seeds(baseline)
    spread = _over_seeds(own)
    chance = joined.against_chance(permutations, seed)
    p = joined.against(other, permutations, seed)
    holdout = next(iter(own.values())).is_holdout
    pairs = list(zip(own.values(), baseline.values(), strict=True))
    over_folds = {} if holdout else p_over_folds(pairs)
    drawn = bootstrap(joined.metrics, joined.strata, resamples, seed)
    rows = []
    for name, apart in difference(joined, other, resamples, confidence, seed).items():
        value, sd = float(spread[name].mean()), float(spread[name].std(ddof=1))
        tests = [found.get(name, np.nan) if name in p else np.nan for found in (p, over_folds)]
        known = np.array([chance.get(name, np.nan), *apart, *tests])
        if not np.isfinite(value):
            known[:] = np.nan
        by_chance, *difference_to, swapped, resampled = known.tolist()
        low, high = difference_to[1:]
        winner = model if (low > 0) == HIGHER_IS_BETTER[name] else versus
        shown = is_shown(low, high, [swapped] if holdout else [swapped, resampled], confidence)
        ends = interval(value, drawn[name], confidence)
        row = (name, len(own), joined.n_subjects, value, sd, *ends, by_chance, versus)
        rows.append((*row, *difference_to, swapped, resampled, winner if shown else None))
    columns = ["metric", "n_seeds", "n", "value", "sd", "low", "high", "p_chance", "versus"]
    columns += ["difference", "difference_low", "difference_high", "p", "p_resampled", "better"]
    return pd.DataFrame(rows, columns=columns)


def _predictors_of(
    evaluations: Sequence[Evaluation], versus: str
) -> tuple[str, dict[int, Predictor], dict[int, Predictor]]:
    """The model's name, and by seed what it and the baseline said, checked to be of one test."""
    about = {(e.dataset, e.model, e.target) for e in evaluations}
    seeds = [e.seed for e in evaluations]
    if len(about) != 1 or len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise InputError(
            "a summary over seeds needs one model and target with two seeds or more, each once; "
            f"there are {sorted(about)} with seeds {seeds}: add to `seeds` and evaluate again"
        )
    model = evaluations[0].model
    found = {e.seed: read_predictors(e.predictions) for e in evaluations}
    for k, predictors in found.items():
        for name in (model, versus):
            if name not in predictors:
                raise InputError(f"predictions of {model}, seed {k}: there is no {name} among them")
            first = found[seeds[0]][model]
            refuse_unlike(f"{model}, seed {seeds[0]}", first, f"{name}, seed {k}", predictors[name])
    return (
        model,
        {k: predictors[model] for k, predictors in found.items()},
        {k: predictors[versus] for k, predictors in found.items()},
    )


def _over_seeds(seeds: Mapping[int, Predictor]) -> dict[str, Floats]:
    """Of each metric, its (seed,) values."""
    found = [one.metrics(np.ones((1, one.n_subjects))) for one in seeds.values()]
    return {name: np.array([each[name][0] for each in found]) for name in found[0]}
