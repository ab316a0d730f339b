"""Where in the brain the values lie that a model reads: its attributions as voxels or as regions.

What each of a model's inputs with a place holds, for each window of a batch:

    tokens     (patch, time patch, value), rows of all windows one after the other, with `centers`
    volumes    (time, x, y, z)
    rois       (time, region)

Maps of models that read regions are of regions, and are painted on the voxels of their atlas only
to be shown: regions are what such a model knows of space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from neuromamba.batches import Batch
from neuromamba.config import Tokens, Volumes
from neuromamba.files import InputError
from neuromamba.parcellation import Parcellation, resample_labels
from neuromamba.resample import target_affine

Floats = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Grid = tuple[int, ...]

PLACED = ("tokens", "volumes", "rois")
"""Inputs whose values have a place in the brain."""


class Masker(Protocol):
    """From values of one input to a map and back, as nilearn's maskers do it for images.

    Attributes
    ----------
    need
        The input.
    shape
        Of a map: (x, y, z), or (region,).
    affine
        (4, 4) voxels of a painted map to MNI mm.
    resolution_mm
        Edge of the finest thing that a map shows; `None` where that is a region.
    """

    need: str
    shape: Grid
    affine: npt.NDArray[np.float64]
    resolution_mm: float | None

    def collapse(self, values: torch.Tensor, batch: Batch) -> Floats:
        """Sums of an input's values over the volumes and windows of one run: of `shape`."""

    def paint(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A map as (x, y, z), 0 where it has no value."""

    def coarsen(self, values: Floats, brain: Mask) -> Floats:
        """A map with all that it can show and no more: the mean over `brain` of each patch."""

    def number_regions(self, atlas: Parcellation) -> npt.NDArray[np.int32]:
        """The number of the atlas region that each value of a map lies in, -1 outside: `shape`."""


class VolumeMasker:
    """Of a model that reads whole volumes."""

    need = "volumes"

    def __init__(self, volumes: Volumes) -> None:
        self.shape: Grid = volumes.shape
        self.affine = target_affine(volumes)
        self.resolution_mm: float | None = volumes.voxel_size

    def collapse(self, values: torch.Tensor, batch: Batch) -> Floats:
        if tuple(values.shape[2:]) != self.shape:
            raise InputError(
                f"the model reads volumes of {tuple(values.shape[2:])} voxels, and `volumes.shape` "
                f"is {self.shape}: no map can be made"
            )
        return values.sum((0, 1)).cpu().numpy()

    def paint(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values

    def coarsen(self, values: Floats, brain: Mask) -> Floats:
        return np.where(brain, values, 0)

    def number_regions(self, atlas: Parcellation) -> npt.NDArray[np.int32]:
        return resample_labels(atlas, self.shape, self.affine)


class TokenMasker(VolumeMasker):
    """Of a model that reads brain tokens; a voxel in no patch of a run is not read, and so 0."""

    need = "tokens"

    def __init__(self, volumes: Volumes, tokens: Tokens) -> None:
        super().__init__(volumes)
        self._patch = tokens.patch
        self._patches = tuple(edge // tokens.patch for edge in volumes.shape)
        self.resolution_mm = tokens.patch * volumes.voxel_size

    def collapse(self, values: torch.Tensor, batch: Batch) -> Floats:
        # The windows of a run have the same patches.
        count = int(batch["patches"][0])
        centers = batch["centers"][:count].cpu().numpy()
        numbers = np.minimum((centers * self._patches).astype(int), np.array(self._patches) - 1)
        summed = sum_over_time(values, len(batch["run"]), self._patch**3)
        return place_tokens(summed, numbers, self._patch, self._patches)

    def coarsen(self, values: Floats, brain: Mask) -> Floats:
        total, count = (self._of_patches(of) for of in (np.where(brain, values, 0), brain))
        mean = total / np.maximum(count, 1)
        return np.where(brain, np.kron(mean, np.ones((self._patch,) * 3)), 0)

    def _of_patches(self, values: npt.NDArray[Any]) -> Floats:
        """Sums over the voxels of each patch (x, y, z)."""
        x, y, z = self._patches
        blocks = values.reshape(x, self._patch, y, self._patch, z, self._patch)
        return blocks.sum((1, 3, 5), dtype=np.float64)


class RegionMasker:
    """Of a model that reads the series of an atlas' regions."""

    need = "rois"
    resolution_mm: float | None = None

    def __init__(self, atlas: Parcellation, volumes: Volumes) -> None:
        self.shape: Grid = (len(atlas.labels),)
        self.affine = target_affine(volumes)
        self.atlas = atlas
        self._number = resample_labels(atlas, volumes.shape, self.affine)

    def collapse(self, values: torch.Tensor, batch: Batch) -> Floats:
        if values.shape[2:] != self.shape:
            raise InputError(
                f"the model reads {values.shape[-1]} regions, and {self.atlas.name} has "
                f"{self.shape[0]}: give the dataset the `atlas` that the model was trained with"
            )
        return values.sum((0, 1)).cpu().numpy()

    def paint(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Each voxel has the value of its whole region."""
        painted = values[np.maximum(self._number, 0)]
        painted[self._number < 0] = 0
        return painted

    def coarsen(self, values: Floats, brain: Mask) -> Floats:
        return np.where(brain, values, 0)

    def number_regions(self, atlas: Parcellation) -> npt.NDArray[np.int32]:
        if atlas.key != self.atlas.key:
            raise ValueError(f"regions of {self.atlas.name} cannot be told by {atlas.name}")
        return np.arange(self.shape[0], dtype=np.int32)


def choose_masker(
    needs: Sequence[str], volumes: Volumes, tokens: Tokens, atlas: Parcellation | None
) -> Masker:
    """The masker of a model by its needs; `atlas` is that of the regions it reads, if it does.

    Raises
    ------
    InputError
        When the model reads nothing with a place in the brain, or several such things.
    """
    placed = [need for need in needs if need in PLACED]
    if len(placed) != 1:
        raise InputError(
            f"the model reads {', '.join(needs)}: a map in space takes a model that reads one of "
            f"{', '.join(PLACED)}"
        )
    if placed == ["tokens"]:
        return TokenMasker(volumes, tokens)
    if placed == ["volumes"]:
        return VolumeMasker(volumes)
    if atlas is None:
        raise InputError("the model reads regions, and no atlas is known that tells where they lie")
    return RegionMasker(atlas, volumes)


def sum_over_time(values: torch.Tensor, windows: int, voxels: int) -> Floats:
    """Sums over the volumes and the windows of one run: (token, voxel).

    `values` are (patch, time patch, value), with the windows one after the other and the voxels of
    a value fastest.
    """
    each = values.unflatten(0, (windows, -1)).unflatten(-1, (-1, voxels))
    return each.sum((0, 2, 3)).cpu().numpy()  # window, time patch, volume in it


def place_tokens(
    values: npt.NDArray[Any], grid_index: npt.NDArray[np.integer], patch: int, patch_grid: Grid
) -> npt.NDArray[Any]:
    """Put values of tokens back in space.

    Parameters
    ----------
    values
        (token, patch**3), x fastest.
    grid_index
        (token, 3) number of each token's patch along x, y, z.
    patch, patch_grid
        Edge of a patch in voxels, and patches along x, y, z.

    Returns
    -------
    (x, y, z)
        0 in patches that have no token.
    """
    blocks = np.zeros((*patch_grid, patch, patch, patch), dtype=values.dtype)
    x, y, z = grid_index.T
    blocks[x, y, z] = values.reshape(-1, patch, patch, patch).transpose(0, 3, 2, 1)
    shape = [count * patch for count in patch_grid]
    return blocks.transpose(0, 3, 1, 4, 2, 5).reshape(shape)
