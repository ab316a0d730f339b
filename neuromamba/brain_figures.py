"""Pictures of volumes for the report, each as a `data:` address that a page can hold."""

from __future__ import annotations

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from neuromamba.figures import GREY, STYLE, as_png

SLICES = 7
VIEWS = {"sagittal": (2, 0, 1), "coronal": (1, 0, 2), "axial": (0, 1, 2)}
"""Dimension of (z, y, x) that is looked along, then those that go up and to the right."""
SCALE = 99.5
"""Percentile of the absolute values at which colours end."""


def brain(
    mean: npt.NDArray[np.floating],
    mask: npt.NDArray[np.bool_],
    tokens: npt.NDArray[np.bool_] | None,
    height: npt.NDArray[np.floating],
) -> str:
    """Axial slices of a mean image with the outlines of the brain mask and of the tokens.

    Parameters
    ----------
    mean, mask, tokens
        (z, y, x) on one grid; `tokens` is true in every voxel of a patch that is kept.
    height
        (z,) mm of each slice.
    """
    outline = mask if tokens is None else mask | tokens
    window = tuple(slice(max(0, found.min() - 1), found.max() + 2) for found in np.nonzero(outline))
    levels = np.flatnonzero(mask.any(axis=(1, 2)))
    chosen = np.unique(levels[np.linspace(0, len(levels) - 1, SLICES + 2).round().astype(int)])[
        1:-1
    ]
    shown = np.where(mask, np.nan_to_num(mean), 0.0)
    high = np.percentile(shown[mask], 99)
    with matplotlib.rc_context({**STYLE, "image.interpolation": "nearest"}):
        figure = Figure(figsize=(1.5 * len(chosen), 2.1), facecolor="black")
        axes = figure.subplots(1, len(chosen), squeeze=False)[0]
        figure.subplots_adjust(0.005, 0, 0.995, 0.9, wspace=0.02)
        for axis, level in zip(axes, chosen, strict=True):
            cut = (level, *window[1:])
            axis.imshow(shown[cut], origin="lower", cmap="gray", vmin=0, vmax=high)
            axis.contour(mask[cut], [0.5], colors="#56B4E9", linewidths=0.8)
            if tokens is not None and tokens[cut].any() and not tokens[cut].all():
                axis.contour(tokens[cut], [0.5], colors="#E69F00", linewidths=0.8)
            axis.set_axis_off()
            axis.set_title(f"z = {height[level]:.0f} mm", color="white", loc="center", fontsize=8)
        return as_png(figure)


def glass_brain(values: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_], signed: bool) -> str:
    """A map looked through from three sides: along each line, its value farthest from 0.

    Parameters
    ----------
    values, mask
        (z, y, x) on one grid; the mask gives the outline of the brain.
    signed
        Whether colours go both ways from 0.
    """
    shown = np.abs(values[values != 0])
    top = float(np.percentile(shown, SCALE)) if shown.size else 1.0
    low, colours = (-top, "RdBu_r") if signed else (0.0, "Reds")
    with matplotlib.rc_context({**STYLE, "image.interpolation": "nearest"}):
        figure = Figure(figsize=(7.2, 2.3), layout="constrained")
        axes = figure.subplots(1, len(VIEWS))
        for axis, (name, (along, up, right)) in zip(axes, VIEWS.items(), strict=True):
            farthest = np.abs(values).argmax(axis=along, keepdims=True)
            projected = np.take_along_axis(values, farthest, axis=along).squeeze(along)
            outline = mask.any(axis=along)
            if up > right:
                projected, outline = projected.T, outline.T
            image = axis.imshow(projected, origin="lower", cmap=colours, vmin=low, vmax=top)
            axis.contour(outline, [0.5], colors=GREY, linewidths=1.0)
            axis.set_axis_off()
            axis.set_title(name, loc="center", fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8)
        return as_png(figure)
