"""Attribution maps in slices over the MNI template, as one PNG.

Maps of patches are drawn as the means of patches: finer detail repeats the weights' pattern and
tells nothing of the brain. Nothing is hidden by a threshold, and each map has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import nibabel
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from neuromamba.attribution_maskers import Floats
from neuromamba.files import atomic_path

CUTS = (-36, -20, -4, 12, 28, 44, 60)
"""z of the slices, mm (our choice)."""
SCALE = 99.5
"""Percentile of the absolute values over the brain at which colours end."""


def draw_maps(path: Path, maps: Mapping[str, Floats], affine: Floats, title: str) -> None:
    """Draw maps (x, y, z), a row of axial slices each.

    Parameters
    ----------
    maps
        By the text of their rows; 0 where there is no brain. Those without values below 0 get a
        scale of one colour.
    """
    from nilearn import plotting  # here, because it takes seconds that only figures are to wait for

    rows = len(maps)
    figure = Figure(figsize=(12, 2.3 * rows + 0.5), facecolor="white")
    FigureCanvasAgg(figure)
    height = 2.3 / (2.3 * rows + 0.5)
    for row, (text, values) in enumerate(maps.items()):
        image = nibabel.Nifti1Image(values.astype(np.float32), affine)
        brain = np.abs(values[values != 0])
        # A constant map has no scale of its own.
        top = float(np.percentile(brain, SCALE)) if brain.size else 1.0
        # The threshold leaves out what is 0, such as everything outside of the brain.
        low, cmap = (-top, "RdBu_r") if values.min() < 0 else (0.0, "inferno")
        bottom = (rows - 1 - row) * height
        figure.text(0.01, bottom + 0.93 * height, text, fontsize=10, va="top")
        plotting.plot_stat_map(
            image,
            figure=figure,
            axes=(0.0, bottom + 0.02 * height, 0.9, 0.8 * height),
            display_mode="z",
            cut_coords=CUTS,
            resampling_interpolation="nearest",
            black_bg=False,
            draw_cross=False,
            colorbar=False,
            threshold=1e-6 * top,
            vmin=low,
            vmax=top,
            cmap=cmap,
        )
        scale = figure.add_axes((0.915, bottom + 0.12 * height, 0.01, 0.6 * height))
        colours = ScalarMappable(Normalize(low, top), cmap)
        figure.colorbar(colours, scale, format="%.2g", ticks=[low, (low + top) / 2, top])
    figure.suptitle(title, fontsize=11, y=0.995)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
