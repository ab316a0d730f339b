"""For tests of models of codes: small stores of them, in which sex shows in how codes change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

from neuromamba.config import Config
from neuromamba.layout import Layout
from neuromamba.shards import ShardWriter
from neuromamba.store import CHUNK_KEYS, finish, new_store
from neuromamba.tables import write_table

TRAIN, VALIDATION, TEST = 24, 8, 12
TOKENS, WIDTH = 27, 12
MADE_BY = {"kind": "slices", "sha256": "c" * 64, "revision": None, "channels": 4}


FACTS = {
    "n_tokens": TOKENS,
    "code_width": WIDTH,
    "voxel_size": 4.0,
    "normalization": "maximum",
    "tokenizer": {name: MADE_BY[name] for name in ("kind", "sha256", "channels")},
}


def write_store(
    path: Path,
    codes: np.ndarray,
    seconds: float = 2.0,
    normalization: str = "maximum",
    **made_by: Any,
) -> None:
    """A store of codes (time, token, value), in shards of 16 volumes."""
    attributes = {
        "run": path.stem,
        "repetition_time": seconds,
        "key": path.stem,
        "volumes_key": path.stem,
        "n_volumes": len(codes),
        "n_tokens": codes.shape[1],
        "code_width": codes.shape[2],
        "affine": np.diag([-4.0, 4.0, 4.0, 1.0]).tolist(),
        "normalization": normalization,
        "tokenizer": {**MADE_BY, **made_by},
    }
    with new_store(path, attributes["key"]) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        group.create_array(
            "values",
            shape=codes.shape,
            chunks=(1, *codes.shape[1:]),
            shards=(16, *codes.shape[1:]),
            dtype="float16",
            compressors=None,
            chunk_key_encoding=CHUNK_KEYS,
            dimension_names=["time", "token", "value"],
        )
        with ShardWriter(temporary / "values") as writer:
            for volume in codes.astype(np.float16):
                writer.append(volume[None])
        finish(group, attributes)


def make_config(folder: Path, **model: object) -> Config:
    """A config of a dataset with a small model of codes."""
    steps = {"batch_size": 8, "validate_every": 20, "checkpoint_every": 20, "log_every": 10}
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    small = {"width": 16, "depth": 2, "heads": 4, "groups": 2, "hidden": 32, "volumes": 6}
    small |= {"position": "grid"}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {
                "fake": {
                    "derivatives": str(folder / "nowhere"),
                    "participants": {"file": str(folder / "participants.tsv")},
                    "targets": {"sex": sex},
                }
            },
            "models": {
                "codes": {
                    "family": "tablet",
                    **small,
                    "pretrain": {"steps": 80, "learning_rate": 1e-2, **steps},
                    "finetune": {
                        "steps": 140,
                        "learning_rate": 5e-3,
                        "evaluation_windows": 3,
                        **steps,
                    },
                    **model,
                }
            },
            "codes": {"tokenizer": "slices"},
            "volumes": {"shape": [48, 48, 48], "voxel_size": 4.0},
            "compute": {"device": "cpu"},
        }
    )


def make_codes(number: int, volumes: int = 40) -> np.ndarray:
    """Codes of subject `number`: in men (even) the tokens of one half go together in time."""
    rng = np.random.default_rng(number)
    fixed = np.random.default_rng(0)
    codes, direction = 2 * fixed.normal(size=(1, TOKENS, WIDTH)), fixed.normal(size=WIDTH)
    codes = codes + 0.3 * rng.normal(size=(volumes, TOKENS, WIDTH))
    if number % 2 == 0:
        codes[:, : TOKENS // 2] += 1.5 * rng.normal(size=(volumes, 1, 1)) * direction
    return codes


def write_dataset(folder: Path) -> None:
    """Codes, tables and a split."""
    layout = Layout(folder / "results", "fake")
    names = [f"sub-{number:02d}" for number in range(1, TRAIN + VALIDATION + TEST + 1)]
    runs = [f"{name}_task-rest" for name in names]
    for number, run in enumerate(runs, start=1):
        write_store(layout.array("codes", run), make_codes(number))
    sexes = ["F" if number % 2 else "M" for number in range(1, len(names) + 1)]
    table = pd.DataFrame({"run": runs, "reason": None, "key": runs})
    write_table(layout.index, table.assign(subject=names, repetition_time=2.0))
    write_table(layout.manifest("codes", 0), table)
    people = pd.DataFrame({"participant_id": names, "sex": sexes})
    write_table(folder / "participants.tsv", people)
    part = ["train"] * TRAIN + ["validation"] * VALIDATION + ["test"] * TEST
    write_table(layout.split, pd.DataFrame({"subject": names, "part": part}))
