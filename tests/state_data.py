"""For tests of states: small task runs in which two states light up different halves of the brain.

The stages up to tokens and ROI series are run on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from fabricate import GRID, REPETITION_TIME, ball, make_config, write_volumes

from neuromamba.config import Config
from neuromamba.layout import Layout
from neuromamba.rois import run_rois
from neuromamba.store import finish
from neuromamba.tables import write_table
from neuromamba.tokens import run_tokens

BLOCK = 12
"""Volumes of a block."""
BLOCKS = ("left", "rest", "right", "rest", "left", "right")
LAG = 4.0
CLASSES = {"left": "left", "right": "right"}
TARGET = {"kind": "state", "classes": CLASSES, "lag": LAG, "share": 0.75}
STEPS = {"steps": 4, "batch_size": 4, "validate_every": 2, "checkpoint_every": 4, "log_every": 2}
SIZE = {"width": 16, "depth": 1, "state": 4, "head_dim": 8, "volumes": 4, "normalization": "voxel"}


def state_config(folder: Path, finetune: dict[str, Any] | None = None, **changes: Any) -> Config:
    """A config of the dataset `toy` with the target `side`, a state, and no table of subjects."""
    model = {
        "family": "neuromamba",
        **SIZE,
        "pretrain": STEPS,
        "finetune": {**STEPS, "mode": "probe", "evaluation_windows": 4, **(finetune or {})},
    }
    dataset = {
        "participants": None,
        "targets": {"side": TARGET},
        "events": str(folder / "events"),
        **changes.pop("dataset", {}),
    }
    return make_config(
        folder,
        dataset=dataset,
        models={"small": model},
        compute={"device": "cpu"},
        **changes,
    )


def write_events(folder: Path, run: str, blocks: list[str]) -> Path:
    """The events of a run, block after block."""
    subject = run.split("_")[0]
    path = folder / "events" / subject / "func" / f"{run}_events.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    length = BLOCK * REPETITION_TIME
    rows = [(k * length, length, block) for k, block in enumerate(blocks)]
    write_table(path, pd.DataFrame(rows, columns=["onset", "duration", "trial_type"]))
    return path


def state_bold(blocks: list[str], strength: float, rng: np.random.Generator) -> np.ndarray:
    """Noise, and in each half of the brain what its state adds, after the lag."""
    times = len(blocks) * BLOCK
    seen = np.repeat(blocks, BLOCK)
    seen = np.r_[["rest"] * int(LAG / REPETITION_TIME), seen][:times]
    signal = rng.normal(size=(times, *GRID[::-1]))
    half = np.arange(GRID[0]) < GRID[0] / 2
    for name, where in (("left", half), ("right", ~half)):
        signal += strength * (seen == name)[:, None, None, None] * where
    return 1000 + 10 * signal


def make_state_data(config: Config, folder: Path, n: int, strength: float = 1.0) -> None:
    """Everything that the stages before the split leave, and the split: 3 test, 2 validate."""
    layout = Layout.of(config, "toy")
    rows = []
    for number in range(n):
        rng, subject = np.random.default_rng(number), f"sub-{number:03}"
        for repeat in range(1 + number % 2):
            run = f"{subject}_task-view_run-{repeat + 1}"
            blocks = list(rng.permutation(BLOCKS))
            write_events(folder, run, blocks)
            bold = state_bold(blocks, strength, rng)
            path, mask = layout.array("volumes", run), ball()
            write_volumes(path, run, bold, mask)
            inside = bold[:, mask]
            moments = {"global_mean": float(inside.mean()), "global_sd": float(inside.std())}
            finish(zarr.open_group(path), {"n_voxels": int(mask.sum()), **moments})
            facts = {"n_volumes": len(bold), "repetition_time": REPETITION_TIME, "reason": None}
            names = {"run": run, "subject": subject, "task": "view", "fingerprint": "same"}
            rows.append({**names, **facts})
    write_table(layout.index, pd.DataFrame(rows))
    made = pd.DataFrame({"run": [row["run"] for row in rows], "reason": None, "key": "made"})
    write_table(layout.manifest("volumes", 0), made)
    run_tokens(config, "toy", 0)
    run_rois(config, "toy", 0)
    names = [f"sub-{number:03}" for number in range(n)]
    parts = ["train"] * (n - 5) + ["validation"] * 2 + ["test"] * 3
    write_table(layout.split, pd.DataFrame({"subject": names, "part": parts}))
    write_table(layout.excluded, pd.DataFrame(columns=["run", "stage", "reason"]))


def shuffle_events(folder: Path, seed: int = 0) -> None:
    """Let the events say nothing of the runs: states change places at random."""
    rng = np.random.default_rng(seed)
    for path in sorted((folder / "events").rglob("*_events.tsv")):
        table = pd.read_csv(path, sep="\t")
        table["trial_type"] = rng.permutation(table["trial_type"])
        write_table(path, table)
