"""Fourier features of continuous coordinates.

Source: B. Mildenhall et al., "NeRF" (2020), arXiv 2003.08934, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fourier_features(coordinates: Tensor, bands: int) -> Tensor:
    """Coordinates, and their sine and cosine at the frequencies 2^0 .. 2^(bands - 1).

    Unlike NeRF the frequencies are not multiplied by pi. Our choice: on a grid of 16 patch centres
    (i + 0.5) / 16, ``sin(2^k pi x)`` and ``cos(2^k pi x)`` are the same for all i from k = 5 on, so
    that half of ten bands would carry nothing.

    Parameters
    ----------
    coordinates : Tensor, (..., axes)
        In [0, 1].
    bands : int

    Returns
    -------
    Tensor, (..., axes * (1 + 2 * bands))
        For four axes and ten bands, 84 features.
    """
    frequencies = 2.0 ** torch.arange(bands, device=coordinates.device, dtype=coordinates.dtype)
    angles = (coordinates[..., None] * frequencies).flatten(-2)
    return torch.cat([coordinates, angles.sin(), angles.cos()], dim=-1)
