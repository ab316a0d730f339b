"""Registration and bias correction by ANTs, in RAS millimetres and with errors of our own.

Everything that needs the `ants` module is here, and it is imported at first use, because it is
optional and takes seconds to load.

Design choices
--------------
- One thread and a fixed seed: with more threads ITK adds in another order, and two runs differ.
- Affine before SyN, both by mutual information, down to voxels of 4 mm: 2 mm cost five times as
  much for SyN and hardly raise the correlation with the template.
- A T1w is first brought over as a head, which gives where the brain may be; then the rough brain
  alone (`neuromamba.skull_strip`), because the packaged template has no skull.
- A run is aligned within the brain's mask alone: between contrasts, the outlines otherwise decide
  (with them, alignments of one real run scattered by 3 mm, and without by 0.2 mm).
- A run is aligned from the scanner's coordinates and from the centres of mass, and what has the
  higher mutual information is kept: either start can be far off.

Sources: Avants et al., Medical Image Analysis 12 (2008) (SyN); Tustison et al., IEEE Trans. Med.
Imaging 29 (2010) (N4); ANTsPy, https://antspy.readthedocs.io.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba.files import InputError

SEED = 1
BIAS_MM = 6.0
"""Voxels on which the bias field is estimated: its knots lie 200 mm apart."""
BIAS = {"iters": [20, 15], "tol": 1e-4}
BIAS_SPLINE_MM = 200
AFFINE_MM = (12.0, 8.0, 4.0)
AFFINE_ITERATIONS = (200, 100, 50)
SYN_MM = 4.0
"""The finest voxels that SyN works on."""
SYN_ITERATIONS = (40, 20)
STIFF_SIGMA = 3
"""Voxels by which the whole field is smoothed, where it is to be stiff."""
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From nibabel's to ITK's world axes, and back."""
BINS = 32
"""Bins of a joint histogram."""


@dataclass(frozen=True)
class Transform:
    """How points of the fixed image go to the moving one, as files in the order of ANTs.

    `inverse` leads back; a `.mat` file in it is to be inverted.
    """

    forward: tuple[str, ...]
    inverse: tuple[str, ...]


def require_ants() -> ModuleType:
    """The `ants` module; `InputError` when it is not installed."""
    # Read by ITK when it first starts a thread.
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    try:
        import ants
    except ImportError as error:
        raise InputError(
            f"preprocess.engine: ants needs ANTsPy ({error}): pip install 'neuromamba[ants]', or "
            "choose the engine docker or apptainer (fMRIPrep)"
        ) from None
    return ants


