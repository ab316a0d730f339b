"""Snakemake and DVC on one working copy: both must agree on what is current, and be right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from neuromamba.config import load_config, merge
from neuromamba.demo import write_demo
from neuromamba.source_code import code_of
from neuromamba.stages import STAGES, Job, modules_of

pytestmark = pytest.mark.slow
pytest.importorskip("dvc", reason="the workflow extra is not installed")
pytest.importorskip("snakemake", reason="the workflow extra is not installed")

EVALUATE = ["evaluate@tiny-tiny-0", "report"]
FINETUNE = ["finetune@tiny-tiny-0", *EVALUATE]
CODE = ("config", "envs", "neuromamba", "workflow")


@dataclass(frozen=True)
class Repository:
    """A lab's clone of the project, whose run is the tiny one."""

    folder: Path

    def run(self, *command: str, succeeds: bool = True) -> str:
        """Run a program of this environment there, on the code that lies there; what it printed."""
        programs = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        text = done.stdout + done.stderr
        assert (done.returncode == 0) == succeeds, text
        return text

    def reproduce(self) -> list[str]:
        """The stages that `dvc repro` ran."""
        return re.findall(r"^Running stage '(.+)':$", self.run("dvc", "repro"), re.MULTILINE)

    def planned(self) -> dict[str, int]:
        """How many jobs of each rule Snakemake would run for `all`."""
        text = self.run("snakemake", "--dry-run", "all")
        if "Nothing to be done" in text:
            return {}
        table = text.split("Job stats:")[1].split("total")[0]
        found = dict(re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE))
        return {rule: int(n) for rule, n in found.items() if rule != "all"}

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    @property
    def confidence(self) -> float:
        """The coverage of the intervals that are on disk, told by their record."""
        path = self.folder / "results/tiny/tiny/seed-0/evaluate/sex/metrics.key.json"
        return float(json.loads(path.read_text())["settings"]["evaluate"]["confidence"])

    @property
    def metrics(self) -> dict[str, object]:
        path = self.folder / "results/scores/tiny/tiny/seed-0/metrics.json"
        return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def made(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """All is made by DVC, pushed and committed."""
    folder = tmp_path_factory.mktemp("lab") / "original"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in CODE:
        shutil.copytree(root / name, folder / name, ignore=ignored, symlinks=True)
    for name in ("dvc.yaml", "Snakefile", "profiles", "slurm", ".dvcignore", ".gitignore"):
        shutil.copy(root / name, folder / name, follow_symlinks=False)
    tiny = yaml.safe_load((root / "tests" / "tiny.yaml").read_text())
    dataset = tiny.pop("datasets")["tiny"]
    del dataset["targets"]["age"]
    (folder / "config" / "datasets" / "tiny.yaml").write_text(yaml.safe_dump(dataset))
    shutil.copy(root / "tests" / "tiny-model.yaml", folder / "config" / "models" / "tiny.yaml")
    base = yaml.safe_load((root / "config" / "config.yaml").read_text())
    config = merge(base, {**tiny, "datasets": ["tiny"]})
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    write_demo(folder / "data" / "tiny", subjects=16, volumes=24, voxel_size=8.0)
    lab = Repository(folder)
    lab.run("git", "init", "--quiet")
    lab.run("git", "config", "user.email", "student@lab.example")
    lab.run("git", "config", "user.name", "A student")
    lab.run("dvc", "init", "--quiet")
    lab.run("dvc", "config", "core.analytics", "false")
    lab.run("dvc", "remote", "add", "--default", "store", str(folder.with_name("store")))
    lab.run("dvc", "add", "--quiet", "data/tiny")
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
    assert lab.planned() == {"evaluate_model": 1, "score_model": 1, "report": 1}
    assert lab.reproduce() == EVALUATE
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


def test_dvc_watches_the_code_and_nothing_else_of_each_stage(root: Path):
    """`dvc.yaml` lists the modules that `source_code` finds, but for those of earlier stages."""
    text = (root / "dvc.yaml").read_text()
    config = load_config([root / "config" / "config.yaml", root / "config" / "demo.yaml"])
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
            parts = {"evaluate": ["evaluate", "scores"]}.get(stage, [stage])
            model = name if stage in ("pretrain", "finetune", "evaluate") else ""
            jobs = [Job(part, "demo", model=model) for part in parts]
            code = {
                re.sub(r"/models/\w+\.py", "/models", file)
                for job in jobs
                for file in code_of(*modules_of(config, job))
            }
            assert listed[stage] == code - earlier, stage
            earlier |= code
