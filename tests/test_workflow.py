"""The whole workflow on a tiny dataset, by Snakemake: what runs, and what runs again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from workflows import announced_jobs, printed, run_snakemake

from neuromamba.demo import write_demo
from neuromamba.tables import read_table

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake", reason="the workflow extra is not installed")


def snakemake(
    folder: Path, root: Path, target: str, *options: str
) -> subprocess.CompletedProcess[str]:
    return run_snakemake(folder, root, "tiny.yaml", target, *options)


def planned_jobs(folder: Path, root: Path, *arguments: str) -> dict[str, int]:
    """How many jobs of each rule a dry run announces."""
    return announced_jobs(printed(snakemake(folder, root, "all", "--dry-run", *arguments)))


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which `snakemake all` has run, one of whose scans is damaged."""
    folder = tmp_path_factory.mktemp("workflow")
    shutil.copytree(root / "config", folder / "config")
    shutil.copy(root / "tests" / "tiny.yaml", folder / "tiny.yaml")
    shutil.copy(root / "tests" / "tiny-model.yaml", folder / "config" / "models" / "tiny.yaml")
    write_demo(folder / "data" / "tiny", subjects=16, volumes=24, voxel_size=8.0, seed=0)
    damaged = sorted((folder / "data" / "tiny").rglob("*_desc-preproc_bold.nii.gz"))[5]
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    done = snakemake(folder, root, "all")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_everything_is_made(folder: Path):
    results = folder / "results"
    assert "<html" in (results / "report" / "index.html").read_text()
    for target in ("sex", "age"):
        predictions = read_table(results / f"tiny/tiny/seed-0/evaluate/{target}/predictions.tsv")
        assert predictions["y_true"].notna().all()
        assert {"tiny", "fc"} < set(predictions["predictor"])
        metrics = read_table(results / f"tiny/tiny/seed-0/evaluate/{target}/metrics.tsv")
        assert set(metrics["predictor"]) == set(predictions["predictor"])
    assert not list(results.rglob(".tmp-*"))


def test_the_damaged_scan_is_left_out_with_a_reason_and_the_others_go_on(folder: Path):
    excluded = read_table(folder / "results" / "tiny" / "excluded.tsv")
    assert len(excluded) == 1
    assert "truncated" in excluded["reason"][0]
    split = read_table(folder / "results" / "tiny" / "splits" / "holdout.tsv")
    assert len(split) == 15
    assert excluded["run"][0].split("_")[0] not in set(split["subject"])


def test_predictions_are_for_test_subjects_only(folder: Path):
    root = folder / "results" / "tiny"
    split = read_table(root / "splits" / "holdout.tsv").set_index("subject")["part"]
    predictions = read_table(root / "tiny/seed-0/evaluate/sex/predictions.tsv")
    assert set(split[predictions["subject"].unique()]) == {"test"}


def test_a_second_run_does_nothing(folder: Path, root: Path):
    assert planned_jobs(folder, root) == {}


def test_a_changed_comment_reruns_nothing(folder: Path, root: Path):
    path = folder / "config" / "config.yaml"
    path.write_text("# another word\n" + path.read_text())
    assert planned_jobs(folder, root) == {}


BELOW_EVALUATE = {"evaluate_model": 2, "score_model": 1, "report": 1, "all": 1}
BELOW_FINETUNE = {"finetune_model": 2, **BELOW_EVALUATE}
QUALITY = {"list_excluded": 1, "overview_dataset": 1}
BELOW_TOKENS = {
    "qc_batch": 2,
    **QUALITY,
    "predict_baselines": 2,
    "pretrain_model": 1,
    **BELOW_FINETUNE,
}


@pytest.mark.parametrize(
    ("setting", "rules"),
    [
        ("evaluate={bootstrap: 60}", BELOW_EVALUATE),
        ("evaluate={inner_folds: 3}", {"predict_baselines": 2, **BELOW_EVALUATE}),
        ("qc={outlier: 5}", {"overview_dataset": 1, "report": 1, "all": 1}),
        ("finetune={learning_rate: 0.01}", BELOW_FINETUNE),
        ("pretrain={weight_decay: 0.1}", {"pretrain_model": 1, **BELOW_FINETUNE}),
        ("tokens={brain_fraction: 0.2}", {"tokens_batch": 2, **BELOW_TOKENS}),
        ("compute={max_excluded: 0.5, device: auto}", {}),
    ],
)
def test_a_changed_setting_reruns_its_stage_and_those_below(
    folder: Path, root: Path, setting: str, rules: dict[str, int]
):
    assert planned_jobs(folder, root, "--config", setting) == rules


def test_new_dates_and_no_history_rerun_nothing(folder: Path, root: Path):
    paths = [
        path for path in folder.rglob("*") if path.is_file() and ".snakemake" not in path.parts
    ]
    for number, path in enumerate(sorted(paths, reverse=True)):
        os.utime(path, (1e9 + number, 1e9 + number))
    assert planned_jobs(folder, root) == {}


def test_scans_that_are_elsewhere_rerun_nothing(folder: Path, root: Path):
    (folder / "data").rename(folder / "archive")
    planned = planned_jobs(folder, root)
    (folder / "archive").rename(folder / "data")
    assert planned == {}


def test_snakemakes_own_report_shows_the_results(folder: Path, root: Path):
    done = snakemake(folder, root, "all", "--report", "snakemake.html")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (folder / "snakemake.html").read_text()
    assert "System Message" not in page
    for text in ("fMRI runs were resampled", "sex (tiny)", "age (tiny)", "excluded.tsv"):
        assert text in page


