"""Fixtures that several test files share."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

# Tiny models gain nothing from more threads, and lose much where other work shares the cores.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole workflows come first, so that none is left over at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder of real scans; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("NEUROMAMBA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MANIFEST.tsv").exists():
        pytest.skip(f"no real scans at {folder} (set NEUROMAMBA_TEST_DATA to a folder of them)")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The training that nothing stops."""
    from fake_runs import train  # here, because most tests need none of what it loads

    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


@pytest.fixture(scope="module")
def forkserver(request: pytest.FixtureRequest):
    """Processes are forked from one that has loaded the module's `PRELOAD` and computed nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        multiprocessing.get_context("forkserver").set_forkserver_preload([request.module.PRELOAD])
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Three volumes a block, so that blocks and shards end in different places.
    monkeypatch.setattr("neuromamba.nifti.BLOCK_BYTES", 3 * 20 * 24 * 21 * 4)
