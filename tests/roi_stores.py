"""For tests of models of ROI series: small stores of them, in which sex and age show."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import xarray
import zarr

from neuromamba.config import Config
from neuromamba.files import digest_file
from neuromamba.layout import Layout
from neuromamba.store import finish, new_store
from neuromamba.tables import write_table

N_ROIS, TRAIN, VALIDATION, TEST = 12, 24, 6, 10


def write_store(
    path: Path, series: np.ndarray, seconds: float = 2.0, atlas: str = "a" * 64
) -> None:
    """A store of ROI series (time, roi); a ROI of NaN is missing."""
    missing = int(np.isnan(series[0]).sum())
    attributes = {
        "run": path.stem,
        "atlas": "twelve",
        "atlas_sha256": atlas,
        "repetition_time": seconds,
        "connectivity": ["pearson"],
        "n_rois": series.shape[1] - missing,
        "n_missing": missing,
        "key": f"{path.stem} {atlas}",
    }
    data = xarray.Dataset({"timeseries": (("time", "roi"), series.astype(np.float32))})
    with new_store(path, attributes["key"]) as temporary:
        data.to_zarr(temporary, zarr_format=3, consolidated=False)
        finish(zarr.open_group(temporary), attributes)


def make_atlas() -> nibabel.Nifti1Image:
    """Twelve regions side by side in a box of MNI space."""
    labels = np.zeros((48, 48, 48), np.int16)
    labels[12:36, 12:36, 12:36] = 1 + np.arange(24)[:, None, None] // 2
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = -96
    return nibabel.Nifti1Image(labels, affine)


def make_config(folder: Path, **model: object) -> Config:
    """A config of a dataset of series with a small model of them, `lmae` if not said otherwise."""
    steps = {"batch_size": 8, "validate_every": 20, "checkpoint_every": 20, "log_every": 10}
    small = {"family": "lmae", "volumes": 40, "patch": 5, "width": 16, "depth": 1}
    own = {"neighbors": 4, "experts": 2, "head_dim": 8, "state": 8, "region_width": 16, "maps": 16}
    if model.get("family", "lmae") != "lmae":
        own = {"heads": 2}
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {
                "fake": {
                    "derivatives": str(folder / "nowhere"),
                    "atlas": str(folder / "atlas.nii.gz"),
                    "participants": {"file": str(folder / "participants.tsv")},
                    "targets": {"sex": sex, "age": {"kind": "regression", "column": "age"}},
                }
            },
            "models": {
                "series": {
                    **small,
                    **own,
                    "pretrain": {"steps": 20, **steps},
                    "finetune": {
                        "steps": 60,
                        "learning_rate": 5e-3,
                        "evaluation_windows": 2,
                        **steps,
                    },
                    **model,
                }
            },
            "volumes": {"shape": [48, 48, 48], "voxel_size": 4.0},
            "compute": {"device": "cpu"},
        }
    )


def write_dataset(folder: Path) -> None:
    """Series, tables and a split: in men one half of the ROIs goes slowly together."""
    nibabel.save(make_atlas(), folder / "atlas.nii.gz")
    atlas = digest_file(folder / "atlas.nii.gz")
    layout = Layout(folder / "results", "fake")
    names = [f"sub-{number:02d}" for number in range(1, TRAIN + VALIDATION + TEST + 1)]
    runs = [f"{name}_task-rest" for name in names]
    people = []
    for number, (name, run) in enumerate(zip(names, runs, strict=True), start=1):
        rng = np.random.default_rng(number)
        male, age = number % 2 == 0, float(rng.uniform(20, 60))
        series = rng.normal(size=(70, N_ROIS))
        slow = np.convolve(rng.normal(size=75), np.ones(6), "valid")
        series[:, : N_ROIS // 2] += slow[:, None] if male else 0.0
        write_store(layout.array("rois", run), 100 + 5 * series, atlas=atlas)
        people.append((name, "M" if male else "F", age))
    table = pd.DataFrame({"run": runs, "reason": None, "key": runs})
    write_table(layout.index, table.assign(subject=names, repetition_time=2.0))
    write_table(layout.manifest("rois", 0), table)
    columns = ["participant_id", "sex", "age"]
    write_table(folder / "participants.tsv", pd.DataFrame(people, columns=columns))
    part = ["train"] * TRAIN + ["validation"] * VALIDATION + ["test"] * TEST
    write_table(layout.split, pd.DataFrame({"subject": names, "part": part}))
