"""The template's brain on a grid, and how well a run's mean volume lies on it.

The template is nilearn's ICBM 2009a (symmetric, no download). Other MNI templates differ from it by
a few millimetres, so the scores of runs in another MNI space are a little lower, and those of one
dataset are to be compared with each other.

The score of the registration
-----------------------------
A mean EPI volume is bright where a T1-weighted image is dark, it loses signal near air, and its
brightness drifts across the head; so a plain correlation with a T1w template says nothing about
alignment. Here both are high-pass filtered within their common mask (a Gaussian of `DETAIL_MM` is
taken off), which leaves gyri, ventricles and deep nuclei. The score is the multiple correlation of
the EPI's detail with that of three maps of the template: T1w, gray matter and white matter. Their
weights are fitted to each run, so that any contrast will do; a contrast cannot be fitted to tissue
that lies elsewhere. It is 0 to 1 and falls to a third when a scan is moved by 8 mm or turned back
to front.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Volume = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Affine = tuple[tuple[float, ...], ...]

DETAIL_MM = 12.0
"""SD of the Gaussian that is taken off; what is larger is field and coil, not tissue."""
TEMPLATE_MM = 2
CLIP = (1.0, 99.0)
"""Percentiles that the mean volume is clipped to: vessels and drop-outs must not decide."""
FEWEST_VOXELS = 100


@dataclass(frozen=True)
class Template:
    """Maps (z, y, x) of the template on one grid: T1w, probabilities of tissue, the brain."""

    t1w: Volume
    gray: Volume
    white: Volume
    brain: Mask


def template_on(shape: tuple[int, ...], affine: npt.ArrayLike) -> Template:
    """The template on a grid of `shape` (x, y, z) voxels with `affine` (voxel indices to mm)."""
    rows = tuple(tuple(map(float, row)) for row in np.asarray(affine))
    return _template_on(tuple(shape), rows)


@lru_cache(maxsize=2)
def _template_on(shape: tuple[int, ...], affine: Affine) -> Template:
    # Here, because it takes a second and only this needs it.
    from nilearn import datasets

    maps = (
        datasets.load_mni152_template(resolution=TEMPLATE_MM),
        datasets.load_mni152_gm_template(resolution=TEMPLATE_MM),
        datasets.load_mni152_wm_template(resolution=TEMPLATE_MM),
        datasets.load_mni152_brain_mask(resolution=TEMPLATE_MM),
    )
    t1w, gray, white, brain = (_on_grid(image, shape, np.array(affine)) for image in maps)
    return Template(t1w, gray, white, brain >= 0.5)


def _on_grid(image: Any, shape: tuple[int, ...], affine: npt.NDArray[np.float64]) -> Volume:
    """Trilinear interpolation of a NIfTI image; 0 outside of it."""
    data = np.asarray(image.get_fdata(), dtype=np.float32)
    to_source = np.linalg.inv(image.affine) @ affine
    found = ndimage.affine_transform(data, to_source, output_shape=shape, order=1)
    return np.ascontiguousarray(found.T)


def overlap(mask: Mask, template: Template) -> dict[str, float]:
    """`coverage`, the share of the template's brain in `mask` (z, y, x), and `dice` of both."""
    common = int((mask & template.brain).sum())
    brain, own = int(template.brain.sum()), int(mask.sum())
    return {
        "coverage": common / brain if brain else np.nan,
        "dice": 2 * common / (brain + own) if brain + own else np.nan,
    }


def registration_score(
    mean: Volume, mask: Mask, template: Template, voxel_size: npt.ArrayLike
) -> float:
    """How well a mean volume lies on the template, 0 to 1; see the module's text.

    Parameters
    ----------
    mean, mask
        (z, y, x); the mean may be NaN outside of the mask.
    template
        On the same grid.
    voxel_size
        In mm.

    Returns
    -------
    float
        0 where the brain and the template's hardly meet, or the mean volume is constant.
    """
    common = mask & template.brain & np.isfinite(mean)
    if common.sum() < FEWEST_VOXELS:
        return 0.0
    clipped = np.clip(mean, *np.percentile(mean[common], CLIP))
    sigma = DETAIL_MM / np.asarray(voxel_size, dtype=float)
    weight = ndimage.gaussian_filter(common.astype(np.float32), sigma)[common]
    images = (clipped, template.t1w, template.gray, template.white)
    own, *tissues = (_detail(image, common, sigma, weight) for image in images)
    design = np.stack(tissues, axis=1)
    total = float(own @ own)
    if not total:
        return 0.0
    fitted = design @ np.linalg.lstsq(design, own, rcond=None)[0]
    return float(np.sqrt(min(1.0, float(fitted @ fitted) / total)))


def _detail(image: Volume, mask: Mask, sigma: npt.NDArray[Any], weight: Volume) -> Volume:
    """(voxel,) an image minus its smooth part, both within the mask, with mean 0."""
    inside = np.where(mask, image, 0).astype(np.float32)
    smooth = ndimage.gaussian_filter(inside, sigma)[mask] / weight
    detail = inside[mask] - smooth
    return np.asarray(detail - detail.mean())