def correct_bias(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
    """Divide by the smooth field that N4 finds in a coarse copy, above the mean intensity."""
    ants = require_ants()
    full = _to_ants(image)
    coarse = resample(image, BIAS_MM)
    data = coarse.get_fdata(dtype=np.float32)
    bright = data > data.mean()
    if not bright.any():
        raise InputError("the image is constant; replace it")
    mask = nibabel.Nifti1Image(bright.astype(np.float32), coarse.affine)
    field = ants.n4_bias_field_correction(
        _to_ants(coarse),
        mask=_to_ants(mask),
        shrink_factor=1,
        convergence=BIAS,
        spline_param=BIAS_SPLINE_MM,
        return_bias_field=True,
    )
    # The nearest value, not 0, beyond the centres of the coarse copy's border voxels.
    fine = ants.resample_image_to_target(field, full, interp_type="linear").numpy()
    known = fine > 0
    fine[~known] = np.median(fine[known]) if known.any() else 1
    corrected = image.get_fdata(dtype=np.float32) / fine
    return nibabel.Nifti1Image(corrected.astype(np.float32), image.affine)


def resample(image: nibabel.Nifti1Image, voxel_size: float) -> nibabel.Nifti1Image:
    """The image on isotropic voxels of `voxel_size` mm, linearly, over the same field of view."""
    ants = require_ants()
    spacing = (voxel_size,) * 3
    return _to_nibabel(ants.resample_image(_to_ants(image), spacing, False, 0))


def register_affine(
    fixed: nibabel.Nifti1Image,
    moving: nibabel.Nifti1Image,
    work: Path,
    initial: Transform | None = None,
    kind: str = "Affine",
    mask: nibabel.Nifti1Image | None = None,
) -> Transform:
    """Register by mutual information; `kind` is `Affine` or `Rigid`.

    It starts from `initial`, or from the centres of mass. With a mask, of the fixed image, only its
    voxels count, and all of them; without, a fifth of all voxels does.
    """
    voxel = float(nibabel.affines.voxel_sizes(fixed.affine).min())
    shrink = tuple(max(1, round(size / voxel)) for size in AFFINE_MM)
    options: dict[str, Any] = {
        "aff_iterations": AFFINE_ITERATIONS,
        "aff_shrink_factors": shrink,
        "aff_smoothing_sigmas": tuple(factor // 2 for factor in shrink),
    }
    if mask is not None:
        options |= {"mask": _to_ants(mask), "mask_all_stages": True}
        options["aff_random_sampling_rate"] = 1.0
    found = _register(fixed, moving, work, kind, initial, options)
    matrix = found["fwdtransforms"][0]
    return Transform((matrix,), (matrix,))


def register_from_two(
    fixed: nibabel.Nifti1Image,
    moving: nibabel.Nifti1Image,
    work: Path,
    kind: str,
    mask: nibabel.Nifti1Image,
) -> Transform:
    """As `register_affine`, from the world coordinates or from the centres of mass."""
    starts = [_identity(work), None]
    found = [register_affine(fixed, moving, work, start, kind, mask) for start in starts]
    shared = [mutual_information(fixed, warp(moving, fixed, t.forward)) for t in found]
    return found[int(np.argmax(shared))]


def register_nonlinear(
    fixed: nibabel.Nifti1Image,
    moving: nibabel.Nifti1Image,
    work: Path,
    initial: Transform,
    mask: nibabel.Nifti1Image | None = None,
    stiff: bool = False,
) -> Transform:
    """Register by SyN after an affine transform; the result contains it.

    What lies outside `mask`, of the fixed image, does not count. A `stiff` field is smoothed as a
    whole and not only in its steps: between contrasts, a free one follows them and not anatomy (on
    a synthetic head of known geometry it is off by 1.0 mm in the median, a stiff one by 0.4).
    """
    voxel = float(nibabel.affines.voxel_sizes(fixed.affine).min())
    # Each number is a resolution, the last one that of the voxels; without iterations it is free.
    finer = max(0, round(float(np.log2(SYN_MM / voxel))))
    options: dict[str, Any] = {"reg_iterations": (*SYN_ITERATIONS, *[0] * finer)}
    if stiff:
        options["total_sigma"] = STIFF_SIGMA
    if mask is not None:
        options["mask"] = _to_ants(mask)
    found = _register(fixed, moving, work, "SyNOnly", initial, options)
    return Transform(tuple(found["fwdtransforms"]), tuple(found["invtransforms"]))


def warp(
    moving: nibabel.Nifti1Image,
    grid: nibabel.Nifti1Image,
    transforms: Sequence[str],
    interpolator: str = "linear",
    inverse: bool = False,
) -> nibabel.Nifti1Image:
    """Resample `moving` on the grid of another image, through transforms that end at `moving`."""
    ants = require_ants()
    result = ants.apply_transforms(
        _to_ants(grid),
        _to_ants(moving),
        list(transforms),
        interpolator=interpolator,
        whichtoinvert=[inverse and name.endswith(".mat") for name in transforms],
    )
    return nibabel.Nifti1Image(result.numpy(), grid.affine)


def map_points(
    points: npt.NDArray[np.float64], transforms: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Points of the fixed image, (n, 3) RAS mm, in the moving one: where `warp` looks them up."""
    if not transforms:
        return points
    ants = require_ants()
    table = pd.DataFrame(points @ LPS[:3, :3], columns=["x", "y", "z"])
    mapped = ants.apply_transforms_to_points(3, table, list(transforms))
    return np.asarray(mapped[["x", "y", "z"]], dtype=np.float64) @ LPS[:3, :3]


def mutual_information(first: nibabel.Nifti1Image, second: nibabel.Nifti1Image) -> float:
    """Of two images on one grid, in nats, where the first is above 0."""
    a, b = first.get_fdata(dtype=np.float32), second.get_fdata(dtype=np.float32)
    counts, _, _ = np.histogram2d(a[a > 0], b[a > 0], BINS)
    joint = counts / counts.sum()
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log(joint[there] / apart[there])).sum())


def _register(
    fixed: nibabel.Nifti1Image,
    moving: nibabel.Nifti1Image,
    work: Path,
    kind: str,
    initial: Transform | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    ants = require_ants()
    try:
        return ants.registration(
            _to_ants(fixed),
            _to_ants(moving),
            kind,
            initial_transform=list(initial.forward) if initial else None,
            outprefix=f"{work}/{uuid.uuid4().hex[:8]}-",
            random_seed=SEED,
            **options,
        )
    except RuntimeError as error:
        raise InputError(f"registration failed in ANTs: {' '.join(str(error).split())}") from None


def _identity(work: Path) -> Transform:
    ants = require_ants()
    path = f"{work}/identity.mat"
    ants.write_transform(
        ants.create_ants_transform(transform_type="AffineTransform", dimension=3), path
    )
    return Transform((path,), (path,))


def _to_ants(image: nibabel.Nifti1Image) -> Any:
    affine = LPS @ image.affine
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return require_ants().from_numpy(
        image.get_fdata(dtype=np.float32),
        origin=tuple(affine[:3, 3].tolist()),
        spacing=tuple(spacing.tolist()),
        direction=affine[:3, :3] / spacing,
    )


def _to_nibabel(image: Any) -> nibabel.Nifti1Image:
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(image.direction) * np.asarray(image.spacing)
    affine[:3, 3] = image.origin
    return nibabel.Nifti1Image(image.numpy(), LPS @ affine)
