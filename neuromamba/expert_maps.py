"""Maps of the experts of a mixture: which of them works for which region, and how steadily.

Of a subject, the weight of an expert in a region is the mean over its windows and their times; what
is told of a group is the mean over its subjects, with a bootstrap interval over them. Experts have
no order and no meaning of their own: the first of one training is not the first of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from neuromamba.attribution_figure import draw_maps
from neuromamba.attribution_maps import write_map
from neuromamba.attribution_maskers import RegionMasker
from neuromamba.attribution_regions import with_interval
from neuromamba.batches import Windows
from neuromamba.scalars import to_device
from neuromamba.tables import write_table

Floats = npt.NDArray[np.floating]

TABLE, MAP, PICTURE = "experts.tsv", "experts.nii.gz", "experts.png"


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of the experts in some subjects.

    Attributes
    ----------
    mean, over_time
        (subject, region, expert) mean over windows and times, and SD over times within windows;
        NaN where a subject lacks the region.
    """

    mean: Floats
    over_time: Floats


@torch.no_grad()
def observe_experts(
    network: nn.Module, windows: Windows, count: int, batch_size: int
) -> ExpertWeights | None:
    """The weights in `count` windows of each run of each subject; `None` where there is no mixture.

    Parameters
    ----------
    network
        The backbone; see `neuromamba.models`.
    """
    if not hasattr(network, "experts"):
        return None
    device = next(network.parameters()).device
    means, spreads = [], []
    for subject in tqdm(windows.subjects, desc="experts", unit="subject", mininterval=1.0):
        found, present = [], []
        for batch in windows.batches(windows.spaced(count, [subject]), batch_size):
            weights = network.experts(to_device(batch, device))  # type: ignore[operator]
            if not weights:
                return None
            found.append(weights["weights"].double().cpu())
            present.append(batch["present"].double())
        each = torch.cat(found)  # window, time, region, expert
        times = torch.cat(present).sum(0)[:, None]  # 0 for a region that the subject lacks
        means.append((each.mean(1).sum(0) / times).numpy())
        spreads.append((each.std(1, correction=0).sum(0) / times).numpy())
    return ExpertWeights(np.stack(means), np.stack(spreads))


def tabulate_experts(labels: Sequence[str], weights: ExpertWeights, seed: int) -> pd.DataFrame:
    """A row for each region and expert, the heaviest expert of a region first.

    Columns `region`, `expert` (from 1); `n` subjects that have the region; `weight` with its
    bootstrap interval over subjects `weight_low`, `weight_high`; `excess`, the weight minus the
    expert's mean over regions, which tells what sets the region apart; `over_time`, the SD over
    the times of a window. Regions that nobody has are left out.
    """
    rows = []
    overall = np.nanmean(weights.mean, axis=(0, 1))
    for number, label in enumerate(labels):
        own = weights.mean[:, number]
        there = ~np.isnan(own[:, 0])
        if not there.any():
            continue
        spread = weights.over_time[there, number].mean(0)
        told = with_interval("weight", own[there], seed)
        for expert in np.argsort(-told["weight"], kind="stable"):
            row: dict[str, Any] = {"region": label, "expert": int(expert) + 1}
            row |= {"n": int(there.sum())}
            row |= {name: float(values[expert]) for name, values in told.items()}
            row |= {"excess": row["weight"] - float(overall[expert])}
            rows.append(row | {"over_time": float(spread[expert])})
    return pd.DataFrame(rows)


def write_experts(
    folder: Path, weights: ExpertWeights, masker: RegionMasker, about: dict[str, Any]
) -> None:
    """Write the table, the map (a volume for each expert, 0 outside of regions) and a picture."""
    table = tabulate_experts(masker.atlas.labels, weights, about["seed"])
    write_table(folder / TABLE, table)
    overall = np.nanmean(weights.mean, axis=(0, 1))
    of_regions = np.ma.masked_invalid(weights.mean).mean(axis=0).filled(0.0)
    painted = {
        f"expert {k + 1}": masker.paint(of_regions[:, k]) for k in range(of_regions.shape[1])
    }
    write_map(folder / MAP, painted, masker.affine, about)
    apart = {
        f"{name}: weight, minus its mean over regions ({overall[k]:.2f})": np.where(
            values != 0, values - overall[k], 0
        )
        for k, (name, values) in enumerate(painted.items())
    }
    draw_maps(folder / PICTURE, apart, masker.affine, f"Experts ({len(weights.mean)} subjects)")
