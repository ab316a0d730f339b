"""The workflow with a model that brings T1w images and connectivity together, by Snakemake."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from workflows import announced_jobs, printed, run_snakemake

from neuromamba.demo import write_demo
from neuromamba.files import read_json
from neuromamba.tables import read_table

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake", reason="the workflow extra is not installed")

STEPS = {"steps": 2, "batch_size": 4, "validate_every": 2, "log_every": 1}
MODEL = {"family": "cinp", "width": 8, "feature_size": 12, "window": 2, "network_depth": 1}
MODEL |= {"network_hidden": 8, "clusters": 4, "mask_patch": 8, "pretrain": STEPS}
MODEL |= {"finetune": {"mode": "probe", "evaluation_windows": 1}}
SEX = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
RUN = {
    "datasets": {
        "toy": {
            "derivatives": "data/toy",
            "participants": {"file": "data/toy/participants.tsv"},
            "targets": {"sex": SEX},
        }
    },
    "models": {"m": MODEL, "contrast": {"ablation_of": "m", "mim": 0.0, "inm": 0.0}},
    "volumes": {"shape": [24, 24, 24], "voxel_size": 8.0, "shard_volumes": 20},
    "rois": {"cube": 48.0},
    "splits": {"test": 0.4, "validation": 0.2},
    "evaluate": {"baselines": ["fc"], "inner_folds": 2, "bootstrap": 50, "permutations": 50},
    "compute": {"device": "cpu"},
}


def planned_jobs(folder: Path, root: Path, *arguments: str) -> dict[str, int]:
    return announced_jobs(printed(run_snakemake(folder, root, "run.yaml", *arguments, "--dry-run")))


def test_images_are_made_for_it_and_it_is_trained_evaluated_and_retrieves(
    root: Path, tmp_path: Path
):
    shutil.copytree(root / "config", tmp_path / "config")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    write_demo(tmp_path / "data" / "toy", 12, volumes=30, voxel_size=8.0)
    planned = planned_jobs(tmp_path, root, "ablations")
    assert planned["anat_batch"] == planned["rois_batch"] == 1
    assert planned["pretrain_model"] == 2  # the ablation has a pretraining of its own
    printed(run_snakemake(tmp_path, root, "run.yaml", "all", "retrieve"))
    results = tmp_path / "results"
    assert read_table(results / "toy" / "anat" / "batch-0.tsv")["reason"].isna().all()
    metrics = read_table(results / "toy" / "m" / "seed-0" / "evaluate" / "sex" / "metrics.tsv")
    assert {"m", "fc", "majority"} <= set(metrics["predictor"])
    facts = read_json(results / "toy" / "m" / "seed-0" / "retrieve" / "retrieve.json")
    assert facts["n_pairs"] > 2
    # What has been made is not made again, and the report shows it.
    again = announced_jobs(
        printed(run_snakemake(tmp_path, root, "run.yaml", "all", "retrieve", "-n"))
    )
    assert set(again) <= {"report", "all", "retrieve"}
    printed(run_snakemake(tmp_path, root, "run.yaml", "report"))
    assert 'id="retrieval"' in (results / "report" / "index.html").read_text()
    # A new share of prompts is a matter of the retrieval alone.
    change = ("--config", "retrieve={share: 0.5}", "-n")
    changed = announced_jobs(
        printed(run_snakemake(tmp_path, root, "run.yaml", "retrieve", *change))
    )
    assert changed == {"retrieve_pairs": 1, "retrieve": 1}
