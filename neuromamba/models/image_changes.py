"""What is done to images in training: random changes, and cubes that are hidden.

Everything random about a sample comes from a number of its own, so that it is the same whatever
other samples, chunks or processes there are.

How often and how strongly is ours, since the paper (see `cinp`) names Gaussian noise, flips, and
intensity scale and shift without numbers: noise, scale and shift each for half of the images; flips
from left to right only, because no scan shows a brain upside down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuromamba.config import ImageChanges

LEFT_RIGHT = -1
"""The axis of x in images (Z, Y, X)."""


@torch.no_grad()
def change_images(images_BZYX: Tensor, settings: ImageChanges, seeds: Sequence[int]) -> Tensor:
    """Randomly changed images in [0, 1], which keep 0 where there is no brain.

    Each is changed by the number of its own, from 0 to 2**32 - 1.
    """
    s = settings
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn_B7 = torch.stack([torch.rand(7, generator=one) for one in generators])
    noise_BZYX = torch.stack(
        [torch.randn(images_BZYX.shape[1:], generator=one) for one in generators]
    )
    # Whether each change happens, and how strong it is.
    happens_B4 = drawn_B7[:, :4] < torch.tensor([s.flip, s.share, s.share, s.share])
    strong_B3 = drawn_B7[:, 4:] * torch.tensor([2 * s.scale, 2 * s.shift, s.noise])
    strong_B3 = (strong_B3 - torch.tensor([s.scale, s.shift, 0.0])) * happens_B4[:, 1:]
    scale, shift, noise = strong_B3.to(images_BZYX)[..., None, None, None].unbind(1)
    flipped = happens_B4[:, 0].to(images_BZYX.device)[:, None, None, None]
    images_BZYX = torch.where(flipped, images_BZYX.flip(LEFT_RIGHT), images_BZYX)
    changed = images_BZYX * (1 + scale) + shift + noise * noise_BZYX.to(images_BZYX)
    return changed * (images_BZYX != 0)


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
