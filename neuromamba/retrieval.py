"""How well two kinds of data of the same people find each other, and classes by prompts.

Design choices
--------------
- The rank of a person is the place of its own second among all seconds, by similarity to its first.
  Of ties the others come first, so that embeddings which are all the same find nobody.
- Intervals are by bootstrap over the people who are looked for; those to choose from stay all of
  them, as one who is drawn twice would be its own double.
- A class is prompted by embeddings of people of that class: they are put in a random order, cut
  into equal disjoint groups, and what is left over is not used; a group's embedding is its mean,
  brought to length 1. Without that, groups of one size would make no difference. A class's score is
  the mean similarity to its groups.

Source of network prompting: Hu, Wang and Xiao 2025, arXiv 2503.04205.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from neuromamba.metrics import bootstrap, interval
from neuromamba.weighted_metrics import Metrics

Floats = npt.NDArray[np.float64]


def ranks_of(similar: Floats) -> npt.NDArray[np.int64]:
    """The rank, from 1, of each row's own column in (person, person)."""
    own = np.diag(similar)[:, None]
    return np.asarray((similar >= own).sum(axis=1), dtype=np.int64)


def summarize_ranks(
    ranks: npt.NDArray[np.int64],
    choices: int,
    recall_at: Sequence[int],
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Recall at each k and the mean rank, with intervals and what chance gives.

    Parameters
    ----------
    ranks
        (person,), from 1.
    choices
        How many there are to choose from.
    recall_at
        The k's; one that is more than `choices` is left out.
    resamples, confidence, seed
        As `neuromamba.metrics.compute_metrics` takes them.

    Returns
    -------
    dict
        `n`, `choices`; `mean_rank` and `recall_<k>`, each with `<name>_low`, `<name>_high` and
        `<name>_chance`.
    """
    columns = {"mean_rank": ranks.astype(np.float64)}
    chance = {"mean_rank": (choices + 1) / 2}
    for k in recall_at:
        if k <= choices:
            columns[f"recall_{k}"] = (ranks <= k).astype(np.float64)
            chance[f"recall_{k}"] = k / choices
    measures = _means(columns)
    point = measures(np.ones((1, len(ranks))))
    drawn = bootstrap(measures, np.zeros(len(ranks), np.int64), resamples, seed)
    found: dict[str, Any] = {"n": len(ranks), "choices": choices}
    for name in columns:
        value = float(point[name][0])
        low, high = interval(value, drawn[name], confidence)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        found[f"{name}_chance"] = chance[name]
    return found


def _means(columns: Mapping[str, Floats]) -> Metrics:
    def measures(weight: Floats) -> dict[str, Floats]:
        total = weight.sum(axis=1)
        return {name: weight @ values / total for name, values in columns.items()}

    return measures


def draw_references(
    labels: Mapping[str, int], share: float, classes: int, seed: int
) -> list[list[str]]:
    """People of each class whose data prompt it, in a random order: `share` of each, at least one.

    Parameters
    ----------
    labels
        The class of each person who may be drawn, from 0.
    share
        Of each class.
    classes, seed
        How many classes, and what seeds the draw.
    """
    rng = np.random.default_rng(seed)
    found = []
    for number in range(classes):
        names = sorted(name for name, label in labels.items() if label == number)
        count = max(1, round(share * len(names))) if names else 0
        found.append([names[i] for i in rng.permutation(len(names))[:count]])
    return found


def prompt(embeddings: Floats, references: Sequence[Floats], groups: int) -> Floats:
    """Scores (person, class): the mean similarity to the groups of each class's references.

    Parameters
    ----------
    embeddings
        (person, channel), of length 1.
    references
        (reference, channel) of each class, of length 1; at least one each.
    groups
        Of each class; as many as there are references where these are fewer.
    """
    scores = []
    for of_class in references:
        count = min(groups, len(of_class))
        size = len(of_class) // count
        means = of_class[: count * size].reshape(count, size, -1).mean(axis=1)
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
        scores.append((embeddings @ means.T).mean(axis=1))
    return np.stack(scores, axis=1)
