"""For tests of finished models: one that was trained on fake runs, and shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_runs import FakeStore, make_config, write_dataset
from torch import nn

from neuromamba.export import run_export
from neuromamba.pretrain import run_pretrain


class Reader(nn.Module):
    """A family that reads `volumes` (window, time, x, y, z) or `rois` (window, time, region).

    Adds up the values of a window by weights (feature, time, ...), bent by `power`; a weight's time
    may be 1 for all.
    """

    def __init__(self, need: str, weight: torch.Tensor, power: int = 1) -> None:
        super().__init__()
        self.needs, self.power, self.width = (need,), power, len(weight)
        self.weight = nn.Parameter(weight)

    def embed(self, batch):
        values = batch[self.needs[0]][:, None] ** self.power
        return (values * self.weight).flatten(2).sum(2)


def use_fake_stores(patch: pytest.MonkeyPatch) -> None:
    """Let every stage that reads tokens read fake ones, of test subjects too."""
    for module in ("batches", "embed", "export"):
        patch.setattr(f"neuromamba.{module}.TokenStore", FakeStore)
    patch.setattr(FakeStore, "poisoned", set())
    patch.setattr(FakeStore, "short", set())


def make_models(folder: Path) -> None:
    """Pretrain the model `tiny` on the dataset `fake`, and export it to `folder/shared`."""
    with pytest.MonkeyPatch.context() as patch:
        use_fake_stores(patch)
        write_dataset(folder)
        run_pretrain(make_config(folder), "fake", "tiny", 0)
        run_export(make_config(folder), "fake", "tiny", 0, folder / "shared")
