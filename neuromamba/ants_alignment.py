"""A run's way to the template: through the subject's T1w, or straight to the template.

A gross failure is told by the outlines of two brains, which need no common contrast: the run's,
found in its own reference volume, and the template's, compared where the run has been scanned. They
do not tell of an error of 3 mm; look at the images for that.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt

from neuromamba.ants_anatomy import Anatomy
from neuromamba.ants_registration import (
    Transform,
    correct_bias,
    map_points,
    register_from_two,
    register_nonlinear,
    warp,
)
from neuromamba.ants_template import BrainTemplate
from neuromamba.files import InputError

MIN_OVERLAP = 0.75
"""Dice coefficient of the outlines."""
OPENING_MM = 6.0
"""What is thinner is no brain."""


@dataclass(frozen=True)
class Alignment:
    """How a run goes to the template.

    Attributes
    ----------
    transforms
        Points of the template to points of the run's reference, for `map_points`.
    rigid
        Points of the T1w to points of the reference, where there is a T1w.
    overlap
        Dice coefficient of the run's brain and the template's.
    """

    transforms: tuple[str, ...]
    rigid: Transform | None
    overlap: float


def find_brain(reference: nibabel.Nifti1Image, where: Path) -> npt.NDArray[np.bool_]:
    """The brain of a reference volume: (x, y, z) bool.

    Raises
    ------
    InputError
        When there is none.
    """
    from nilearn.masking import compute_epi_mask

    voxel_size = float(nibabel.affines.voxel_sizes(reference.affine).min())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty mask, which is an error here
            opening = round(OPENING_MM / voxel_size)
            image = compute_epi_mask(reference, opening=opening, ensure_finite=False)
    except ValueError as error:
        raise InputError(f"{where}: no brain can be made out in it ({error})") from None
    mask = np.asarray(image.dataobj) > 0
    if not mask.any():
        raise InputError(f"{where}: no brain can be made out in it; is it a BOLD scan of a head?")
    return mask


def align(
    reference: nibabel.Nifti1Image,
    brain: npt.NDArray[np.bool_],
    anatomy: Anatomy | None,
    template: BrainTemplate,
    work: Path,
    where: Path,
) -> Alignment:
    """Register a run's reference volume.

    Parameters
    ----------
    reference, brain
        The volume and its brain mask, (x, y, z).
    anatomy
        The subject's T1w; without it, the run is registered to the template's EPI, or to its T1w.
    template, work, where
        The template, a folder for transforms, and the scan, for messages.

    Raises
    ------
    InputError
        When the brain does not lie where the template's does afterwards.
    """
    moving = correct_bias(reference)
    rigid = None
    if anatomy is not None:
        inside = anatomy.brain.get_fdata(dtype=np.float32) > 0
        mask = nibabel.Nifti1Image(inside.astype(np.float32), anatomy.brain.affine)
        rigid = register_from_two(anatomy.brain, moving, work, "Rigid", mask)
        transforms = (*anatomy.to_template.forward, *rigid.forward)
    else:
        target, mask = template.image(_target(template)), template.image(template.mask)
        affine = register_from_two(target, moving, work, "Affine", mask)
        stripped = moving.get_fdata(dtype=np.float32) * brain
        moving = nibabel.Nifti1Image(stripped, reference.affine)
        scanned = _scanned(reference, target, affine.forward)
        transforms = register_nonlinear(target, moving, work, affine, scanned, stiff=True).forward
    overlap = _overlap(reference, brain, template, transforms)
    if not overlap >= MIN_OVERLAP:
        raise InputError(
            f"{where}: its brain overlaps with the template's by {overlap:.2f} (Dice) after the "
            f"registration, and at least {MIN_OVERLAP} is asked for; look at it: are its affine "
            "and the T1w's right, and is most of the brain in it?"
        )
    return Alignment(transforms, rigid, overlap)


def rigid_matrix(alignment: Alignment) -> list[list[float]] | None:
    """The (4, 4) matrix from mm of the T1w to mm of the run's reference."""
    if alignment.rigid is None:
        return None
    corners = np.concatenate([np.zeros((1, 3)), 100 * np.eye(3)])
    mapped = map_points(corners, alignment.rigid.forward)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = (mapped[1:] - mapped[0]).T / 100, mapped[0]
    return [[round(float(value), 6) for value in row] for row in matrix]


def _target(template: BrainTemplate) -> npt.NDArray[np.float32]:
    image = template.epi if template.epi is not None else template.t1w
    assert image is not None  # a template has one of the two
    return image


def _overlap(
    reference: nibabel.Nifti1Image,
    brain: npt.NDArray[np.bool_],
    template: BrainTemplate,
    transforms: tuple[str, ...],
) -> float:
    grid = template.image(template.mask)
    outline = nibabel.Nifti1Image(brain.astype(np.float32), reference.affine)
    found = warp(outline, grid, transforms).get_fdata() > 0.5
    seen = _scanned(reference, grid, transforms).get_fdata() > 0.5
    there = template.mask & seen
    total = found.sum() + there.sum()
    return float(2 * (found & there).sum() / total) if total else 0.0


def _scanned(
    reference: nibabel.Nifti1Image, grid: nibabel.Nifti1Image, transforms: tuple[str, ...]
) -> nibabel.Nifti1Image:
    """Where a run's field of view lies on a grid."""
    everywhere = np.ones(reference.shape, dtype=np.float32)
    return warp(nibabel.Nifti1Image(everywhere, reference.affine), grid, transforms)