def test_a_result_that_went_missing_is_made_again(folder: Path, root: Path):
    path = folder / "results/tiny/tiny/seed-0/evaluate/sex/metrics.tsv"
    path.rename(folder / "kept.tsv")
    planned = planned_jobs(folder, root)
    (folder / "kept.tsv").rename(path)
    # Made of the same it will be the same, so nothing below it has to run.
    assert planned == {"evaluate_model": 1, "all": 1}


def test_what_is_forced_takes_what_is_below_with_it(folder: Path, root: Path):
    assert planned_jobs(folder, root, "--forcerun", "tokens_batch") == {
        "tokens_batch": 2,
        **BELOW_TOKENS,
    }
    file = "results/tiny/tiny/seed-0/finetune/sex/model.json"
    assert planned_jobs(folder, root, "--forcerun", file) == {
        **BELOW_FINETUNE,
        "finetune_model": 1,
        "evaluate_model": 1,
    }
    assert planned_jobs(folder, root, "--forceall")["index_dataset"] == 1


def test_a_file_that_is_asked_for_by_its_name_is_made_with_what_it_needs(folder: Path, root: Path):
    file = "results/tiny/tiny/seed-0/pretrain/model.json"
    done = snakemake(folder, root, file, "--dry-run", "--config", "pretrain={weight_decay: 0.1}")
    assert done.returncode == 0, done.stderr
    assert "pretrain was" not in done.stdout
    assert "model.pretrain.weight_decay was 0.05, is 0.1" in done.stdout + done.stderr
    assert re.search(r"^total +1$", done.stdout + done.stderr, re.MULTILINE)


def add_subject(folder: Path, name: str, like: str) -> None:
    """Copy the scans of a subject under another name."""
    source = folder / "data" / "tiny" / like
    for path in sorted(source.rglob("*.*")):
        copy = source.with_name(name) / path.relative_to(source).with_name(
            path.name.replace(like, name)
        )
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def test_a_subject_that_is_added_is_processed_and_trains_nothing_until_told(
    folder: Path, root: Path
):
    weights = folder / "results/tiny/tiny/seed-0/pretrain/model.safetensors"
    before, store = weights.read_bytes(), folder / "results/tiny/tokens/sub-02_task-rest.zarr"
    made = store.stat().st_ino
    add_subject(folder, "sub-99", "sub-03")
    data_jobs = {
        "index_dataset": 1,
        "volumes_batch": 1,
        "tokens_batch": 1,
        "rois_batch": 1,
        "qc_batch": 1,
        **QUALITY,
    }
    reports = {"score_model": 1, "report": 1, "all": 1}
    assert planned_jobs(folder, root) == {**data_jobs, **reports}
    assert planned_jobs(folder, root, "--config", "evaluate={bootstrap: 60}") == {
        **data_jobs,
        **reports,
        "evaluate_model": 2,
    }
    done = snakemake(folder, root, "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert planned_jobs(folder, root) == {}
    assert (folder / "results/tiny/tokens/sub-99_task-rest.zarr").exists()
    assert store.stat().st_ino == made
    assert weights.read_bytes() == before
    told = snakemake(folder, root, "all", "--dry-run").stdout
    assert "no training uses the subjects that came after the split was made: sub-99" in told
    (folder / "results/tiny/splits/holdout.tsv").rename(folder / "old.tsv")
    assert planned_jobs(folder, root)["pretrain_model"] == 1
    (folder / "old.tsv").rename(folder / "results/tiny/splits/holdout.tsv")


def test_a_scan_that_is_replaced_is_processed_and_trains_anew(folder: Path, root: Path):
    split = read_table(folder / "results/tiny/splits/holdout.tsv")["subject"]
    used, unused = split[0], "sub-99"
    scans = {
        name: next((folder / "data/tiny" / name).rglob("*_desc-preproc_bold.nii.gz"))
        for name in (used, unused)
    }
    kept = {name: path.read_bytes() for name, path in scans.items()}
    scans[unused].write_bytes(kept[used])
    assert "pretrain_model" not in planned_jobs(folder, root)
    scans[unused].write_bytes(kept[unused])
    scans[used].write_bytes(kept[unused])
    assert planned_jobs(folder, root)["pretrain_model"] == 1
    scans[used].write_bytes(kept[used])
    assert planned_jobs(folder, root) == {}


def test_a_changed_fine_tuning_setting_is_carried_out(folder: Path, root: Path):
    """Runs for real: the checkpoints of the old setting must neither be used nor be in the way."""
    results = folder / "results" / "tiny" / "tiny" / "seed-0"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("pretrain/model.*")}
    text = (folder / "tiny.yaml").read_text()
    (folder / "tiny.yaml").write_text(text.replace("evaluation_windows: 2", "steps: 6"))
    done = snakemake(folder, root, "all")
    assert done.returncode == 0, done.stdout + done.stderr
    log = pd.read_json(results / "finetune" / "sex" / "metrics.jsonl", lines=True)
    assert log["step"].max() == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert planned_jobs(folder, root) == {}


def test_an_unknown_key_stops_before_any_job(folder: Path, root: Path):
    done = snakemake(folder, root, "all", "--dry-run", "--config", "volumes={voxelsize: 2}")
    assert done.returncode != 0
    assert "unknown key 'volumes.voxelsize'" in done.stdout + done.stderr
