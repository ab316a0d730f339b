"""The template that the `ants` engine brings brains to: images, grids and tissues.

Design choices
--------------
- Without files, the template is the ICBM 2009a symmetric one that nilearn packages, so nothing is
  downloaded. Its BIDS name is MNI152NLin2009aSym.
- Registration works on a 2 mm grid: what is finer costs much and changes the fit little.
- Tissues come from the template's probability maps, not from each subject's own image. White matter
  is where its probability exceeds 0.95, eroded by a voxel. CSF is what is neither grey nor white
  matter (probability above 0.9) at least 20 mm below the brain's surface: ventricles and deep
  cisterns, without the thin CSF of the sulci, which a 3 mm voxel shares with grey matter.

Source: Fonov et al., NeuroImage 54 (2011); https://nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import numpy.typing as npt
from scipy import ndimage

from neuromamba.config import Ants, Template
from neuromamba.files import InputError
from neuromamba.nifti import read_header, read_image
from neuromamba.resample import Affine, Shape

PACKAGED_SPACE = "MNI152NLin2009aSym"
WORKING_MM = 2.0
"""Voxel size for registration."""
FWHM = 2 * np.sqrt(2 * np.log(2))
"""Of a Gaussian, in SDs."""
WHITE_MATTER, CSF, CSF_DEPTH_MM = 0.95, 0.9, 20.0


@dataclass(frozen=True)
class Grid:
    """Voxels along x, y, z, and (4, 4) voxel indices to mm."""

    shape: Shape
    affine: Affine

    @property
    def n_voxels(self) -> int:
        return int(np.prod(self.shape))

    def points(self, voxels: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """Centres of voxels, numbered with x fastest: (voxel, 3) mm."""
        indices = np.stack(np.unravel_index(voxels, self.shape, order="F"), axis=1)
        return np.asarray(indices @ self.affine[:3, :3].T + self.affine[:3, 3])


@dataclass(frozen=True)
class BrainTemplate:
    """Images on the working grid, (x, y, z) float32 scaled to 1, brains only.

    `t1w` or `epi` may be missing; `tissues` has `white_matter` and `csf` as far as there are
    probability maps.
    """

    space: str
    name: str
    grid: Grid
    mask: npt.NDArray[np.bool_]
    t1w: npt.NDArray[np.float32] | None
    epi: npt.NDArray[np.float32] | None
    tissues: dict[str, npt.NDArray[np.bool_]]

    def image(self, data: npt.NDArray[Any]) -> nibabel.Nifti1Image:
        """Data of the working grid as an image."""
        return nibabel.Nifti1Image(data.astype(np.float32), self.grid.affine)

    def output_grid(self, voxel_size: float) -> Grid:
        """The template's field of view in voxels of `voxel_size` mm."""
        return _grid(self.grid, voxel_size)

    def on(self, grid: Grid, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """A mask of the working grid on another one: its nearest voxels."""
        return _sample(mask, self.grid.affine, grid, order=0) > 0.5


def load_template(settings: Ants, space: str) -> BrainTemplate:
    """The template that the settings name.

    Raises
    ------
    InputError
        When `space` is not the packaged template's, or a file is unusable.
    """
    chosen = settings.template
    if chosen is None and space != PACKAGED_SPACE:
        raise InputError(
            f"the ants engine's packaged template is {PACKAGED_SPACE}, and the dataset's space is "
            f"{space}: set space: {PACKAGED_SPACE} in the dataset YAML, or give the files of "
            f"{space} under preprocess.ants.template"
        )
    if chosen is None:
        images, name = _packaged(), "ICBM 2009a nonlinear symmetric, as packaged by nilearn"
    else:
        images, name = _read(chosen), f"{chosen.t1w or chosen.epi}"
    mask = images["mask"]
    finest = float(np.abs(nibabel.affines.voxel_sizes(mask.affine)).min())
    x, y, z = mask.shape
    grid = _grid(Grid((x, y, z), mask.affine), max(WORKING_MM, finest))
    on = {key: _sample(i.get_fdata(dtype=np.float32), i.affine, grid) for key, i in images.items()}
    brain = on["mask"] > 0.5
    if not brain.any():
        raise InputError(f"the template's brain mask ({name}) is empty; give another")
    return BrainTemplate(
        space=space,
        name=name,
        grid=grid,
        mask=brain,
        t1w=_scaled(on["t1w"], brain) if "t1w" in on else None,
        epi=_scaled(on["epi"], brain) if "epi" in on else None,
        tissues=_tissues(on.get("gray_matter"), on.get("white_matter"), brain, grid),
    )


def _packaged() -> dict[str, nibabel.Nifti1Image]:
    from nilearn import datasets

    return {
        "t1w": datasets.load_mni152_template(resolution=1),
        "mask": datasets.load_mni152_brain_mask(resolution=1),
        "gray_matter": datasets.load_mni152_gm_template(resolution=1),
        "white_matter": datasets.load_mni152_wm_template(resolution=1),
    }


def _read(template: Template) -> dict[str, nibabel.Nifti1Image]:
    if not (template.t1w or template.epi):
        raise InputError("preprocess.ants.template needs t1w or epi; name one of the files")
    images = {}
    for key, path in template.model_dump().items():
        if path is not None:
            header = read_header(Path(path))
            images[key] = nibabel.Nifti1Image(read_image(header), header.affine)
    return images


def _grid(source: Grid, voxel_size: float) -> Grid:
    """The field of view of `source` along x, y, z, from its lowest corner's centre."""
    ends = np.array(list(np.ndindex(2, 2, 2))) * (np.array(source.shape) - 1)
    corners = ends @ source.affine[:3, :3].T + source.affine[:3, 3]
    low, high = corners.min(axis=0), corners.max(axis=0)
    affine = np.diag([voxel_size] * 3 + [1.0])
    affine[:3, 3] = low
    x, y, z = (int(n) for n in np.floor((high - low) / voxel_size + 1e-6) + 1)
    return Grid((x, y, z), affine)


def _sample(
    data: npt.NDArray[Any], affine: Affine, grid: Grid, order: Literal[0, 1] = 1
) -> npt.NDArray[np.float32]:
    if order == 1:
        # As wide as the new voxels first, so that nothing finer than them is left to alias.
        ratio = grid.affine[0, 0] / nibabel.affines.voxel_sizes(affine)
        sigma = np.sqrt(np.maximum(ratio**2 - 1, 0)) / FWHM
        data = ndimage.gaussian_filter(data.astype(np.float32), tuple(sigma))
    linear = np.linalg.inv(affine) @ grid.affine
    return np.asarray(
        ndimage.affine_transform(
            data.astype(np.float32), linear[:3, :3], linear[:3, 3].tolist(), grid.shape, order=order
        )
    )


def _scaled(data: npt.NDArray[np.float32], brain: npt.NDArray[np.bool_]) -> Any:
    return np.where(brain, data / np.percentile(data[brain], 99), 0).astype(np.float32)


def _tissues(
    gray: npt.NDArray[np.float32] | None,
    white: npt.NDArray[np.float32] | None,
    brain: npt.NDArray[np.bool_],
    grid: Grid,
) -> dict[str, npt.NDArray[np.bool_]]:
    tissues = {}
    if white is not None:
        tissues["white_matter"] = ndimage.binary_erosion(brain & (white > WHITE_MATTER))
    if white is not None and gray is not None:
        depth = ndimage.distance_transform_edt(brain, sampling=grid.affine[0, 0])
        tissues["csf"] = brain & (1 - gray - white > CSF) & (depth > CSF_DEPTH_MM)
    return tissues
