"""For tests of finished models: one that was trained on fake runs, and shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import FakeStore, make_config, write_dataset

from neuromamba.export import run_export
from neuromamba.pretrain import run_pretrain


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
