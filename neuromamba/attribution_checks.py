"""Whether an attribution map tells of the model at all, and of the truth where that is known.

Choices
-------
- Maps can look like the brain whatever the model has learnt (Adebayo et al. 2018, arXiv
  1810.03292). So the map is compared with that of the same network after the values of each weight
  tensor were shuffled, once of the head alone, once of all: the sizes of the weights stay, what
  they have learnt is gone. Shuffling serves any family; drawing anew would have to know each.
- Maps are compared by Spearman's correlation over brain voxels: units and scale do not count.
- `HIGH` and `LOW` are our choice. Correlations of maps have no p values here, as neighbouring
  voxels are no independent samples.
- On the synthetic dataset, the score is the AUROC for lying in the networks with the effect: of
  voxels by their absolute value, and of parcels by their mean, in which the pattern inside of
  patches averages out. Chance is what all other choices of as many networks get, which heeds that
  parcels of a network go together. There are few: of six networks 20 choices of three, 15 of two.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.stats
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from neuromamba.demo_brain import NETWORKS, PARCELS, load_brain, parcellation
from neuromamba.files import read_json
from neuromamba.parcellation import Parcellation, resample_labels

Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Network = TypeVar("Network", bound=nn.Module)

HIGH, LOW = 0.7, 0.3
"""Correlations above and below which maps are called alike and unlike."""
SHARED = 0.2
"""SD over subjects as a share of the mean change, below which the change is called everybody's."""
MOST_GAP = 0.05
"""Share of the outputs' change that attributions may miss before it is told."""
CLEAR = 0.8
"""AUROC from which a truth counts as clearly found (our choice)."""
DEMO_VOXEL = 4.0
"""mm, of the grid that the synthetic networks are looked up on; they lie the same on every grid."""
TRUTH = "truth.json"
REPEATS = {
    "seed": "a training with another seed",
    "refit": "a head that was fitted anew to the same labels",
}
"""Other networks that ought to have the same map."""


