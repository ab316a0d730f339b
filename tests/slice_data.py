"""Volumes of a small grid and autoencoders of their slices, for the tests of codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from fabricate import GRID, write_volumes

EDGE = GRID[0]
SIZES = {"channels": 4, "width": 8, "depth": 1, "steps": 4, "batch_size": 8}
SLICES = {"tokenizer": "slices", "slices": SIZES}


def brain() -> np.ndarray:
    """A mask, (z, y, x), that is another one along each axis and ends before the edges."""
    mask = np.zeros(GRID[::-1], dtype=bool)
    mask[2:9, 3:10, 1:11] = True
    mask[2, 3, 1:6] = False
    return mask


def write_run(path: Path, run: str, seed: int = 0, volumes: int = 20, level: float = 800) -> Path:
    """Write a run's volumes: anatomy, and noise of 1 % in time."""
    rng = np.random.default_rng(seed)
    anatomy = level + 200 * rng.standard_normal(GRID[::-1])
    bold = anatomy + 10 * rng.standard_normal((volumes, *GRID[::-1]))
    write_volumes(path, run, bold, brain())
    zarr.open_group(path).attrs.update({"n_voxels": int(brain().sum()), "n_volumes": volumes})
    return path


def save_dcae(folder: Path, channels: int = 4, blocks: int = 3) -> Any:
    """A DC-AE of diffusers with random weights, saved in its layout; slices of 12 become 3 x 3."""
    import torch
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    kinds = ["ResBlock"] * (blocks - 1) + ["EfficientViTBlock"]
    widths = [16] * (blocks - 1) + [32]
    model = AutoencoderDC(
        latent_channels=channels,
        attention_head_dim=16,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=[0] + [1] * (blocks - 1),
        decoder_layers_per_block=[0] + [1] * (blocks - 1),
        encoder_qkv_multiscales=[()] * blocks,
        decoder_qkv_multiscales=[()] * blocks,
    )
    model.save_pretrained(folder)
    return model.eval()
