"""Pictures of the brain for the pages of quality, each as a `data:` address that a page can hold.

All runs of a grid are cut at the same places, so that pages can be compared. Colours are those of
Okabe and Ito; what a colour means is also told by the line's style.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuromamba.qc_template import Mask, Template

Floats = npt.NDArray[np.floating]
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PINK, SKY, YELLOW = "#CC79A7", "#56B4E9", "#E69F00"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "neuromamba",
}
CUTS_MM = (
    *(("z", mm) for mm in (-44, -30, -16, -4, 8, 20, 32, 44, 56, 68)),
    ("x", -4),
    ("y", -20),
)
"""Where the pictures are cut: axis and MNI mm; a mosaic shows them row by row."""
ACROSS = 4
WIDTH = 9.6
DPI = 100
WEBP_QUALITY = 78
MARGIN = 2


@dataclass(frozen=True)
class Mosaic:
    """Where volumes (z, y, x) of one grid are cut, and the window that all cuts are made in."""

    cuts: tuple[tuple[int, int, str], ...]
    window: tuple[slice, ...]

    def tile(self, volume: npt.NDArray[Any], empty: float = 0) -> npt.NDArray[Any]:
        """The cuts side by side, up is up or front, left is left or front: (row, column)."""
        panels = []
        for axis, index, _ in self.cuts:
            window = [*self.window]
            window[axis] = slice(index, index + 1)
            panels.append(np.flip(volume[tuple(window)].squeeze(axis), axis=0))
        height = max(len(panel) for panel in panels)
        width = max(panel.shape[1] for panel in panels)
        rows = -(-len(panels) // ACROSS)
        tiled = np.full((rows * height, ACROSS * width), empty, dtype=volume.dtype)
        for k, panel in enumerate(panels):
            top = k // ACROSS * height + (height - len(panel)) // 2
            left = k % ACROSS * width + (width - panel.shape[1]) // 2
            tiled[top : top + len(panel), left : left + panel.shape[1]] = panel
        return tiled


def plan_mosaic(brain: Mask, affine: Floats) -> Mosaic:
    """Cuts at `CUTS_MM`, as far as they meet `brain` (z, y, x); its middle where none does."""
    window = tuple(
        slice(max(0, found.min() - MARGIN), min(size, found.max() + 1 + MARGIN))
        for found, size in zip(np.nonzero(brain), brain.shape, strict=True)
    )
    cuts = []
    for name, mm in CUTS_MM:
        axis, column = "zyx".index(name), "xyz".index(name)
        index = round(float((mm - affine[column, 3]) / affine[column, column]))
        if window[axis].start <= index < window[axis].stop:
            cuts.append((axis, index, f"{name} = {mm}"))
    middle = (window[0].start + window[0].stop) // 2
    return Mosaic(tuple(cuts) or ((0, middle, "middle"),), window)


def mean_picture(mean: Floats, mask: Mask, template: Template, mosaic: Mosaic) -> str:
    """The mean volume with the outlines of its mask, of the template's brain and white matter."""
    figure, axis = _mosaic_axes(mosaic)
    _show(axis, mosaic, mean, mask, "gray")
    outlines = (
        (mask, SKY, "-"),
        (template.brain, YELLOW, "--"),
        (template.white >= 0.5, PINK, "-"),
    )
    for outline, colour, style in outlines:
        _outline(axis, mosaic.tile(outline), colour, style)
    return as_webp(figure)


def map_picture(image: Floats, mask: Mask, mosaic: Mosaic, label: str) -> str:
    """A map with its scale."""
    figure, axis = _mosaic_axes(mosaic, scale=True)
    shown = _show(axis, mosaic, image, mask, "inferno")
    _draw_scale(figure, shown, label)
    return as_webp(figure)


