"""Tables of confounds as fMRIPrep writes them, and what nilearn makes of them, for the tests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nilearn.interfaces.fmriprep import load_confounds
from nilearn.signal import clean

from neuromamba.config import Denoise
from neuromamba.nifti import Header
from neuromamba.tables import write_table

REPETITION_TIME = 2.0
MOTION = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]


def make_table(n_volumes: int, seed: int = 7) -> pd.DataFrame:
    """Motion, tissue signals, CompCor, cosines, FD and DVARS; still, but for what a test adds."""
    random = np.random.default_rng(seed)
    table = pd.DataFrame()
    for name in [*MOTION, "csf", "white_matter", "global_signal"]:
        values = random.standard_normal(n_volumes).cumsum()
        derivative = np.diff(values, prepend=np.nan)
        table[name], table[f"{name}_derivative1"] = values, derivative
        table[f"{name}_power2"], table[f"{name}_derivative1_power2"] = values**2, derivative**2
    for number in range(3):
        table[f"a_comp_cor_{number:02}"] = random.standard_normal(n_volumes)
        phase = np.pi * (number + 1) * (np.arange(n_volumes) + 0.5) / n_volumes
        table[f"cosine{number:02}"] = np.cos(phase)
    table["framewise_displacement"] = random.uniform(0.05, 0.2, n_volumes)
    table["std_dvars"] = random.uniform(0.9, 1.2, n_volumes)
    table.loc[0, ["framewise_displacement", "std_dvars"]] = np.nan
    return table


def write_confounds(folder: Path, table: pd.DataFrame) -> Path:
    """Write a table and its sidecar as nilearn looks for them; return the table's path."""
    path = folder / "sub-01_desc-confounds_timeseries.tsv"
    folder.mkdir(parents=True, exist_ok=True)
    write_table(path, table)
    masks = ["combined", "combined", "CSF"]
    sidecar = {f"a_comp_cor_{k:02}": {"Mask": mask} for k, mask in enumerate(masks)}
    path.with_suffix(".json").write_text(json.dumps(sidecar))
    return path


def mark_moving(table: pd.DataFrame, volumes: Sequence[int]) -> None:
    """Make volumes move by 2 mm."""
    table.loc[list(volumes), "framewise_displacement"] = 2.0


def mark_unsteady(table: pd.DataFrame, n_volumes: int) -> None:
    """Make the first volumes non-steady-state ones."""
    for k in range(n_volumes):
        table[f"non_steady_state_outlier{k:02}"] = (np.arange(len(table)) == k).astype(int)


def header_of(n_volumes: int) -> Header:
    """The header of a scan that is not there."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    where = Path("sub-01_bold.nii.gz")
    return Header(where, (4, 4, 4), n_volumes, True, affine, np.dtype("<f4"), 1.0, 0.0, 352)


def by_nilearn(series: np.ndarray, path: Path | None, denoise: Denoise) -> np.ndarray:
    """The series (volume, voxel) as nilearn cleans it, as a whole."""
    strategy = [part for part in denoise.strategy if part != "non_steady_state"]
    confounds, kept = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path is not None and denoise.strategy:
            options: dict[str, Any] = denoise.model_dump(
                include={"motion", "scrub", "fd_threshold", "std_dvars_threshold", "wm_csf"}
            )
            image = path.with_name("sub-01_desc-preproc_bold.nii.gz")
            confounds, kept = load_confounds(str(image), strategy, demean=False, **options)
            if confounds is not None and confounds.empty:
                confounds = None
        filters = denoise.low_pass or denoise.high_pass
        return np.asarray(
            clean(
                series.astype(np.float64),
                detrend=denoise.detrend,
                standardize=None,
                sample_mask=kept,
                confounds=confounds,
                filter="butterworth" if filters else False,
                low_pass=denoise.low_pass,
                high_pass=denoise.high_pass,
                t_r=REPETITION_TIME,
            )
        )
