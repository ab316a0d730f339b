"""The workflow on a dataset of ROI series, by Snakemake: no job asks for images."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_series import DATASET, add_series, make_series, write_dataset

from neuromamba.tables import read_table

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake", reason="the workflow extra is not installed")

RUN = {
    "datasets": {"toy": DATASET},
    "models": {"m": {"family": "roi_transformer", "volumes": 20}},
    "splits": {"test": 0.4, "validation": 0.2},
    "evaluate": {"baselines": ["fc"], "inner_folds": 2},
    "compute": {"device": "cpu"},
}


def snakemake(folder: Path, root: Path, *arguments: str) -> str:
    """What Snakemake printed."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    command += ["--snakefile", str(root / "Snakefile"), "--directory", str(folder)]
    command += ["--cores", "2", "--configfile", "run.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned_jobs(folder: Path, root: Path, *targets: str) -> dict[str, int]:
    """How many jobs of each rule a dry run announces, but for the targets' own."""
    text = snakemake(folder, root, *targets, "--dry-run")
    if "Nothing to be done" in text:
        return {}
    table = text.split("Job stats:")[1].split("total")[0]
    found = re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)
    return {rule: int(n) for rule, n in found if rule not in targets}


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the series of twelve subjects, of whom all baselines are predicted."""
    folder = tmp_path_factory.mktemp("workflow")
    shutil.copytree(root / "config", folder / "config")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    write_dataset(folder / "data" / "toy")
    snakemake(folder, root, "baselines")
    return folder


def test_the_baselines_are_made_without_any_stage_of_images(folder: Path, root: Path):
    results = folder / "results" / "toy"
    predicted = read_table(results / "baselines" / "sex" / "predictions.tsv")
    assert set(predicted["predictor"]) == {"fc"}
    assert predicted["prob_male"].between(0, 1).all()
    assert len(read_table(results / "excluded.tsv")) == 0
    made = {path.name for path in results.iterdir() if path.is_dir()}
    assert made == {"index", "preprocess", "rois", "splits", "baselines"}
    of_images = ("volumes", "tokens", "qc", "overview", "anat")
    assert planned_jobs(folder, root, "baselines", *of_images) == {}
    assert set(planned_jobs(folder, root, "all")) == {
        "pretrain_model", "finetune_model", "evaluate_model", "score_model", "report"
    }  # fmt: skip


def test_a_table_that_is_added_is_read_and_the_baselines_stay(folder: Path, root: Path):
    add_series(folder / "data" / "toy", "sub-99_task-rest_seg-Toy", make_series(99))
    planned = planned_jobs(folder, root, "excluded", "baselines")
    assert planned == {"index_dataset": 1, "rois_batch": 1, "list_excluded": 1}
