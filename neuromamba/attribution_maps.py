"""Attributions as maps: of a subject, of a group, by region, as NIfTI in MNI space and as a figure.

A subject has two maps: `signed`, the sum of a voxel's attributions over the volumes of a window,
whose sum over voxels is what the output changes by from the baseline; and `strength`, the sum of
their absolute values. A voxel that a run has no patch for is not read by the model and therefore 0.

A group's maps are the means over subjects, with the mean's interval by Student's t. Most of what an
output changes by from a brain without a signal may be the same for everybody. So a group has a
third map, `between`: the covariance over subjects of a voxel's signed attribution and the sum of
all, divided by the variance of that sum. It sums to 1 over voxels, exactly, and tells where the
model sees what it tells people apart by.

The finest thing that such maps show is a patch: inside of one, values repeat the pattern of the
weights that the model reads every patch by.

A group holds sums alone, however many subjects there are. Regions are few, and have bootstrap
intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats

from neuromamba.files import atomic_path, write_json
from neuromamba.moments import Moments
from neuromamba.parcellation import Parcellation, resample_labels

Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Grid = tuple[int, ...]

KINDS = ("strength", "signed")
CONFIDENCE = 0.95
"""Of all intervals (our choice)."""
RESAMPLES = 2000
MNI_CODE = 4
"""NIfTI's code of an affine that leads to MNI space."""


@dataclass(frozen=True)
class SubjectMap:
    """Attributions of one subject, mean over its windows.

    Attributes
    ----------
    strength, signed
        (x, y, z) float32 in units of the output, of the volumes of a window together.
    brain
        (x, y, z) voxels in the brain mask of a run and in a patch that the model reads.
    change, total
        Of each window: what the output changes by, and the sum of its attributions.
    """

    subject: str
    strength: Floats
    signed: Floats
    brain: Mask
    change: list[float]
    total: list[float]


def place_tokens(
    values: npt.NDArray[Any], grid_index: npt.NDArray[np.integer], patch: int, patch_grid: Grid
) -> npt.NDArray[Any]:
    """Put values of tokens back in space.

    Parameters
    ----------
    values
        (token, patch**3), x fastest.
    grid_index
        (token, 3) number of each token's patch along x, y, z.
    patch, patch_grid
        Edge of a patch in voxels, and patches along x, y, z.

    Returns
    -------
    (x, y, z)
        0 in patches that have no token.
    """
    blocks = np.zeros((*patch_grid, patch, patch, patch), dtype=values.dtype)
    x, y, z = grid_index.T
    blocks[x, y, z] = values.reshape(-1, patch, patch, patch).transpose(0, 3, 2, 1)
    shape = [count * patch for count in patch_grid]
    return blocks.transpose(0, 3, 1, 4, 2, 5).reshape(shape)


class GroupMap:
    """Maps of a group, and how sure they are, from a stream of subjects.

    Attributes
    ----------
    n
        Subjects so far.
    """

    def __init__(self, shape: Grid) -> None:
        self.n = 0
        self._shape = shape
        self._moments = {kind: Moments() for kind in KINDS}
        self._held = np.zeros(shape, dtype=np.int64)
        self._sums: list[float] = []
        self._products = np.zeros(shape)

    def add(self, one: SubjectMap) -> None:
        for kind, moments in self._moments.items():
            moments.add(getattr(one, kind).reshape(1, -1).astype(np.float32))
        self._held += one.brain
        self._sums.append(float(one.signed.sum(dtype=np.float64)))
        # Differences to the first subject keep the digits that plain products would lose.
        self._products += (self._sums[-1] - self._sums[0]) * one.signed.astype(np.float64)
        self.n += 1

    @property
    def brain(self) -> Mask:
        """(x, y, z) voxels that at least half of the subjects have."""
        return 2 * self._held >= max(self.n, 1)

    def mean(self, kind: str) -> Floats:
        """(x, y, z) mean over subjects of `strength` or `signed`."""
        return self._moments[kind].mean().reshape(self._shape)

    def between(self) -> Floats | None:
        """(x, y, z) share of the variance over subjects; `None` where there is no variance."""
        sums = np.array(self._sums) - self._sums[0]
        variance = float(sums.var())
        if variance <= 1e-12 * float(np.square(self._sums).mean()):
            return None
        covariance = self._products / self.n - sums.mean() * self.mean("signed")
        return np.asarray(covariance / variance)

    def maps(self) -> dict[str, Floats]:
        """The maps (x, y, z): `strength`, `signed` and, where subjects differ, `between`."""
        maps = {kind: self.mean(kind) for kind in KINDS}
        between = self.between()
        return maps if between is None else {**maps, "between": between}

    def volumes(self) -> dict[str, Floats]:
        """The maps and, of two or more subjects, the means' intervals and a t map of `signed`."""
        maps = self.maps()
        for kind, moments in self._moments.items():
            if self.n < 2:
                continue
            mean = maps[kind]
            error = moments.sd().reshape(self._shape) / np.sqrt(self.n - 1)
            half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1) * error
            maps |= {f"{kind}_low": mean - half, f"{kind}_high": mean + half}
            if kind == "signed":
                maps["signed_t"] = np.divide(
                    mean, error, out=np.zeros_like(mean), where=error > 1e-9 * np.abs(mean)
                )
        return maps


