"""What the report's brain viewer shows: volumes as numbers that a page can hold.

A volume is a grey PNG of its axial slices side by side, cut to the brain, with 8 bits a voxel: a
browser decodes it without a library, and from a file as well as from a server. Attributions are
shown as sums over patches, which is the finest thing they tell (`neuromamba.attribution_maps`), and
so are a few kilobytes. Axes are (z, y, x) as in the stores.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from neuromamba.collect import Example

Floats = npt.NDArray[np.floating]
Box = tuple[slice, ...]

CLIP = 99.0
"""Percentile of the brain's values that is shown as white or as the end of a colour scale."""


@dataclass(frozen=True)
class PatchMap:
    """A map of one value a patch, to be laid over the brain.

    Attributes
    ----------
    label
        What it is called in the viewer's list.
    values
        (z, y, x) of patches.
    signed
        Whether values are drawn in two colours around 0.
    unit
        Of a value.
    """

    label: str
    values: Floats
    signed: bool
    unit: str


def patch_sums(values: Floats, edge: int) -> Floats:
    """Sums of (z, y, x) voxels over cubes of `edge` voxels, which must fill the volume."""
    z, y, x = (size // edge for size in values.shape)
    blocks = values.reshape(z, edge, y, edge, x, edge)
    return np.asarray(blocks.sum(axis=(1, 3, 5)))


def build_viewer(example: Example, edge: int, maps: Sequence[PatchMap]) -> dict[str, Any]:
    """What the viewer reads, JSON-able.

    Parameters
    ----------
    example
        The run whose mean volume is shown, on the grid of the maps.
    edge
        Of a patch, in voxels.
    maps
        Beside the kept tokens.

    Returns
    -------
    dict
        `shape` (x, y, z) in voxels of what is shown, `origin` and `step` in mm (centre of the first
        voxel, edge of a voxel), `edge`; `anatomy`; `maps`, each with `label`, `unit`, `signed` and
        `top`, the value at the end of its colours.
    """
    box = brain_box(example, edge)
    corner = np.array([part.start for part in reversed(box)])
    origin = example.affine[:3, 3] + np.diag(example.affine)[:3] * corner
    mean = np.where(example.mask, np.nan_to_num(example.mean), 0.0)
    white = float(np.percentile(mean[example.mask], CLIP)) or 1.0
    layers = [_kept(example, edge)] if example.tokens is not None else []
    layers += maps
    return {
        "shape": [part.stop - part.start for part in reversed(box)],
        "origin": origin.round(3).tolist(),
        "step": np.diag(example.affine)[:3].round(3).tolist(),
        "edge": edge,
        "anatomy": {"src": as_png(_levels(mean[box], white, False)), "top": white},
        "maps": [_layer(layer, box, edge) for layer in layers],
    }


def brain_box(example: Example, edge: int) -> Box:
    """The whole patches around the brain and all tokens, one slice a dimension (z, y, x)."""
    held = example.mask if example.tokens is None else example.mask | example.tokens
    box = []
    for found, size in zip(np.nonzero(held), held.shape, strict=True):
        start, stop = int(found.min()) // edge * edge, -(-(int(found.max()) + 1) // edge) * edge
        box.append(slice(start, min(stop, size)))
    return tuple(box)


def _kept(example: Example, edge: int) -> PatchMap:
    assert example.tokens is not None
    kept = patch_sums(example.tokens.astype(np.float32), edge) > 0
    return PatchMap("kept tokens", kept.astype(np.float32), False, "")


def _layer(layer: PatchMap, box: Box, edge: int) -> dict[str, Any]:
    cells = tuple(slice(part.start // edge, -(-part.stop // edge)) for part in box)
    values = np.nan_to_num(layer.values[cells])
    shown = np.abs(values[values != 0])
    top = float(np.percentile(shown, CLIP)) if len(shown) else 1.0
    return {
        "label": layer.label,
        "unit": layer.unit,
        "signed": layer.signed,
        "top": top,
        "src": as_png(_levels(values, top, layer.signed)),
    }


def _levels(values: Floats, top: float, signed: bool) -> npt.NDArray[np.uint8]:
    """Values as 0 to 255 for 0 to `top`, or as 1 to 255 for -`top` to `top` with 128 for 0."""
    share = np.clip(values / top, -1.0 if signed else 0.0, 1.0)
    return np.rint(share * 127 + 128 if signed else share * 255).astype(np.uint8)


def as_png(levels: npt.NDArray[np.uint8]) -> str:
    """The axial slices (z, y, x) in rows of a picture that is about square, as a `data:` address.

    The browser cuts it with the same `ceil(sqrt(z))` slices a row.
    """
    count, height, width = levels.shape
    across = int(np.ceil(np.sqrt(count)))
    rows = -(-count // across)
    sheet = np.zeros((rows * across, height, width), dtype=np.uint8)
    sheet[:count] = levels
    sheet = sheet.reshape(rows, across, height, width).swapaxes(1, 2)
    picture = Image.fromarray(sheet.reshape(rows * height, across * width))
    stream = io.BytesIO()
    picture.save(stream, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
