"""A subject's T1w for the `ants` engine: corrected, registered to the template, and masked.

The brain mask is the template's, carried back by the registration: it has the same meaning in every
subject, and follows the brain as well as the registration does, which is checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from neuromamba.ants_registration import (
    Transform,
    correct_bias,
    register_affine,
    register_nonlinear,
    resample,
    warp,
)
from neuromamba.ants_template import BrainTemplate
from neuromamba.files import InputError
from neuromamba.nifti import read_header, read_image
from neuromamba.skull_strip import extract_brain

MIN_CORRELATION = 0.4
"""With the template, in its brain. A head whose skull was taken for the brain has 0.3."""
AROUND_MM = 12.0
"""How far beyond the roughly placed template the brain may reach."""


@dataclass(frozen=True)
class Anatomy:
    """A T1w image and its way to the template.

    Attributes
    ----------
    source
        The raw file.
    image
        Corrected for bias, on its own grid.
    brain
        The same on the coarser grid of the registration, 0 outside the brain.
    mask
        (x, y, z) the brain on the image's own grid.
    to_template
        Points of the template to points of the image.
    correlation
        With the template, in its brain.
    """

    source: Path
    image: nibabel.Nifti1Image
    brain: nibabel.Nifti1Image
    mask: npt.NDArray[np.bool_]
    to_template: Transform
    correlation: float


def register_anatomy(path: Path, template: BrainTemplate, work: Path) -> Anatomy:
    """Correct, strip and register a T1w image.

    Raises
    ------
    InputError
        When the file is damaged, has no brain, or does not fit the template afterwards.
    """
    if template.t1w is None:
        raise InputError("the template has no T1w; give preprocess.ants.template.t1w")
    header = read_header(path)
    raw = nibabel.Nifti1Image(np.nan_to_num(read_image(header)), header.affine)
    image = correct_bias(raw)
    target = template.image(template.t1w)
    voxel_size = float(template.grid.affine[0, 0])
    coarse = resample(image, max(voxel_size, *nibabel.affines.voxel_sizes(image.affine)))
    transform = _register(path, coarse, target, template, work)
    there = warp(coarse, target, transform.forward).get_fdata()
    correlation = float(np.corrcoef(there[template.mask], template.t1w[template.mask])[0, 1])
    if not correlation >= MIN_CORRELATION:
        raise InputError(
            f"{path}: correlates with the template by {correlation:.2f} after the registration "
            f"(at least {MIN_CORRELATION} is asked for): is it a T1w of a whole head, with a right "
            "affine?"
        )
    mask = _carry_back(template, image, transform)
    coarse_mask = _carry_back(template, coarse, transform)
    brain = coarse.get_fdata(dtype=np.float32) * coarse_mask
    return Anatomy(
        source=path,
        image=image,
        brain=nibabel.Nifti1Image(brain, coarse.affine),
        mask=mask,
        to_template=transform,
        correlation=correlation,
    )


def _register(
    path: Path,
    head: nibabel.Nifti1Image,
    target: nibabel.Nifti1Image,
    template: BrainTemplate,
    work: Path,
) -> Transform:
    """The head roughly, then the brain alone."""
    rough = register_affine(target, head, work)
    depth = ndimage.distance_transform_edt(~template.mask, sampling=template.grid.affine[0, 0])
    around = template.image(depth <= AROUND_MM)
    near = warp(around, head, rough.inverse, "nearestNeighbor", inverse=True).get_fdata() > 0.5
    data = head.get_fdata(dtype=np.float32)
    voxel_size = float(nibabel.affines.voxel_sizes(head.affine).mean())
    found = extract_brain(data, near, voxel_size) if near.any() else near
    if not found.any():
        raise InputError(f"{path}: no brain can be made out in it; is it a T1w of a head?")
    brain = nibabel.Nifti1Image(data * found, head.affine)
    affine = register_affine(target, brain, work, rough)
    return register_nonlinear(target, brain, work, affine)


def _carry_back(
    template: BrainTemplate, image: nibabel.Nifti1Image, transform: Transform
) -> npt.NDArray[np.bool_]:
    inside = warp(template.image(template.mask), image, transform.inverse, inverse=True)
    return np.asarray(inside.get_fdata(dtype=np.float32) > 0.5)