def token_picture(mean: Floats, mask: Mask, patches: npt.NDArray[np.int8], mosaic: Mosaic) -> str:
    """The mean volume, the patches that are kept as a chequered tint, and brain in none of them.

    Parameters
    ----------
    mean, mask
        (z, y, x).
    patches
        (z, y, x): 0 in no patch, 1 and 2 in patches by turns.
    mosaic
        Where to cut.
    """
    figure, axis = _mosaic_axes(mosaic)
    _show(axis, mosaic, mean, mask, "gray")
    tiled, lost = mosaic.tile(patches), mosaic.tile(mask & (patches == 0))
    tint = np.zeros((*tiled.shape, 4))
    tint[tiled == 1] = (*matplotlib.colors.to_rgb(SKY), 0.32)
    tint[tiled == 2] = (*matplotlib.colors.to_rgb(BLUE), 0.32)
    tint[lost] = (*matplotlib.colors.to_rgb(ORANGE), 0.9)
    axis.imshow(tint, interpolation="nearest")
    _outline(axis, tiled > 0, SKY, "-")
    return as_webp(figure)


def group_picture(image: Floats, template: Template, mosaic: Mosaic, label: str) -> str:
    """A map over runs with its scale and the outline of the template's brain."""
    figure, axis = _mosaic_axes(mosaic, scale=True)
    shown = _show(axis, mosaic, image, np.isfinite(image), "inferno")
    _outline(axis, mosaic.tile(template.brain), SKY, "--")
    _draw_scale(figure, shown, label)
    return as_webp(figure)


def _mosaic_axes(mosaic: Mosaic, scale: bool = False) -> tuple[Figure, Axes]:
    rows, columns = mosaic.tile(np.zeros([w.stop for w in mosaic.window], dtype=np.int8)).shape
    width = WIDTH * (0.88 if scale else 1.0)
    figure = Figure(figsize=(WIDTH, width * rows / columns), facecolor="black")
    axis = figure.add_axes((0, 0, width / WIDTH, 1))
    axis.set_axis_off()
    if scale:
        figure.add_axes((0.9, 0.2, 0.015, 0.6))
    height, across = rows // -(-len(mosaic.cuts) // ACROSS), columns // ACROSS
    style: dict[str, Any] = {"color": "white", "fontsize": 13, "va": "top"}
    for k, (_, _, label) in enumerate(mosaic.cuts):
        top, left = k // ACROSS * height + 1, k % ACROSS * across + 1
        axis.text(left, top, label, ha="left", **style)
    axis.text(0, height / 2, "L", ha="left", **style)
    return figure, axis


def _draw_scale(figure: Figure, shown: Any, label: str) -> None:
    bar = figure.colorbar(shown, cax=figure.axes[1])
    bar.ax.tick_params(colors="white", labelsize=12)
    bar.ax.set_title(label, color="white", fontsize=13, pad=12)


def _show(axis: Axes, mosaic: Mosaic, image: Floats, mask: Mask, colours: str) -> Any:
    inside = image[mask & np.isfinite(image)]
    high = float(np.percentile(inside, 99)) if inside.size else 1.0
    low = min(0.0, float(inside.min())) if inside.size else 0.0
    values = mosaic.tile(np.where(mask, image, np.nan).astype(np.float32), np.nan)
    palette = matplotlib.colormaps[colours].with_extremes(bad="black")
    return axis.imshow(values, cmap=palette, vmin=low, vmax=high, interpolation="nearest")


def _outline(axis: Axes, tiled: Mask, colour: str, style: str) -> None:
    if tiled.any() and not tiled.all():
        axis.contour(tiled, [0.5], colors=colour, linewidths=1.1, linestyles=style)


# --- As addresses -------------------------------------------------------------------------------


def as_svg(figure: Figure) -> str:
    """For lines."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def as_webp(figure: Figure) -> str:
    """For voxels."""
    stream = io.BytesIO()
    figure.savefig(stream, format="webp", dpi=DPI, pil_kwargs={"quality": WEBP_QUALITY})
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
