"""The workflow on a dataset of ROI series, by Snakemake: no job asks for images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from fake_series import DATASET, add_series, make_series, write_dataset
from workflows import announced_jobs, printed, run_snakemake

from neuromamba.files import read_json
from neuromamba.tables import read_table, write_table

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake", reason="the workflow extra is not installed")

STEPS = {"steps": 4, "batch_size": 2, "validate_every": 2, "log_every": 1}
MODEL = {
    **{"family": "lmae", "volumes": 20, "patch": 5, "width": 8, "depth": 1, "experts": 2},
    **{"neighbors": 3, "region_width": 8, "maps": 4, "head_dim": 8, "state": 4, "pretrain": STEPS},
    "finetune": STEPS | {"evaluation_windows": 1},
}
RUN = {
    "datasets": {"toy": DATASET},
    "models": {
        "m": MODEL,
        "untaught": {"ablation_of": "m", "base": "m", "finetune": {"start": "fresh"}},
        "plain": {"ablation_of": "m", "experts": 0, "predictor": "mean"},
    },
    "splits": {"test": 0.4, "validation": 0.2},
    "evaluate": {"baselines": ["fc"], "inner_folds": 2, "bootstrap": 50, "permutations": 50},
    "compute": {"device": "cpu"},
}


def snakemake(folder: Path, root: Path, *arguments: str) -> str:
    return printed(run_snakemake(folder, root, "run.yaml", *arguments))


def planned_jobs(folder: Path, root: Path, *targets: str) -> dict[str, int]:
    """How many jobs of each rule a dry run announces, but for the targets' own."""
    jobs = announced_jobs(snakemake(folder, root, *targets, "--dry-run"))
    return {rule: n for rule, n in jobs.items() if rule not in targets}


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
    of_images = ("volumes", "tokens", "qc", "anat")
    assert planned_jobs(folder, root, "baselines", *of_images) == {}
    assert set(planned_jobs(folder, root, "all")) == {
        "overview_dataset", "pretrain_model", "finetune_model", "evaluate_model", "score_model",
        "report",
    }  # fmt: skip


def test_a_table_that_is_added_is_read_and_the_baselines_stay(folder: Path, root: Path):
    add_series(folder / "data" / "toy", "sub-99_task-rest_seg-Toy", make_series(99))
    planned = planned_jobs(folder, root, "excluded", "baselines")
    assert planned == {"index_dataset": 1, "rois_batch": 1, "list_excluded": 1}


def test_repeats_that_are_added_leave_the_folds_that_there_are(root: Path, tmp_path: Path):
    shutil.copytree(root / "config", tmp_path / "config")
    write_dataset(tmp_path / "data" / "toy")
    splits = tmp_path / "results" / "toy" / "splits"
    table = tmp_path / "data" / "toy" / "participants.tsv"

    def split(repeats: int, *arguments: str) -> dict[str, str]:
        how = {"protocol": "k-fold", "folds": 2, "validation": 0.2, "repeats": repeats}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN | {"splits": how}))
        snakemake(tmp_path, root, "splits", *arguments)
        return {path.name: path.read_text() for path in sorted(splits.glob("fold-*.tsv"))}

    first = split(1)
    people = read_table(table)
    people.loc[:5, "sex"] = "F"
    people.loc[6:, "sex"] = "M"
    write_table(table, people)
    both = split(2)
    assert {name: both[name] for name in first} == first
    assert sorted(both) == ["fold-0.tsv", "fold-1.tsv", "fold-2.tsv", "fold-3.tsv"]
    # Who asks for it gets the split that these labels give.
    assert split(2, "--forcerun", "split_dataset") != both


def test_ablations_are_made_on_request_and_stand_in_one_table(folder: Path, root: Path):
    assert "compare_ablations" not in planned_jobs(folder, root, "all")
    snakemake(folder, root, "ablations")
    results = folder / "results" / "toy"
    board = read_table(results / "ablations" / "leaderboard.tsv")
    models = board[board["kind"] == "model"]
    assert {name.split(",")[0] for name in models["predictor"]} == {"m", "untaught", "plain"}
    assert set(board.loc[board["kind"] != "model", "predictor"]) >= {"FC baseline"}
    tuned = [
        read_json(results / name / "seed-0" / "finetune" / "sex" / "model.json")
        for name in ("m", "untaught")
    ]
    assert ["pretrained_from" in info for info in tuned] == [True, False]
    assert not (results / "untaught" / "seed-0" / "pretrain").exists()
    assert planned_jobs(folder, root, "ablations") == {}
    snakemake(folder, root, "all")
    page = (folder / "results" / "report" / "index.html").read_text()
    assert "untaught" in page
    assert planned_jobs(folder, root, "all") == {}
