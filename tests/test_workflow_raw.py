"""From raw BIDS by Snakemake: one job a subject, failures that stop nobody, and what runs again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import xarray
import yaml
from fake_heads import SIZE, SPACE, write_subject, write_template
from workflows import announced_jobs, printed, run_snakemake

from neuromamba.tables import read_table

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake", reason="the workflow extra is not installed")
pytest.importorskip("ants", reason="the ants extra is not installed")


def snakemake(folder: Path, root: Path, *options: str) -> str:
    return printed(run_snakemake(folder, root, "raw.yaml", "overview", "anat", *options))


def planned_jobs(folder: Path, root: Path, *options: str) -> dict[str, int]:
    jobs = announced_jobs(snakemake(folder, root, "--dry-run", *options))
    return {rule: n for rule, n in jobs.items() if "_" in rule}


def add_subject(raw: Path, name: str) -> Path:
    """Copy the first subject's scans under another name."""
    for path in sorted((raw / "sub-01").rglob("*.*")):
        copy = raw / name / path.relative_to(raw / "sub-01")
        copy = copy.with_name(path.name.replace("sub-01", name))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return raw / name


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which three raw subjects were processed, one with a damaged scan."""
    folder = tmp_path_factory.mktemp("raw")
    shutil.copytree(root / "config", folder / "config")
    shutil.copy(root / "tests" / "tiny-model.yaml", folder / "config" / "models" / "tiny.yaml")
    template = write_template(folder / "template")
    raw = folder / "data" / "raw"
    write_subject(raw, template)
    add_subject(raw, "sub-02")
    (damaged,) = add_subject(raw, "sub-03").rglob("*_bold.nii.gz")
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    settings = {
        "datasets": {"mine": {"bids": "data/raw", "space": SPACE}},
        "models": ["tiny"],
        "preprocess": {"threads": 1, "ants": {"template": template, "voxel_size": SIZE}},
        "volumes": {"shape": [24, 24, 24], "voxel_size": 8.0, "min_volumes": 8},
        "rois": {"cube": 48.0},
        "compute": {"max_excluded": 0.5, "device": "cpu"},
    }
    (folder / "raw.yaml").write_text(yaml.safe_dump(settings))
    snakemake(folder, root)
    return folder


def test_each_subject_gets_from_raw_scans_to_arrays_and_pages(folder: Path):
    results = folder / "results" / "mine"
    index = read_table(results / "index.tsv", dtype=str).set_index("run")
    assert index["bold"].dropna().str.startswith("results/mine/derivatives/sub-").all()
    assert list(index.index[index["reason"].isna()]) == ["sub-01_task-rest", "sub-02_task-rest"]
    for run in ("sub-01_task-rest", "sub-02_task-rest"):
        with xarray.open_zarr(results / "volumes" / f"{run}.zarr") as volumes:
            assert volumes.attrs["space"] == SPACE
        assert (results / "qc" / f"{run}.html").exists()
    with xarray.open_zarr(results / "anat" / "sub-02.zarr") as anat:
        assert anat["t1w"].shape == (24, 24, 24)
    how = read_table(results / "preprocess" / "subjects.tsv").set_index("subject")
    assert how["generated_by"].dropna().str.contains("ants engine").all()


def test_the_damaged_scan_stops_nobody_and_is_named_with_the_reason(folder: Path):
    excluded = read_table(folder / "results" / "mine" / "excluded.tsv").set_index("run")
    assert list(excluded.index) == ["sub-03_task-rest"]
    assert excluded.loc["sub-03_task-rest", "reason"].startswith("preprocessing: ")
    assert "truncated" in excluded.loc["sub-03_task-rest", "reason"]
    assert "sub-03_task-rest" in (folder / "results" / "mine" / "overview.html").read_text()


def test_nothing_runs_again_and_a_new_or_mended_subject_runs_alone(folder: Path, root: Path):
    assert planned_jobs(folder, root) == {}
    assert planned_jobs(folder, root, "--config", "preprocess={threads: 2}") == {}
    # The one that failed is tried again with more memory.
    more = planned_jobs(folder, root, "--config", "preprocess={memory_mb: 9000}")
    assert more["preprocess_subject"] == 1
    whole = (folder / "data/raw/sub-02/func/sub-02_task-rest_bold.nii.gz").read_bytes()
    damaged = folder / "data/raw/sub-03/func/sub-03_task-rest_bold.nii.gz"
    cut = damaged.read_bytes()
    damaged.write_bytes(whole)
    planned = planned_jobs(folder, root)
    damaged.write_bytes(cut)
    assert planned["preprocess_subject"] == 1
    assert planned["index_dataset"] == planned["volumes_batch"] == planned["qc_batch"] == 1
    add_subject(folder / "data" / "raw", "sub-04")
    assert planned_jobs(folder, root)["preprocess_subject"] == 1
    snakemake(folder, root)
    assert planned_jobs(folder, root) == {}
    assert (folder / "results/mine/tokens/sub-04_task-rest.zarr").exists()


def test_other_settings_of_the_engine_preprocess_everybody_again(folder: Path, root: Path):
    other = "preprocess={ants: {motion_parameters: 6}}"
    subjects = len(list((folder / "data" / "raw").glob("sub-*")))
    assert planned_jobs(folder, root, "--config", other)["preprocess_subject"] == subjects
