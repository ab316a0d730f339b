"""What is done to images in training: random changes, and cubes that are hidden.

Everything random about a sample comes from a number of its own, so that it is the same whatever
other samples, chunks or processes there are.

The transforms are MONAI's. How often and how strongly is ours, since the paper (see `cinp`) names
Gaussian noise, flips, and intensity scale and shift without numbers: noise, scale and shift each
for half of the images; flips from left to right only, because no scan shows a brain upside down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuromamba.config import ImageChanges as Settings

LEFT_RIGHT = 2
"""The axis of x in images (Z, Y, X)."""


class ImageChanges:
    """Random changes of images (B, Z, Y, X) in [0, 1], which keep 0 where there is no brain.

    Parameters
    ----------
    settings : neuromamba.config.ImageChanges
    """

    def __init__(self, settings: Settings) -> None:
        # Loading it takes seconds, which only those who train such a model are to wait for.
        from monai.transforms.compose import Compose
        from monai.transforms.intensity.array import (
            RandGaussianNoise,
            RandScaleIntensity,
            RandShiftIntensity,
        )
        from monai.transforms.spatial.array import RandFlip

        s = settings
        self._flip = RandFlip(prob=s.flip, spatial_axis=LEFT_RIGHT)
        self._intensity = Compose(
            [
                RandScaleIntensity(factors=s.scale, prob=s.share),
                RandShiftIntensity(offsets=s.shift, prob=s.share),
                RandGaussianNoise(prob=s.share, std=s.noise),
            ]
        )

    @torch.no_grad()
    def __call__(self, images_BZYX: Tensor, seeds: Sequence[int]) -> Tensor:
        """Changed images; each by the number of its own, from 0 to 2**32 - 1."""
        changed = []
        for image_ZYX, seed in zip(images_BZYX, seeds, strict=True):
            self._flip.set_random_state(seed)
            self._intensity.set_random_state(seed)
            flipped = self._flip(image_ZYX[None])
            values = self._intensity(flipped) * (flipped != 0)
            # MONAI gives float32, in a tensor that remembers what was done to it.
            changed.append(values[0].as_subclass(Tensor).to(images_BZYX.dtype))
        return torch.stack(changed)


def hide_cubes(
    shape: tuple[int, int, int], edge: int, share: float, seeds: Sequence[int]
) -> Tensor:
    """Which voxels are hidden: `share` of the cubes of `edge` voxels, (B, Z, Y, X) bool on the CPU.

    Cubes at the end of an axis may be cut. One of them at least is hidden.
    """
    counts = [-(-size // edge) for size in shape]
    n = counts[0] * counts[1] * counts[2]
    masks = []
    for seed in seeds:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        hidden = torch.zeros(n, dtype=torch.bool)
        hidden[order[: max(1, round(share * n))]] = True
        cubes = hidden.view(counts[0], counts[1], counts[2])
        for axis in range(3):
            cubes = cubes.repeat_interleave(edge, axis)
        masks.append(cubes[: shape[0], : shape[1], : shape[2]])
    return torch.stack(masks)
