"""Small NIfTI scans for the tests of the data stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd

from neuromamba.config import Config
from neuromamba.files import digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.stage import batch_of
from neuromamba.tables import write_table

GRID = {"shape": [24, 24, 24], "voxel_size": 8.0, "min_volumes": 6, "shard_volumes": 8}
"""A coarse grid over the usual field of view."""


def affine_8mm() -> np.ndarray:
    """An 8 mm source grid that does not coincide with the target's."""
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = [-75, -110, -70]
    return affine


def series(shape: tuple[int, ...] = (20, 24, 21), n_volumes: int = 20, seed: int = 0) -> np.ndarray:
    """An (x, y, z, t) float32 series with anatomy (about 1000 +- 200) and noise in time."""
    random = np.random.default_rng(seed)
    anatomy = 1000 + 200 * random.standard_normal((*shape, 1))
    return (anatomy + 20 * random.standard_normal((*shape, n_volumes))).astype(np.float32)


def ball(shape: tuple[int, ...]) -> np.ndarray:
    """A brain-like mask: an (x, y, z) ball that leaves a margin."""
    index = np.indices(shape).astype(float)
    middle = (np.array(shape) - 1) / 2
    return sum(((index[i] - middle[i]) / (0.4 * shape[i])) ** 2 for i in range(3)) < 1


def write_scan(path: Path, data: np.ndarray, affine: np.ndarray, **header: Any) -> Path:
    """Write a NIfTI file with the data's own type; `header` sets fields such as `scl_slope`."""
    image = nibabel.Nifti1Image(data, affine, dtype=data.dtype)
    if "slope" in header:
        image.header.set_slope_inter(header["slope"], header.get("inter", 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def write_run(
    folder: Path, run: str, data: np.ndarray, mask: np.ndarray | None = None, affine: Any = None
) -> dict[str, Any]:
    """Write a run's BOLD and mask; return its row of the index."""
    affine = affine_8mm() if affine is None else affine
    mask = ball(data.shape[:3]) if mask is None else mask
    bold = write_scan(folder / f"{run}_desc-preproc_bold.nii.gz", data, affine)
    masked = write_scan(folder / f"{run}_desc-brain_mask.nii.gz", mask.astype(np.uint8), affine)
    return {
        "run": run,
        "subject": run.split("_")[0],
        "session": None,
        "task": "rest",
        "bold": str(bold),
        "mask": str(masked),
        "confounds": None,
        "fingerprint": digest_json([digest_file(bold), digest_file(masked)])[:16],
        "repetition_time": 2.0,
        "n_volumes": data.shape[-1],
        "reason": None,
    }


def make_config(folder: Path, **sections: Any) -> Config:
    """A config for the coarse grid whose results lie in `folder`; sections are merged into it."""
    settings: dict[str, Any] = {
        "results": str(folder / "results"),
        "datasets": {"toy": {"derivatives": str(folder)}},
        "models": {"tiny": {"family": "neuromamba", "volumes": 4}},
        "volumes": GRID,
        "tokens": {"patch": 4},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return Config.model_validate(settings)


def write_index(config: Config, rows: list[dict[str, Any]]) -> Layout:
    """Write the dataset's index and its parts; return its layout."""
    layout, batches = Layout.of(config, "toy"), config.compute.batches
    table = pd.DataFrame(rows)
    write_table(layout.index, table)
    batch = table["subject"].map(lambda subject: batch_of(subject, batches))
    for number in range(batches):
        write_table(layout.manifest("index", number), table[batch == number])
    return layout
