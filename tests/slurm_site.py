"""A working folder on a made-up SLURM cluster, and what its jobs were given."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from slurm_cluster import Cluster, ask, wait_for

from neuromamba.checkpoint import list_checkpoints
from neuromamba.demo import write_demo

# Snakemake, but that it looks every second what became of its jobs: the plugin waits longer each
# time, which would make most of the time of these tests.
SNAKEMAKE = """
import asyncio, signal
from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

# What is started in the background of a script ignores it.
signal.signal(signal.SIGINT, signal.default_int_handler)
Executor.sleep = lambda self: asyncio.sleep(1)
main()
"""
# Every bash reads this before anything else, so each job's shell tells what it was given. With the
# threads that the profile asks for, tiny models on busy cores are ten times slower than with one.
HOOK = """
case "${BASH_EXECUTION_STRING-}" in *neuromamba*)
    told="$SLURM_JOB_ID\t$SLURMD_NODENAME\t${CUDA_VISIBLE_DEVICES-none}"
    stage=${BASH_EXECUTION_STRING#*neuromamba }
    export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
    printf '%s\t%s\n' "$told" "${stage%% *}" >> told.tsv
    case "$stage" in "tokens "*"--batch 1"*) if mkdir failed 2>&-; then exit 1; fi ;; esac
    if [ -d slow-disk ]; then
        export PYTHONPATH="$PWD/slow-disk${PYTHONPATH+:$PYTHONPATH}"
    fi
esac
"""
# A disk on which it takes two seconds to put a checkpoint in its place.
SLOW_DISK = """
import sys, time

def watch(event, arguments):
    if event == "os.rename" and "/checkpoints/step-" in str(arguments[1]):
        time.sleep(2)