def write_map(
    path: Path, volumes: dict[str, Floats], affine: Floats, about: dict[str, Any]
) -> None:
    """Write named maps as one NIfTI, a volume each, and a JSON beside it that names them."""
    data = np.stack(list(volumes.values()), axis=-1).astype(np.float32)
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, MNI_CODE)
    image.set_qform(affine, MNI_CODE)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
    sidecar = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
    write_json(sidecar, {"volumes": list(volumes), **about})


class Regions:
    """Attributions by region of an atlas, subject by subject."""

    def __init__(self, atlas: Parcellation, shape: Grid, affine: Floats) -> None:
        self.atlas = atlas
        self._label = resample_labels(atlas, shape, affine.astype(np.float64))
        self._sums: dict[str, list[Floats]] = {kind: [] for kind in KINDS}
        self._outside: list[float] = []

    def add(self, one: SubjectMap) -> None:
        inside, count = self._label >= 0, len(self.atlas.labels)
        for kind, sums in self._sums.items():
            weights = getattr(one, kind)[inside].astype(np.float64)
            found = np.bincount(self._label[inside], weights, minlength=count)
            sums.append(found.astype(np.float64))
        self._outside.append(float(one.strength[~inside].sum(dtype=np.float64)))

    def table(self, brain: Mask, between: Floats | None, seed: int) -> pd.DataFrame:
        """Rows of regions with voxels in `brain`, the strongest first.

        Columns `region`; `n_voxels` in `brain`; `strength`, mean over the region's voxels and
        subjects; `share` of the strength of the whole map; `signed` and `between`, sums over the
        region's voxels; and bootstrap intervals over subjects `<column>_low`, `<column>_high` of
        `strength` and `signed`.
        """
        count = np.bincount(self._label[brain & (self._label >= 0)], minlength=self._size)
        there = np.flatnonzero(count)
        strength = np.stack(self._sums["strength"])[:, there]
        whole = np.stack(self._sums["strength"]).sum(1) + np.array(self._outside)
        columns: dict[str, Any] = {
            "region": [self.atlas.labels[k] for k in there],
            "n_voxels": count[there],
            **_with_interval("strength", strength / count[there], seed),
            "share": strength.sum(0) / max(whole.sum(), np.finfo(float).tiny),
            **_with_interval("signed", np.stack(self._sums["signed"])[:, there], seed),
        }
        if between is not None:
            inside = self._label >= 0
            sums = np.bincount(self._label[inside], between[inside], minlength=self._size)
            columns["between"] = sums[there]
        table = pd.DataFrame(columns)
        return table.sort_values("strength", ascending=False, kind="stable", ignore_index=True)

    @property
    def outside(self) -> float:
        """Share of the strength that lies in no region."""
        whole = float(np.sum(self._sums["strength"])) + sum(self._outside)
        return sum(self._outside) / whole if whole else 0.0

    @property
    def _size(self) -> int:
        return len(self.atlas.labels)


def _with_interval(name: str, values: Floats, seed: int) -> dict[str, Floats]:
    """Mean over subjects of (subject, region) values, with its percentile interval."""
    mean = values.mean(0)
    low = high = np.full_like(mean, np.nan)
    if len(values) > 1:
        rng = np.random.default_rng(seed)
        found = scipy.stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=50,  # resamples held at once
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=rng,
        )
        low, high = found.confidence_interval
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def draw_maps(path: Path, maps: Mapping[str, Floats], affine: Floats, title: str) -> None:
    """Draw maps through a glass brain, and the last of them in slices, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from nilearn import plotting  # here, because it takes seconds that only figures are to wait for

    rows = len(maps) + 1
    figure = Figure(figsize=(11, 3 * rows), facecolor="white")
    FigureCanvasAgg(figure)
    for row, (name, values) in enumerate(maps.items()):
        image = nibabel.Nifti1Image(values.astype(np.float32), affine)
        # A constant map has no scale of its own.
        top = float(np.abs(values).max()) or 1.0
        # The threshold leaves out what is 0, such as everything outside of the brain.
        shown: dict[str, Any] = {"figure": figure, "threshold": 1e-6 * top, "vmax": top}
        shown |= {"title": name, "vmin": 0.0, "cmap": "Reds"}
        if name != "strength":
            shown |= {"vmin": -top, "cmap": "RdBu_r", "symmetric_cbar": True}
        place = (0.02, 0.97 - 0.96 * (row + 1) / rows, 0.96, 0.9 / rows)
        plotting.plot_glass_brain(image, axes=place, colorbar=True, plot_abs=False, **shown)
    place = (0.02, 0.01, 0.96, 0.9 / rows)
    plotting.plot_stat_map(
        image, axes=place, display_mode="z", cut_coords=7, colorbar=False, **shown
    )
    figure.suptitle(title, fontsize=11, y=0.995)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
