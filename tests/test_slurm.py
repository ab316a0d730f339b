"""`snakemake --profile slurm` on a real SLURM, whose nodes and GPUs are made up.

Jobs fail, are cut and lose their nodes; the results must be those of a quiet day.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from slurm_cluster import NODES, Cluster, ask, cluster, wait_for, why_not

from neuromamba.checkpoint import list_checkpoints, load_model_info
from neuromamba.demo import write_demo
from neuromamba.tables import read_table

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake_executor_plugin_slurm", reason="the workflow extra is missing")

# Snakemake, but that it looks every second what became of its jobs: the plugin waits longer each
# time, which would make most of the time of these tests.
SNAKEMAKE = """
import asyncio
from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

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
esac
"""
TRAINING = {"steps": 2000, "log_every": 100, "validate_every": 500, "checkpoint_every": 50}


@dataclass
class Job:
    """A job as it was submitted, and each start of it."""

    stage: str
    gpu: str
    nodes: list[str]
    state: str = ""
    memory: str = ""


@dataclass
class Site:
    """A working folder on a cluster."""

    root: Path
    folder: Path
    cluster: Cluster

    @property
    def pretrained(self) -> Path:
        return self.folder / "results" / "tiny" / "tiny" / "seed-0" / "pretrain"

    @contextmanager
    def snakemake(self, target: str, *configs: str) -> Iterator[subprocess.Popen[str]]:
        """A run by the profile, which must succeed before the block is left."""
        (self.folder / "told.tsv").unlink(missing_ok=True)
        command = [sys.executable, "-c", SNAKEMAKE, "--profile", "slurm", target]
        command += ["--directory", str(self.folder), "--latency-wait", "5", "--configfile"]
        command += [str(self.folder / name) for name in ("tiny.yaml", *configs)]
        environment = {**self.cluster.environment, "BASH_ENV": str(self.folder / "hook.sh")}
        log = self.folder / "snakemake.log"
        with log.open("w") as out:
            run = subprocess.Popen(command, cwd=self.root, env=environment, stdout=out, stderr=out)
        try:
            yield run
            assert run.wait(timeout=240) == 0, log.read_text()[-8000:]
        finally:
            if run.poll() is None:
                run.kill()
                run.wait()
                ask("scancel", "--user=root")

    def jobs(self) -> dict[int, Job]:
        """The jobs of the last run, by their number."""
        jobs: dict[int, Job] = {}
        for line in (self.folder / "told.tsv").read_text().splitlines():
            number, node, gpu, stage = line.split("\t")
            jobs.setdefault(int(number), Job(stage, gpu, [])).nodes.append(node)
        for line in (self.cluster.folder / "finished").read_text().splitlines():
            facts = dict(re.findall(r"(\w+)=(\S*)", line))
            if job := jobs.get(int(facts["JobId"])):
                job.state = facts["JobState"]
                job.memory = facts["Tres"].split("mem=")[1].split(",")[0]
        return jobs

    def wait_for_checkpoint(self) -> int:
        """Wait until the training that runs has a regular checkpoint; the number of its job."""
        found = self.pretrained / "checkpoints"
        wait_for(lambda: max(list_checkpoints(found), default=0) >= 100, "a checkpoint", 90)
        assert not (self.pretrained / "model.json").exists()
        return max(self.jobs_so_far())

    def jobs_so_far(self) -> list[int]:
        return [int(line.split("\t")[0]) for line in (self.folder / "told.tsv").open()]


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A folder in which all was made, though one of the jobs that pack tokens failed once."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    shutil.copytree(root / "config", folder / "config")
    shutil.copy(root / "tests" / "tiny-model.yaml", folder / "config" / "models" / "tiny.yaml")
    tiny = yaml.safe_load((root / "tests" / "tiny.yaml").read_text())
    del tiny["datasets"]["tiny"]["targets"]["age"]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    long = {"pretrain": {**tiny["pretrain"], **TRAINING}}
    (folder / "long.yaml").write_text(yaml.safe_dump(long))
    (folder / "hook.sh").write_text(HOOK)
    write_demo(folder / "data" / "tiny", subjects=16, volumes=24, voxel_size=8.0, seed=0)
    with cluster() as running:
        made = Site(root, folder, running)
        with made.snakemake("all"):
            pass
        yield made


@pytest.fixture(scope="module")
def finished(site: Site) -> list[Job]:
    """The jobs of the first run."""
    return list(site.jobs().values())


@pytest.fixture(scope="module")
def uninterrupted(site: Site, finished: list[Job]) -> Callable[[], bytes]:
    """The weights of the longer training that nothing cuts; it starts beside the others."""
    folder = site.folder.with_name("uninterrupted")
    shutil.copytree(site.folder, folder)
    results = folder / "results" / "tiny"
    shutil.rmtree(results / "tiny")
    command = [str(Path(sys.executable).parent / "neuromamba"), "pretrain", "--config"]
    command += ["config/config.yaml", "tiny.yaml", "long.yaml"]
    command += ["--dataset", "tiny", "--model", "tiny", "--seed", "0"]
    run = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def weights() -> bytes:
        assert run.wait(timeout=120) == 0
        return (results / "tiny" / "seed-0" / "pretrain" / "model.safetensors").read_bytes()

    return weights


def test_everything_is_made(site: Site, finished: list[Job]):
    assert "<html" in (site.folder / "results" / "report" / "index.html").read_text()
    evaluated = site.folder / "results/tiny/tiny/seed-0/evaluate/sex/predictions.tsv"
    assert {"tiny", "fc"} < set(read_table(evaluated)["predictor"])
    assert not list((site.folder / "results").rglob(".tmp-*"))
    assert {node for job in finished for node in job.nodes} == set(NODES)


def test_the_stages_that_use_a_gpu_are_given_one_and_no_others(finished: list[Job]):
    given = {job.stage: job.gpu for job in finished}
    training = {given.pop(stage) for stage in ("pretrain", "finetune", "evaluate")}
    assert training <= {"0", "1"}
    assert set(given.values()) == {"none"}


def test_a_job_that_failed_is_tried_again_with_more_memory_and_the_others_are_not(
    finished: list[Job],
):
    tried = [job for job in finished if job.stage == "tokens"]
    assert sorted((job.state, job.memory) for job in tried) == [
        ("COMPLETED", "4000M"),
        ("COMPLETED", "8000M"),
        ("FAILED", "4000M"),
    ]
    others = [job for job in finished if job.stage != "tokens"]
    assert {job.state for job in others} == {"COMPLETED"}
    assert all(len(job.nodes) == 1 for job in finished)
    assert len(others) == len({"index", "splits", "pretrain", "finetune", "evaluate", "report"}) + 4


def test_a_training_that_is_told_to_stop_is_continued_to_the_same_bits(
    site: Site, uninterrupted: Callable[[], bytes]
):
    with site.snakemake("pretrain", "long.yaml"):
        number = site.wait_for_checkpoint()
        # What `--signal=TERM@120` in the profile does when the time is nearly up.
        ask("scancel", "--signal=TERM", str(number))
    assert [job.state for job in site.jobs().values()] == ["FAILED", "COMPLETED"]
    (told,) = site.folder.glob(f".snakemake/slurm_logs/rule_pretrain_model/*/{number}.log")
    assert "told to stop after step" in told.read_text()
    assert (site.pretrained / "model.safetensors").read_bytes() == uninterrupted()


def test_the_work_of_a_node_that_dies_is_done_by_another_to_the_same_bits(
    site: Site, uninterrupted: Callable[[], bytes]
):
    shutil.rmtree(site.pretrained, ignore_errors=True)
    with site.snakemake("pretrain", "long.yaml"):
        number = site.wait_for_checkpoint()
        lost = site.jobs()[number].nodes[0]
        site.cluster.cut_power(lost)
        site.cluster.give_up(lost)
    (job,) = site.jobs().values()
    assert job.nodes == [lost, *{*NODES} - {lost}]
    assert job.state == "COMPLETED"
    assert (site.pretrained / "model.safetensors").read_bytes() == uninterrupted()
    site.cluster.start_node(lost)


def test_a_training_that_lives_on_where_its_node_was_given_up_spoils_nothing(
    site: Site, uninterrupted: Callable[[], bytes]
):
    """Two trainings then use one folder: either may end the other, and trying again mends that."""
    shutil.rmtree(site.pretrained, ignore_errors=True)
    with site.snakemake("pretrain", "long.yaml"):
        number = site.wait_for_checkpoint()
        lost = site.jobs()[number].nodes[0]
        site.cluster.kill_slurmd(lost)
        site.cluster.give_up(lost)
    jobs = list(site.jobs().values())
    assert jobs[0].nodes[0] == lost
    assert jobs[-1].nodes[-1] != lost
    assert jobs[-1].state == "COMPLETED"
    assert (site.pretrained / "model.safetensors").read_bytes() == uninterrupted()
    load_model_info(site.pretrained)  # checks the files against their digests