sys.addaudithook(watch)
"""
LONG = {"steps": 1200, "log_every": 100, "validate_every": 400, "checkpoint_every": 50}
SHORT = {"steps": 400, "log_every": 20, "validate_every": 100, "checkpoint_every": 50}


@dataclass
class Job:
    """A job as it was submitted, and each start of it."""

    stage: str
    gpu: str
    nodes: list[str]
    state: str = ""
    memory: str = ""
    limit: str = ""
    allocated: str = ""


@dataclass
class Site:
    """A working folder on a cluster."""

    root: Path
    folder: Path
    cluster: Cluster

    @property
    def pretrained(self) -> Path:
        return self.folder / "results" / "tiny" / "tiny" / "seed-0" / "pretrain"

    def log(self) -> str:
        """What the attempts at the pretraining have printed."""
        return (self.folder / "logs/results/tiny/tiny/seed-0/pretrain.log.all").read_text()

    def copy(self, name: str) -> Site:
        """Another folder with the same data, ready to be trained on."""
        folder = self.folder.with_name(name)
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(".snakemake", "logs"))
        shutil.rmtree(folder / "results" / "tiny" / "tiny")
        return Site(self.root, folder, self.cluster)

    def arguments(self, target: str, *configs: str) -> list[str]:
        """A call of Snakemake by the profile."""
        command = [sys.executable, "-c", SNAKEMAKE, "--profile", "slurm", target]
        command += ["--directory", str(self.folder), "--latency-wait", "5", "--configfile"]
        return [*command, *(str(self.folder / name) for name in ("tiny.yaml", *configs))]

    @contextmanager
    def snakemake(
        self, target: str, *configs: str, options: tuple[str, ...] = (), status: int = 0
    ) -> Iterator[subprocess.Popen[str]]:
        """A run by the profile, which must end with this status before the block is left."""
        (self.folder / "told.tsv").unlink(missing_ok=True)
        command = [*self.arguments(target, *configs), *options]
        environment = {**self.cluster.environment, "BASH_ENV": str(self.folder / "hook.sh")}
        log = self.folder / "snakemake.log"
        with log.open("w") as out:
            run = subprocess.Popen(command, cwd=self.root, env=environment, stdout=out, stderr=out)
        try:
            yield run
            assert run.wait(timeout=600) == status, log.read_text()[-8000:]
        finally:
            if run.poll() is None:
                run.kill()
                run.wait()
                ask("scancel", "--user=root")

    def ask_snakemake(self, target: str, *options: str) -> str:
        """What a call that submits nothing answers."""
        command = [*self.arguments(target, "long.yaml"), *options]
        done = subprocess.run(
            command, cwd=self.root, env=self.cluster.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def jobs(self) -> dict[int, Job]:
        """The jobs of the last run, by their number."""
        jobs: dict[int, Job] = {}
        for line in (self.folder / "told.tsv").read_text().splitlines():
            number, node, gpu, stage = line.split("\t")
            jobs.setdefault(int(number), Job(stage, gpu, [])).nodes.append(node)
        for line in (self.cluster.folder / "finished").read_text().splitlines():
            facts = dict(re.findall(r"(\w+)=(\S*)", line))
            if job := jobs.get(int(facts["JobId"])):
                job.state, job.limit = facts["JobState"], facts["TimeLimit"]
                job.memory = facts["Tres"].split("mem=")[1].split(",")[0]
                job.allocated = facts["NodeList"]
        return jobs

    def wait_for_checkpoint(self, steps: int = 100) -> int:
        """Wait until the training that runs has a regular checkpoint; the number of its job."""
        found = self.pretrained / "checkpoints"
        wait_for(lambda: max(list_checkpoints(found), default=0) >= steps, "a checkpoint", 90)
        assert not (self.pretrained / "model.json").exists()
        return max(int(line.split("\t")[0]) for line in (self.folder / "told.tsv").open())

    def put_to_sleep(self, job: int) -> int:
        """Stop the training of a job, until someone sends SIGCONT to its process: the number."""
        of_job = self.cluster.processes(lambda told: f"SLURM_JOB_ID={job}".encode() in told)
        names = {one: Path(f"/proc/{one}/cmdline").read_bytes().split(b"\0") for one in of_job}
        (training,) = (one for one, words in names.items() if b"pretrain" in words)
        os.kill(training, signal.SIGSTOP)
        return training

    def owners(self) -> set[str]:
        """Who has claimed the folder of the pretraining."""
        return {path.name for path in self.pretrained.glob(".tmp-owner-*")}

    def train_alone(self, name: str, *configs: str) -> Callable[[], Path]:
        """Start the pretraining without a cluster, in a folder of its own; it gives its results."""
        apart = self.copy(name)
        command = [str(Path(sys.executable).parent / "neuromamba"), "pretrain", "--config"]
        command += ["config/config.yaml", "tiny.yaml", *configs]
        run = subprocess.Popen(
            [*command, "--dataset", "tiny", "--model", "tiny", "--seed", "0"],
            cwd=apart.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def results() -> Path:
            assert run.wait(timeout=120) == 0
            return apart.pretrained

        return results


def make_site(root: Path, folder: Path, cluster: Cluster) -> Site:
    """A folder with the data and configs of the tests, in which nothing has run."""
    shutil.copytree(root / "config", folder / "config")
    shutil.copy(root / "tests" / "tiny-model.yaml", folder / "config" / "models" / "tiny.yaml")
    tiny = yaml.safe_load((root / "tests" / "tiny.yaml").read_text())
    del tiny["datasets"]["tiny"]["targets"]["age"]
    tiny["compute"]["device"] = "auto"
    short = {"pretrain": {**tiny["pretrain"], **SHORT}}
    configs = {
        "tiny": tiny,
        "long": {"pretrain": {**tiny["pretrain"], **LONG}},
        "short": short,
        "two-nodes": {**short, "compute": {"nodes": 2}},
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (folder / "hook.sh").write_text(HOOK)
    write_demo(folder / "data" / "tiny", subjects=16, volumes=24, voxel_size=8.0, seed=0)
    return Site(root, folder, cluster)
