"""The pipeline as DVC stages: what `dvc repro` makes, and what it makes again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neuromamba.config import merge
from neuromamba.demo import write_demo

pytestmark = pytest.mark.slow
pytest.importorskip("dvc", reason="the workflow extra is not installed")

BELOW_FINETUNE = ["finetune@tiny-tiny-0", "evaluate@tiny-tiny-0"]


def run(folder: Path, *command: str) -> str:
    """Run a program of this environment in `folder`; what it printed."""
    programs = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([programs, os.environ["PATH"]])}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reproduce(folder: Path, *targets: str) -> list[str]:
    """The stages that `dvc repro` ran, but for the index, which it always runs."""
    told = run(folder, "dvc", "repro", *targets)
    stages = re.findall(r"^Running stage '(.+)':$", told, re.MULTILINE)
    return [stage for stage in stages if not stage.startswith("index@")]


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose run is the tiny one, reproduced once."""
    folder = tmp_path_factory.mktemp("dvc")
    for name in ("config", "neuromamba"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "dvc.yaml", folder)
    shutil.copytree(root / "workflow" / "forecast", folder / "workflow" / "forecast")
    tiny = yaml.safe_load((root / "tests" / "tiny.yaml").read_text())
    dataset = tiny.pop("datasets")["tiny"]
    (folder / "config" / "datasets" / "tiny.yaml").write_text(yaml.safe_dump(dataset))
    shutil.copy(root / "tests" / "tiny-model.yaml", folder / "config" / "models" / "tiny.yaml")
    base = yaml.safe_load((root / "config" / "config.yaml").read_text())
    config = merge(base, {**tiny, "datasets": ["tiny"]})
    (folder / "config" / "config.yaml").write_text(yaml.safe_dump(config))
    write_demo(folder / "data" / "tiny", subjects=16, volumes=24, voxel_size=8.0)
    run(folder, "git", "init", "--quiet")
    run(folder, "dvc", "init", "--quiet")
    assert reproduce(folder)[-2:] == BELOW_FINETUNE
    return folder


def test_a_second_reproduction_runs_no_stage(folder: Path):
    assert reproduce(folder) == []


def test_a_changed_setting_runs_its_stage_and_those_below(folder: Path):
    path = folder / "config" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["finetune"]["learning_rate"] = 0.01
    path.write_text(yaml.safe_dump(config))
    assert reproduce(folder) == BELOW_FINETUNE


def test_forecasts_are_made_when_they_are_asked_for(folder: Path):
    path = "workflow/forecast/dvc.yaml"
    assert reproduce(folder, path) == [f"{path}:forecast@tiny-tiny-0"]
    assert (folder / "results/tiny/tiny/seed-0/forecast/forecast.svg").exists()
    assert reproduce(folder, path) == []


def test_what_it_made_can_be_reported(folder: Path):
    run(folder, "neuromamba", "report")
    assert "<html" in (folder / "results" / "report" / "index.html").read_text()