def shuffled(network: Network, part: nn.Module | None, seed: int) -> Network:
    """A copy of a network in which the values of each weight tensor are in random order.

    Parameters
    ----------
    network
        Stays as it is.
    part
        The module of it whose tensors are shuffled; `None`: all of them.
    seed
        Of the order.
    """
    names = {id(p) for p in (part or network).parameters()}
    chosen = [name for name, p in network.named_parameters() if id(p) in names]
    other = copy.deepcopy(network)
    parameters = dict(other.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in chosen:
            flat = parameters[name].flatten()
            order = torch.randperm(len(flat), generator=generator).to(flat.device)
            parameters[name].copy_(flat[order].view_as(parameters[name]))
    return other


def similarity(one: Floats, other: Floats, brain: Mask) -> float | None:
    """Spearman's correlation of two maps over brain voxels; `None` where one is constant."""
    a, b = one[brain], other[brain]
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(scipy.stats.spearmanr(a, b).statistic)


def compare_maps(
    own: Mapping[str, Floats], other: Mapping[str, Floats], brain: Mask, against: str
) -> dict[str, Any]:
    """Similarity of each kind of map with that of another network, and what it means.

    `against`: what the other network differs in: its `weights` or `labels`, which are in random
    order, or one of `REPEATS`.
    """
    found: dict[str, Any] = {}
    for kind in own:
        if kind not in other:  # `between`, where a network says the same of everybody
            continue
        rho = similarity(own[kind], other[kind], brain)
        found[kind] = {"spearman": rho, "verdict": f"the {kind} map {_meaning(rho, against)}"}
    return found


def _meaning(rho: float | None, against: str) -> str:
    if rho is None:
        return "cannot be compared: one of the two maps is the same everywhere"
    if against in REPEATS:
        level = "well" if rho >= HIGH else "in part" if rho > LOW else "hardly"
        return f"is {level} repeated by {REPEATS[against]} (rho {rho:.2f})"
    what = "on what the model has learnt" if against == "weights" else "on the labels it learnt by"
    if abs(rho) >= HIGH:
        return f"hardly depends {what} (rho {rho:.2f}): do not interpret it"
    if abs(rho) > LOW:
        return f"depends only in part {what} (rho {rho:.2f}): interpret it with care"
    return f"depends {what} (rho {rho:.2f})"


def judge_completeness(change: Sequence[float], total: Sequence[float]) -> dict[str, Any]:
    """How far sums of attributions are from what the outputs of windows change by.

    `gap`: the mean distance as a share of the mean change; `largest_gap`: that of the worst window.
    """
    change_w, total_w = np.asarray(change), np.asarray(total)
    mean = float(np.abs(change_w).mean())
    if mean == 0:
        text = "what the model says does not depend on what it reads: there is nothing to attribute"
        return {"windows": len(change_w), "gap": None, "largest_gap": None, "verdict": text}
    gaps = np.abs(total_w - change_w) / mean
    fine = gaps.mean() <= MOST_GAP
    text = f"attributions miss {gaps.mean():.2%} of what the outputs change by"
    return {
        "windows": len(change_w),
        "gap": float(gaps.mean()),
        "largest_gap": float(gaps.max()),
        "verdict": text if fine else f"{text}: raise --steps",
    }


def judge_baseline(change: Sequence[float]) -> dict[str, Any]:
    """How much of what the output changes by from the baseline tells subjects apart.

    `change`: of each subject. Where it is nearly the same for all, so are `strength` and `signed`.
    """
    mean, sd = float(np.mean(change)), float(np.std(change))
    text = (
        f"from the baseline the output changes by {mean:.3g} on average, SD over subjects {sd:.3g}"
    )
    if len(change) > 1 and sd < SHARED * abs(mean):
        text += ": the same for nearly everybody, so what tells people apart is in `between` alone"
    return {"mean": mean, "sd": sd, "verdict": text}


# --- Synthetic data, where the truth is known ---------------------------------------------------


def read_truth(derivatives: Path, column: str) -> list[str] | None:
    """Networks of the synthetic dataset that carry the effect of a column of its participants.

    `None` where the folder holds no synthetic dataset, or the column has no effect there.
    """
    path = derivatives / TRUTH
    if not path.exists():
        return None
    truth = read_json(path)
    for key, networks in truth.items():
        if key.startswith(f"{column}_on_logit_coherence"):
            return sorted(networks)
    return None


def score_recovery(
    values: Floats, truth: Collection[str], affine: Floats, brain: Mask | None = None
) -> float:
    """AUROC over voxels of a map's absolute value for lying in the networks with the effect.

    Parameters
    ----------
    values
        (x, y, z) map.
    truth
        Names of networks; see `read_truth`.
    affine
        (4, 4) of the map, to MNI mm.
    brain
        Voxels that count; by default all that lie in a parcel.
    """
    parcel = _parcels(values.shape, affine, brain)
    inside = parcel >= 0
    return float(roc_auc_score(_lies_in(truth)[parcel[inside]], np.abs(values[inside])))


def judge_recovery(
    kind: str, values: Floats, truth: Collection[str], affine: Floats, brain: Mask
) -> dict[str, Any]:
    """`score_recovery`, and the AUROC of the parcels' means beside those of all other choices.

    `p` is the share of the choices of as many networks whose `parcel_auroc` is as high.
    """
    parcel = _parcels(values.shape, affine, brain)
    inside = parcel >= 0
    count = np.bincount(parcel[inside], minlength=PARCELS)
    there = count > 0
    mean = np.bincount(parcel[inside], values[inside], minlength=PARCELS)[there] / count[there]

    def auroc(networks: Collection[str]) -> float:
        return float(roc_auc_score(_lies_in(networks)[there], mean))

    own, choices = auroc(truth), list(itertools.combinations(NETWORKS, len(truth)))
    as_high = sum(auroc(choice) >= own - 1e-12 for choice in choices)
    of_voxels = score_recovery(values, truth, affine, brain)
    where = f"the networks with the effect ({', '.join(sorted(truth))})"
    found = f"AUROC {own:.2f} of parcels, {of_voxels:.2f} of voxels"
    others = f"{len(choices) - 1} other choices of {len(truth)} networks"
    if own > 0.5 and as_high == 1:
        how = "clearly" if own >= CLEAR else "weakly"
        text = f"finds {where} {how}, and better than all {others}: {found}"
    else:
        text = f"does not find {where}: {found}; {as_high - 1} of {others} score as high"
    return {
        "networks": sorted(truth),
        "auroc": of_voxels,
        "parcel_auroc": own,
        "p": as_high / len(choices),
        "verdict": f"the {kind} map {text}",
    }


def _parcels(shape: tuple[int, ...], affine: Floats, brain: Mask | None) -> npt.NDArray[np.int32]:
    """(x, y, z) synthetic parcel of each voxel, -1 outside of all or of `brain`."""
    demo = load_brain(DEMO_VOXEL)
    labels = np.full(demo.mask.shape, -1, dtype=np.int32)
    labels[demo.mask] = demo.parcel
    names = [str(number) for number in range(PARCELS)]
    atlas = Parcellation("synthetic parcels", None, names, labels.T, demo.affine)
    parcel = resample_labels(atlas, shape, affine.astype(np.float64))
    return parcel if brain is None else np.where(brain, parcel, np.int32(-1))


def _lies_in(networks: Collection[str]) -> Mask:
    """(parcel,) whether it lies in one of some networks."""
    return np.isin(np.array(NETWORKS)[parcellation()[1]], list(networks))
