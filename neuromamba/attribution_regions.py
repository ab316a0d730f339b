"""Attributions by region of an atlas, as a table and as a figure.

Regions are few, so that each subject's are kept, and their means have bootstrap intervals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure

from neuromamba.attribution_maps import CONFIDENCE, KINDS, SubjectMap
from neuromamba.attribution_maskers import Floats, Mask, Masker
from neuromamba.figures import COLOURS, GREY, STYLE
from neuromamba.files import atomic_path
from neuromamba.parcellation import Parcellation, resample_labels

RESAMPLES = 2000
SHOWN = 20
"""Regions of the figure, at most."""


class Regions:
    """Attributions by region of an atlas, subject by subject."""

    def __init__(self, atlas: Parcellation, masker: Masker) -> None:
        self.atlas = atlas
        self._masker = masker
        self._label = masker.number_regions(atlas)
        self._sums: dict[str, list[Floats]] = {kind: [] for kind in KINDS}
        self._seen: list[npt.NDArray[np.int_]] = []
        self._outside: list[float] = []

    def add(self, one: SubjectMap) -> None:
        inside, count = self._label >= 0, len(self.atlas.labels)
        for kind, sums in self._sums.items():
            weights = getattr(one, kind)[inside].astype(np.float64)
            found = np.bincount(self._label[inside], weights, minlength=count)
            sums.append(found.astype(np.float64))
        self._seen.append(np.bincount(self._label[one.brain & inside], minlength=count))
        self._outside.append(float(one.strength[~inside].sum(dtype=np.float64)))

    def table(self, brain: Mask, between: Floats | None, seed: int) -> pd.DataFrame:
        """Rows of regions with voxels in `brain`, the strongest first.

        Columns `region`; `n_voxels` of its voxels in `brain`; `strength`, mean over the voxels of
        the region that a subject has (0 where it has none), then over subjects; `share` of the
        strength of the whole map; `signed` and `between`, sums over the region's voxels; and
        bootstrap intervals over subjects `<column>_low`, `<column>_high` of `strength` and
        `signed`.
        """
        count = np.bincount(self._label[brain & (self._label >= 0)], minlength=self._size)
        there = np.flatnonzero(count)
        strength = np.stack(self._sums["strength"])[:, there]
        seen = np.maximum(np.stack(self._seen)[:, there], 1)
        whole = np.stack(self._sums["strength"]).sum(1) + np.array(self._outside)
        columns: dict[str, Any] = {
            "region": [self.atlas.labels[k] for k in there],
            "n_voxels": self._voxels(brain)[there],
            **with_interval("strength", strength / seen, seed),
            "share": strength.sum(0) / max(whole.sum(), np.finfo(float).tiny),
            **with_interval("signed", np.stack(self._sums["signed"])[:, there], seed),
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

    def _voxels(self, brain: Mask) -> npt.NDArray[np.int_]:
        """(region,) voxels of each in the brain, also where maps have a single value for it."""
        painted = self._masker.paint(brain)
        label = resample_labels(self.atlas, painted.shape, self._masker.affine)
        return np.bincount(label[painted & (label >= 0)], minlength=self._size)

    @property
    def _size(self) -> int:
        return len(self.atlas.labels)


def with_interval(name: str, values: Floats, seed: int) -> dict[str, Floats]:
    """Mean over subjects of (subject, ...) values, with its percentile interval."""
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


def draw_regions(path: Path, table: pd.DataFrame, title: str) -> None:
    """Draw the strongest regions of `Regions.table` with their intervals, as SVG."""
    shown = table.head(SHOWN)[::-1]
    with matplotlib.rc_context(STYLE):
        size = (4.2 * len(KINDS), 1.2 + 0.22 * len(shown))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(KINDS), sharey=True)
        for axis, name in zip(axes, KINDS, strict=True):
            place = np.arange(len(shown))
            low, high = shown[f"{name}_low"], shown[f"{name}_high"]
            axis.hlines(place, low, high, color=GREY, linewidth=1)
            axis.plot(shown[name], place, "o", color=COLOURS[0], markersize=4)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set(yticks=place, yticklabels=shown["region"], title=name)
            axis.ticklabel_format(axis="x", scilimits=(-2, 3))
        figure.suptitle(title, fontsize=10)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
