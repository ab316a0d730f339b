"""Derivatives that are not named like fMRIPrep's, by the patterns of the shipped dataset files."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import yaml
from fake_bids import write_bold

from neuromamba.bids import index_runs
from neuromamba.config import Dataset


def shipped(root: Path, name: str, derivatives: Path) -> Dataset:
    """The dataset file as it is, on another folder."""
    raw = yaml.safe_load((root / "config" / "datasets" / f"{name}.yaml").read_text())
    return Dataset.model_validate({**raw, "derivatives": str(derivatives)})


def test_xcpd(root: Path, tmp_path: Path):
    version = "space-MNI152NLin2009cAsym_res-2"
    for subject in ("sub-01", "sub-02"):
        stem = f"{subject}_task-rest"
        func = tmp_path / "xcp_d" / subject / "func"
        bold = func / f"{stem}_{version}_desc-denoised_bold.nii.gz"
        write_bold(bold)
        write_bold(func / f"{stem}_{version}_desc-denoisedSmoothed_bold.nii.gz")
        write_bold(func / f"{stem}_{version}_stat-alff_boldmap.nii.gz", (4, 4, 4))
        (func / f"{stem}_motion.tsv").write_text("framewise_displacement\n0\n")
        sidecar = bold.with_name(bold.name.replace(".nii.gz", ".json"))
        sidecar.write_text(json.dumps({"RepetitionTime": 3}))
        masks = tmp_path / "fmriprep" / subject / "func"
        write_bold(masks / f"{stem}_{version}_desc-brain_mask.nii.gz", (4, 4, 4))
    table = index_runs(shipped(root, "xcpd", tmp_path / "xcp_d"))
    assert list(table["run"]) == ["sub-01_task-rest", "sub-02_task-rest"]
    assert table["reason"].isna().all()
    assert table["bold"].str.endswith("_desc-denoised_bold.nii.gz").all()
    assert table["confounds"].str.endswith("_motion.tsv").all()
    assert all(Path(path).exists() for path in table["mask"])
    assert list(table["repetition_time"]) == [3.0, 3.0]


def test_hcp(root: Path, tmp_path: Path):
    for subject in ("100307", "100408"):
        results = tmp_path / subject / "MNINonLinear" / "Results"
        for scan in ("rfMRI_REST1_LR", "rfMRI_REST2_RL"):
            write_bold(results / scan / f"{scan}_hp2000_clean.nii.gz")
            write_bold(results / scan / f"{scan}.nii.gz")
            write_bold(results / scan / "brainmask_fs.2.nii.gz", (4, 4, 4))
    table = index_runs(shipped(root, "hcp", tmp_path))
    assert list(table["run"]) == [
        f"sub-{subject}_task-{task}_dir-{direction}"
        for subject in ("100307", "100408")
        for task, direction in (("REST1", "LR"), ("REST2", "RL"))
    ]
    assert table["reason"].isna().all()
    assert table["confounds"].isna().all()
    assert list(table["repetition_time"].unique()) == [0.72]
    (tmp_path / "100307/MNINonLinear/Results/rfMRI_REST1_LR/brainmask_fs.2.nii.gz").unlink()
    table = index_runs(shipped(root, "hcp", tmp_path)).set_index("run")
    assert "no brain mask" in table.loc["sub-100307_task-REST1_dir-LR", "reason"]
    assert pd.isna(table.loc["sub-100307_task-REST2_dir-RL", "reason"])
