"""Our own autoencoder of slices: small, and for any grid that 3 divides.

Design choices, all ours
------------------------
- It downsamples by edge / 3, one prime factor after another, so that a slice of any edge becomes
  3 x 3 places, as DC-AE makes of 96 x 96.
- A code is the sum of a linear one and of what a convolutional network adds, which is nothing at
  first. The linear one begins as the lowest frequencies of the cosine transform of each of the
  3 x 3 blocks, scaled up with the frequency, so that channels are of like size. Training starts
  from a code that serves.
- Between the network's factors are residual blocks whose last layer starts at zero. Resolution goes
  down by laying the pixels of a block side by side and mixing them linearly, which loses nothing by
  itself, and up by the reverse.
- There are no norms: levels are what a code has to keep, and slices have one range.
- The loss is the mean squared error over all pixels, in units where the range is 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuromamba.config import Slices

PLACES = 3
WIDEST = 8
"""Times `width` that a layer has at most."""


def prime_factors(number: int) -> list[int]:
    """Prime factors, the smallest first; none of 1."""
    found, factor = [], 2
    while number > 1:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return found


def lowest_frequencies(edge: int, count: int) -> Tensor:
    """The orthonormal cosine basis of edge x edge pixels, lowest frequencies first.

    Returns
    -------
    Tensor
        (count, edge, edge) float32; zero where there are fewer than `count`.
    """
    pixel = torch.arange(edge, dtype=torch.float64)
    rows = torch.cos(math.pi * pixel[:, None] * (pixel + 0.5) / edge)
    rows /= rows.norm(dim=1, keepdim=True)
    order = radii(edge).flatten().argsort(stable=True)[:count]
    basis = torch.einsum("ir,jc->ijrc", rows, rows).reshape(-1, edge, edge)[order]
    return torch.cat([basis, basis.new_zeros(count - len(basis), edge, edge)]).float()


def radii(edge: int) -> Tensor:
    """(edge, edge) distance of each pair of frequencies from the lowest one, float64."""
    number = torch.arange(edge, dtype=torch.float64)
    return torch.hypot(number[:, None], number)


class Residual(nn.Module):
    """Two convolutions beside the identity, which they are at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x_bchw: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return x_bchw + self.last(F.silu(self.first(x_bchw)))


class SliceAutoencoder(nn.Module):
    """Encoder and decoder of slices.

    Parameters
    ----------
    settings
        Sizes.
    edge
        Pixels along each side of a slice, a multiple of 3.
    """

    def __init__(self, settings: Slices, edge: int) -> None:
        super().__init__()
        if edge % PLACES:
            raise ValueError(f"an edge of {edge} pixels is no multiple of {PLACES}")
        factors = prime_factors(edge // PLACES)
        widths = [settings.width * min(2**k, WIDEST) for k in range(len(factors))]
        sizes = [1, *widths]
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for factor, inner, outer in zip(factors, sizes[:-1], sizes[1:], strict=True):
            down += [nn.PixelUnshuffle(factor), nn.Conv2d(inner * factor**2, outer, 1)]
            down += [Residual(outer) for _ in range(settings.depth)]
            below = [Residual(outer) for _ in range(settings.depth)]
            spread = [nn.Conv2d(outer, inner * factor**2, 1), nn.PixelShuffle(factor)]
            up = [*below, *spread, *up]
        self.encoder = nn.Sequential(*down, nn.Conv2d(sizes[-1], settings.channels, 1))
        self.decoder = nn.Sequential(nn.Conv2d(settings.channels, sizes[-1], 1), *up)
        block = edge // PLACES
        self.linear = nn.Conv2d(1, settings.channels, block, stride=block)
        self.inverse = nn.ConvTranspose2d(settings.channels, 1, block, stride=block)
        self._start(settings.channels, block)

    @torch.no_grad()
    def _start(self, channels: int, block: int) -> None:
        """Begin as a cosine transform of blocks, to which the network adds nothing."""
        basis = lowest_frequencies(block, channels)[:, None]
        sizes = radii(block).flatten().sort().values[:channels].float()
        scale = torch.ones(channels)
        scale[: len(sizes)] = (1 + sizes) / block
        self.linear.weight.copy_(basis * scale[:, None, None, None])
        self.inverse.weight.copy_(basis / scale[:, None, None, None])
        last = [layer for layer in self.decoder if isinstance(layer, nn.Conv2d)][-1]
        for layer in (self.linear, self.inverse, self.encoder[-1], last):
            nn.init.zeros_(cast(Tensor, layer.bias))
        for layer in (self.encoder[-1], last):
            nn.init.zeros_(cast(Tensor, layer.weight))

    def encode(self, slices_bhw: Tensor) -> Tensor:
        """(B, edge, edge) in [-1, 1] -> codes (B, channels, 3, 3)."""
        images = slices_bhw[:, None]
        return self.linear(images) + self.encoder(images)

    def decode(self, codes_bchw: Tensor) -> Tensor:
        """(B, channels, 3, 3) -> (B, edge, edge)."""
        return (self.inverse(codes_bchw) + self.decoder(codes_bchw))[:, 0]

    def forward(self, slices_bhw: Tensor) -> Tensor:
        """(B, edge, edge) -> what its code keeps of it, (B, edge, edge)."""
        return self.decode(self.encode(slices_bhw))

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The mean squared error of `slices` (B, edge, edge), as `loss`."""
        slices_bhw = batch["slices"]
        again_bhw = self(slices_bhw)
        return {"loss": F.mse_loss(again_bhw.float(), slices_bhw)}
