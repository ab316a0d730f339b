"""Nuisance signals of a run in fMRIPrep's names, from motion to outliers.

Names and definitions are fMRIPrep's, so that `nilearn.interfaces.fmriprep.load_confounds` and every
denoising recipe that is written for it work. What differs: the series they are computed from lies
in the template's space, and tissues are where the template says (`neuromamba.ants_template`).

Series are (time, voxel) and may be memory-mapped: they are read in slabs of voxels, and memory does
not grow with the number of volumes times voxels.

Sources: Nichols, arXiv 1704.01469 (DVARS; `nipype.algorithms.confounds.compute_dvars`); Behzadi et
al., NeuroImage 37 (2007) (CompCor); Satterthwaite et al., NeuroImage 64 (2013) (expansions).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba.motion import framewise_displacement

MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
CUTOFF = 128.0
"""Period of the high-pass filter, s."""
EXPLAINED = 0.5
"""Components are retained until they explain this share of the variance."""
HIGH_FD, HIGH_DVARS = 0.5, 1.5
"""mm, and standardised: above either, a volume is a motion outlier."""
NORMALISED_MEDIAN = 1000.0
SLAB_BYTES = 64 * 2**20
BINS = 4096

Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def make_confounds(
    series: npt.NDArray[np.float32],
    brain: Mask,
    tissues: dict[str, Mask],
    parameters: Values,
    repetition_time: float,
    non_steady: int = 0,
    n_motion: int = 24,
    unaligned: Collection[int] = (),
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """All nuisance signals of a run.

    Parameters
    ----------
    series
        (time, voxel).
    brain
        (voxel,) which of them are the run's brain.
    tissues
        (voxel,) masks by the names `csf` and `white_matter`; signals of tissues that are missing or
        empty are left out.
    parameters
        (time, 6) mm and radians, in the order of `MOTION`.
    repetition_time
        s.
    non_steady
        Volumes at the start before the steady state.
    n_motion
        6, or 24 with derivatives and squares.
    unaligned
        Volumes of which the motion is unknown: their parameters repeat those of the last one
        before, so that by their framewise displacement they have not moved.

    Returns
    -------
    pandas.DataFrame and dict
        One row a volume, and what the sidecar says of the columns.
    """
    tissues = {name: mask & brain for name, mask in tissues.items() if (mask & brain).any()}
    masks = {"global_signal": brain, **tissues}
    means = {name: mean_signal(series, mask) for name, mask in masks.items()}
    table = expand(pd.DataFrame(means))
    moved = pd.DataFrame(parameters, columns=list(MOTION))
    table[[*expand(moved)] if n_motion == 24 else [*MOTION]] = (
        expand(moved) if n_motion == 24 else moved
    )
    table["dvars"], table["std_dvars"] = dvars(series, brain)
    table["framewise_displacement"] = framewise_displacement(parameters)
    cosines = cosine_basis(len(series), repetition_time, non_steady)
    for k in range(cosines.shape[1]):
        table[f"cosine{k:02}"] = cosines[:, k]
    components, described = component_columns(series, tissues, cosines, non_steady)
    table = pd.concat([table, components, outlier_columns(table, non_steady, unaligned)], axis=1)
    return table, {**{n: {"Description": describe(n)} for n in map(str, table)}, **described}


def expand(table: pd.DataFrame) -> pd.DataFrame:
    """The columns, their differences from the volume before, and the squares of both."""
    parts = {}
    for name in table:
        step = table[name].diff()
        parts[name] = table[name]
        parts[f"{name}_derivative1"] = step
        parts[f"{name}_power2"] = table[name] ** 2
        parts[f"{name}_derivative1_power2"] = step**2
    return pd.DataFrame(parts)


def mean_signal(series: npt.NDArray[np.float32], mask: Mask) -> Values:
    """(time,) mean over the voxels of a mask."""
    return np.array([np.mean(volume[mask], dtype=np.float64) for volume in series])


# --- DVARS ----------------------------------------------------------------------------------------


def dvars(series: npt.NDArray[np.float32], mask: Mask) -> tuple[Values, Values]:
    """DVARS, after scaling the series' median to 1000, and standardised; the first is NaN.

    Standardised is relative to what is expected of each voxel's robust SD and autocorrelation;
    voxels that are constant take no part.
    """
    squares, n_voxels, expected = np.zeros(len(series) - 1), 0, 0.0
    for slab in _slabs(series, mask):
        low, high = np.percentile(slab, [25, 75], axis=0, method="lower")
        spread = (high - low) / 1.349
        varies = spread > 1e-7
        slab, spread = slab[:, varies], spread[varies]
        centred = slab - slab.mean(axis=0)
        lag1 = (centred[1:] * centred[:-1]).sum(axis=0) / (centred**2).sum(axis=0)
        expected += float((np.sqrt(2 * (1 - lag1)) * spread).sum())
        squares += (np.diff(slab, axis=0) ** 2).sum(axis=1)
        n_voxels += slab.shape[1]
    if not n_voxels:
        nothing = np.full(len(series), np.nan)
        return nothing, nothing
    plain = np.concatenate([[np.nan], np.sqrt(squares / n_voxels)])
    return plain * NORMALISED_MEDIAN / series_median(series, mask), plain * n_voxels / expected


def series_median(series: npt.NDArray[np.float32], mask: Mask) -> float:
    """The median of a mask's values, exactly, by two passes over a series too large to sort."""
    low = min(float(volume[mask].min()) for volume in series)
    high = max(float(volume[mask].max()) for volume in series)
    if low == high:
        return low
    counts = np.zeros(BINS, dtype=np.int64)
    for volume in series:
        counts += np.bincount(_bins(volume[mask], low, high), minlength=BINS)
    below, size = np.cumsum(counts), int(counts.sum())
    ranks = np.array([(size - 1) // 2, size // 2])
    wanted = np.unique(np.searchsorted(below, ranks, side="right"))
    parts = (volume[mask] for volume in series)
    ordered = np.sort(np.concatenate([p[np.isin(_bins(p, low, high), wanted)] for p in parts]))
    before = below[wanted[0]] - counts[wanted[0]]
    return float(ordered[ranks - before].astype(np.float64).mean())


def _bins(volume: npt.NDArray[np.float32], low: float, high: float) -> npt.NDArray[np.intp]:
    scaled = (volume.astype(np.float64) - low) * (BINS / (high - low))
    return np.minimum(scaled.astype(np.intp), BINS - 1)


# --- CompCor --------------------------------------------------------------------------------------


def cosine_basis(n_volumes: int, repetition_time: float, non_steady: int = 0) -> Values:
    """(time, k) slow cosines, periods from 128 s; 0 before the steady state."""
    from nilearn.glm.first_level.design_matrix import create_cosine_drift

    steady = n_volumes - non_steady
    basis = np.zeros((n_volumes, 0))
    if steady > 1:
        times = np.arange(steady) * repetition_time
        drift = create_cosine_drift(1 / CUTOFF, times)[:, :-1]  # without its constant
        basis = np.concatenate([np.zeros((non_steady, drift.shape[1])), drift])
    return basis


def component_columns(
    series: npt.NDArray[np.float32], tissues: dict[str, Mask], cosines: Values, non_steady: int
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Anatomical CompCor of CSF (`c_`), white matter (`w_`) and the two together (`a_`)."""
    masks = {}
    if {"csf", "white_matter"} <= tissues.keys():
        masks["a", "combined"] = tissues["csf"] | tissues["white_matter"]
    for key, name, tissue in (("c", "CSF", "csf"), ("w", "WM", "white_matter")):
        if tissue in tissues:
            masks[key, name] = tissues[tissue]
    columns, described = {}, {}
    for (key, name), mask in masks.items():
        components, singular, share = principal_components(series, mask, cosines, non_steady)
        for k, component in enumerate(components.T):
            columns[f"{key}_comp_cor_{k:02}"] = component
            described[f"{key}_comp_cor_{k:02}"] = {
                "Method": "aCompCor",
                "Mask": name,
                "Retained": True,
                "SingularValue": float(singular[k]),
                "VarianceExplained": float(share[k]),
                "CumulativeVarianceExplained": float(share[: k + 1].sum()),
            }
    return pd.DataFrame(columns, index=range(len(series))), described


def principal_components(
    series: npt.NDArray[np.float32], mask: Mask, cosines: Values, non_steady: int
) -> tuple[Values, Values, Values]:
    """The time courses that explain half of the variance in a mask.

    Voxels are high-pass filtered by the cosines and scaled to unit variance; volumes before the
    steady state take no part.

    Returns
    -------
    (time, component), (component,), (component,)
        Time courses of norm 1, their singular values, and their shares of the variance.
    """
    constant = np.ones((len(series) - non_steady, 1))
    basis, _ = np.linalg.qr(np.concatenate([cosines[non_steady:], constant], axis=1))
    products = np.zeros((len(basis), len(basis)))
    for slab in _slabs(series[non_steady:], mask):
        residual = slab - basis @ (basis.T @ slab)
        spread = residual.std(axis=0)
        # What is left of a constant voxel is rounding.
        varies = spread > 1e-9 * np.abs(slab).max(axis=0)
        scaled = residual[:, varies] / spread[varies]
        products += scaled @ scaled.T
    values, vectors = np.linalg.eigh(products)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    if not values.sum():
        return np.zeros((len(series), 0)), np.zeros(0), np.zeros(0)
    share = values / values.sum()
    n = int(np.searchsorted(np.cumsum(share), EXPLAINED)) + 1
    # The sign of an eigenvector is free: the largest entry is positive.
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    components = (vectors * np.sign(largest))[:, :n]
    padded = np.concatenate([np.zeros((non_steady, n)), components])
    return padded, np.sqrt(values[:n]), share[:n]


# --- Outliers -------------------------------------------------------------------------------------


def outlier_columns(
    table: pd.DataFrame, non_steady: int, unaligned: Collection[int] = ()
) -> pd.DataFrame:
    """A column with a single 1 for each volume before the steady state or with much motion.

    That of volumes that could not be aligned is unknown, and counts as much.
    """
    high = (table["framewise_displacement"] > HIGH_FD) | (table["std_dvars"] > HIGH_DVARS)
    high |= table.index.isin(list(unaligned))
    groups = {
        "non_steady_state_outlier": range(non_steady),
        "motion_outlier": [int(k) for k in np.flatnonzero(high) if k >= non_steady],
    }
    columns = {}
    for name, volumes in groups.items():
        for number, volume in enumerate(volumes):
            columns[f"{name}{number:02}"] = (np.arange(len(table)) == volume).astype(int)
    return pd.DataFrame(columns, index=table.index)


def _slabs(series: npt.NDArray[np.float32], mask: Mask) -> Iterator[Values]:
    """All times of some of a mask's voxels at a time: (time, part of the voxels) float64."""
    voxels = np.flatnonzero(mask)
    step = max(1, SLAB_BYTES // (8 * len(series)))
    for start in range(0, len(voxels), step):
        yield series[:, voxels[start : start + step]].astype(np.float64)


def describe(column: str) -> str:
    """What a column is, for the sidecar."""
    kinds = {
        "trans": "Head position relative to the reference volume, mm",
        "rot": "Head rotation relative to the reference volume, radians",
        "global_signal": "Mean of the brain mask",
        "csf": "Mean of CSF deep in the brain, by the template's probability maps",
        "white_matter": "Mean of eroded white matter, by the template's probability maps",
        "dvars": "Root mean square change from the volume before, median scaled to 1000",
        "std_dvars": "DVARS relative to what is expected without artefacts (Nichols)",
        "framewise_displacement": "Framewise displacement (Power, 50 mm), mm",
        "cosine": "Discrete cosine basis of the 128 s high-pass filter",
        "non_steady_state_outlier": "Volume before the steady state",
        "motion_outlier": f"Volume with FD > {HIGH_FD} mm or standardised DVARS > {HIGH_DVARS}, or "
        "that could not be aligned",
    }
    text = next((kinds[kind] for kind in kinds if column.startswith(kind)), "")
    step = "; difference from the volume before" if "_derivative1" in column else ""
    return text + step + ("; squared" if column.endswith("_power2") else "")
