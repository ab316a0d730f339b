"""Our own autoencoder of slices: small, and for any grid that 3 divides.

Design choices, all ours
------------------------
- It downsamples by edge / 3, one prime factor after another, so that a slice of any edge becomes
  3 x 3 places, as DC-AE makes of 96 x 96.
- Between the factors are residual blocks whose last layer starts at zero. What is left then is a
  linear code of patches, from which training starts.
- Resolution goes down by laying the pixels of a block side by side and mixing them linearly, which
  loses nothing by itself, and up by the reverse.
- There are no norms: levels are what a code has to keep, and slices have one range.
- The loss is the mean squared error over all pixels, in units where the range is 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

    def encode(self, slices_bhw: Tensor) -> Tensor:
        """(B, edge, edge) in [-1, 1] -> codes (B, channels, 3, 3)."""
        return self.encoder(slices_bhw[:, None])

    def decode(self, codes_bchw: Tensor) -> Tensor:
        """(B, channels, 3, 3) -> (B, edge, edge)."""
        return self.decoder(codes_bchw)[:, 0]

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The mean squared error of `slices` (B, edge, edge), as `loss`."""
        slices_bhw = batch["slices"]
        again_bhw = self.decode(self.encode(slices_bhw))
        return {"loss": F.mse_loss(again_bhw.float(), slices_bhw)}
