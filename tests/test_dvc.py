"""Snakemake and DVC on one working copy: both must agree on what is current, and be right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from fake_series import DATASET, write_dataset
from repository import Repository, make_repository

from neuromamba.config import Series, Splits, load_config
from neuromamba.source_code import code_of
from neuromamba.stages import STAGES, Job, modules_of

pytestmark = pytest.mark.slow
pytest.importorskip("dvc", reason="the workflow extra is not installed")
pytest.importorskip("snakemake", reason="the workflow extra is not installed")

EVALUATE = ["evaluate@tiny-tiny-0", "report"]
FINETUNE = ["finetune@tiny-tiny-0", *EVALUATE]


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """All is made by DVC, pushed and committed."""
    lab = make_repository(root, tmp_path_factory.mktemp("lab") / "original")
    lab.run("dvc", "remote", "add", "--default", "store", str(lab.folder.with_name("store")))
    assert lab.reproduce()[-2:] == EVALUATE
    lab.run("dvc", "push")
    lab.commit("A")
    return lab


@pytest.fixture
def lab(made: Repository, tmp_path: Path) -> Repository:
    """Another clone, whose results were pulled."""
    made.run("git", "clone", "--quiet", str(made.folder), str(tmp_path / "clone"))
    clone = Repository(tmp_path / "clone")
    clone.run("git", "config", "user.email", "student@lab.example")
    clone.run("git", "config", "user.name", "Another student")
    clone.run("dvc", "pull")
    return clone


def test_after_a_pull_both_tools_have_nothing_to_do(lab: Repository):
    assert not (lab.folder / ".snakemake").exists()
    assert lab.planned() == {}
    assert lab.reproduce() == []
    assert lab.planned() == {}


def test_a_changed_comment_runs_nothing(lab: Repository):
    for file in ("config/config.yaml", "config/models/tiny.yaml", "config/datasets/tiny.yaml"):
        path = lab.folder / file
        path.write_text(f"# another word\n{path.read_text()}")
    assert lab.planned() == {}
    assert lab.reproduce() == []


@pytest.mark.parametrize(
    ("old", "new", "jobs", "stages"),
    [
        (
            "evaluation_windows: 2",
            "evaluation_windows: 3",
            {"finetune_model": 1, "evaluate_model": 1, "score_model": 1, "report": 1},
            FINETUNE,
        ),
    ],
)
def test_a_changed_key_runs_its_stage_and_those_below_under_either_tool(
    lab: Repository, old: str, new: str, jobs: dict[str, int], stages: list[str]
):
    lab.edit("config/config.yaml", old, new)
    assert lab.planned() == jobs
    assert lab.reproduce() == stages
    assert lab.planned() == {}
    assert lab.reproduce() == []


def test_a_changed_line_of_code_runs_its_stage_and_those_below_under_either_tool(lab: Repository):
    file = "neuromamba/baselines.py"
    lab.edit(file, "from __future__", "# because\nfrom __future__")
    assert lab.planned() == {}
    lab.edit(
        file, "from __future__ import annotations", "from __future__ import annotations\n\nX = 1"
    )
    below = {"evaluate_model": 1, "score_model": 1, "report": 1}
    assert lab.planned() == {"predict_baselines": 1, **below}
    assert lab.reproduce() == ["baselines@tiny", *EVALUATE]
    assert lab.planned() == {}


def test_results_are_those_of_the_settings_however_one_goes_back_and_forth(lab: Repository):
    """Where only dates and the last run count, this ends with A's results recorded as B's."""
    lab.edit("config/config.yaml", "confidence: 0.95", "confidence: 0.5")
    assert lab.reproduce() == EVALUATE
    assert lab.confidence == 0.5
    in_b = lab.metrics
    lab.commit("B")
    lab.run("git", "checkout", "--quiet", "HEAD~1")
    lab.run("dvc", "checkout")
    assert lab.confidence == 0.95
    assert lab.planned() == {}
    assert lab.metrics != in_b
    lab.edit("config/config.yaml", "confidence: 0.95", "confidence: 0.5")
    assert set(lab.planned()) == {"evaluate_model", "score_model", "report"}
    lab.run("snakemake", "all")
    assert (lab.confidence, lab.metrics) == (0.5, in_b)
    lab.edit("config/config.yaml", "confidence: 0.5", "confidence: 0.95")
    lab.reproduce()
    assert lab.confidence == 0.95
    lab.edit("config/config.yaml", "confidence: 0.95", "confidence: 0.5")
    lab.reproduce()
    assert (lab.confidence, lab.metrics) == (0.5, in_b)
    lab.run("git", "checkout", "--quiet", "--force", "HEAD@{1}")
    lab.run("dvc", "checkout")
    assert (lab.confidence, lab.metrics) == (0.5, in_b)
    assert lab.planned() == {}


def test_what_snakemake_made_is_recorded_by_one_command_and_nothing_unfinished(lab: Repository):
    lab.edit("config/config.yaml", "bootstrap: 50", "bootstrap: 60")
    before = (lab.folder / "dvc.lock").read_text()
    told = lab.run("neuromamba", "record", succeeds=False)
    assert "evaluate.bootstrap was 50, is 60" in told
    assert (lab.folder / "dvc.lock").read_text() == before
    lab.run("snakemake", "all")
    assert "up to date" in lab.run("neuromamba", "status")
    lab.run("neuromamba", "record")
    assert "bootstrap: 60" in (lab.folder / "dvc.lock").read_text()
    assert lab.reproduce() == []
    assert lab.planned() == {}


def test_dvc_compares_metrics_and_curves_and_runs_experiments(lab: Repository):
    lab.run("dvc", "exp", "run", "--set-param", "config/config.yaml:finetune.steps=6")
    (changes,) = json.loads(lab.run("dvc", "metrics", "diff", "--json")).values()
    assert changes
    page = lab.run("dvc", "plots", "diff", "--targets", "results/scores/tiny/tiny/seed-0/loss")
    assert "index.html" in page
    assert lab.planned() == {}


def test_a_dataset_of_series_has_empty_folders_where_others_have_images(root: Path, tmp_path: Path):
    """DVC has no conditions, so its stages of images are there for every dataset."""
    lab = make_repository(root, tmp_path / "lab")
    write_dataset(lab.folder / "data" / "toy")
    (lab.folder / "config" / "datasets" / "toy.yaml").write_text(yaml.safe_dump(DATASET))
    for key, new in (("datasets", "toy"), ("models", "lmae")):
        lab.edit("config/config.yaml", f"{key}:\n- tiny\n", f"{key}:\n- {new}\n")
    lab.run("dvc", "add", "--quiet", "data/toy")
    assert lab.reproduce("volumes@toy") == ["index@toy", "volumes@toy"]
    volumes = lab.folder / "results" / "toy" / "volumes"
    assert not list(volumes.iterdir())
    lab.commit("A")
    volumes.rmdir()
    lab.run("dvc", "checkout", "volumes@toy")
    assert volumes.is_dir()
    assert lab.reproduce("volumes@toy") == []


def test_dvc_watches_the_code_and_nothing_else_of_each_stage(root: Path):
    """`dvc.yaml` lists the modules that `source_code` finds, but for those of earlier stages."""
    text = (root / "dvc.yaml").read_text()
    config = load_config([root / "config" / "config.yaml", root / "config" / "demo.yaml"])
    folds = config.model_copy(update={"splits": Splits(protocol="k-fold")})
    demo = config.datasets["demo"].model_copy(update={"series": Series()})
    series = config.model_copy(update={"datasets": {"demo": demo}})
    (name,) = config.models
    listed = {
        name: set(re.findall(r"^ +- (neuromamba\S+)$", part, re.MULTILINE))
        for name, part in re.findall(
            r"^  (\w+):\n(.*?)(?=^  \w|\Z)", text, re.MULTILINE | re.DOTALL
        )
    }
    earlier: set[str] = set()
    for stage in STAGES:
        if stage in listed:
            parts = {
                "index": ["preprocess", "index"],
                # Made where the model reads them, like T1w images.
                "pretrain": ["tokenizer", "codes", "pretrain"],
                "evaluate": ["evaluate", "scores"],
            }.get(stage, [stage])
            models = ("pretrain", "finetune", "evaluate", "scores")
            jobs = [Job(part, "demo", model=name if part in models else "") for part in parts]
            code = {
                re.sub(r"/models/\w+\.py", "/models", file)
                for job in jobs
                for one in (config, folds, series)  # folds are pooled, series have stages of theirs
                for file in code_of(*modules_of(one, job))
            }
            assert listed[stage] == code - earlier, stage
            if stage != "overview":  # nothing else is made from it
                earlier |= code
