"""A lab's clone of the project, with the tiny dataset, under Git and DVC."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from neuromamba.config import merge
from neuromamba.demo import write_demo

CODE = ("config", "envs", "neuromamba", "workflow")


@dataclass(frozen=True)
class Repository:
    """A lab's clone of the project, whose run is the tiny one, and what it sets for programs."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *command: str, succeeds: bool = True) -> str:
        """Run a program of this environment there, on the code that lies there; what it printed."""
        programs = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "",  # as for most people: bytecode is no change of the code
            "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            **self.environment,
        }
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )
        text = done.stdout + done.stderr
        assert (done.returncode == 0) == succeeds, text
        return text

    def reproduce(self, *targets: str) -> list[str]:
        """The stages that `dvc repro` ran."""
        told = self.run("dvc", "repro", *targets)
        return re.findall(r"^Running stage '(.+)':$", told, re.MULTILINE)

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


def make_repository(root: Path, folder: Path) -> Repository:
    """Copy the project's files to `folder`, with scans for a run of one target."""
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
    lab.run("dvc", "add", "--quiet", "data/tiny")
    return lab
