"""Tiny datasets of ROI series, named as BIDS-Derivatives has them, for several test files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

REGIONS = [f"region-{k}" for k in range(6)]
DATASET = {
    "derivatives": "data/toy",
    "series": {"segmentation": "Toy"},
    "participants": {"file": "data/toy/participants.tsv", "site_column": "site"},
    "targets": {
        "sex": {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}},
    },
}


def make_series(seed: int, volumes: int = 30, strength: float = 0.5) -> np.ndarray:
    """(time, region) float32 with something that all regions share."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(volumes, len(REGIONS))) + strength * rng.normal(size=(volumes, 1))
    return (1000 + 10 * values).astype(np.float32)


def add_series(
    root: Path,
    stem: str,
    values: np.ndarray,
    regions: Sequence[str] = REGIONS,
    sidecar: dict[str, Any] | None = None,
    end: str = "timeseries.tsv",
) -> Path:
    """Write a table and its sidecar (without one: 2 s); return the table's path."""
    folders = [part for part in stem.split("_") if part.startswith(("sub-", "ses-"))]
    folder = root.joinpath(*folders, "func")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}_{end}"
    text = pd.DataFrame(values, columns=list(regions)).to_csv(sep="\t", index=False, na_rep="n/a")
    if end.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    about = {"RepetitionTime": 2.0} if sidecar is None else sidecar
    (folder / f"{stem}_timeseries.json").write_text(json.dumps(about))
    return path


def write_dataset(root: Path, subjects: int = 12) -> None:
    """A run a subject, stronger shared signal in men, and the table of subjects with its motion."""
    people = pd.DataFrame({"participant_id": [f"sub-{k:02}" for k in range(subjects)]})
    people["sex"] = ["F", "M"] * (subjects // 2)
    people["site"] = ["north", "north", "south", "south"] * (subjects // 4)
    people["mean_fd"] = np.round(np.linspace(0.1, 0.3, subjects), 3)
    for k, (name, sex) in enumerate(people[["participant_id", "sex"]].itertuples(index=False)):
        values = make_series(k, strength=0.2 + (sex == "M"))
        add_series(root, f"{name}_task-rest_seg-Toy_stat-mean", values)
    people.to_csv(root / "participants.tsv", sep="\t", index=False)
