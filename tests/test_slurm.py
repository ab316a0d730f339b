"""`snakemake --profile slurm` on a real SLURM, whose nodes and GPUs are made up.

Jobs fail, are cut and lose their nodes; the results must be those of a quiet day.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_runs import rows
from repository import Repository, make_repository
from slurm_cluster import APART, NODES, ask, cluster, wait_for, why_not
from slurm_site import SLOW_DISK, SNAKEMAKE, Job, Site, make_site

from neuromamba.checkpoint import load_model_info
from neuromamba.tables import read_table

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake_executor_plugin_slurm", reason="the workflow extra is missing")


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A folder in which all was made, though one of the jobs that pack tokens failed once."""
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            running = stack.enter_context(cluster())
        except TimeoutError as error:
            pytest.skip(f"no SLURM can be started on this machine: {error}")
        made = make_site(root, tmp_path_factory.mktemp("slurm"), running)
        with made.snakemake("all"):
            pass
        yield made


@pytest.fixture(scope="module")
def finished(site: Site) -> list[Job]:
    """The jobs of the first run."""
    return list(site.jobs().values())


@dataclass
class Beside:
    """What runs beside the tests.

    Attributes
    ----------
    long, short
        Trainings that nothing cuts, and their results.
    limited
        Where a long training runs on a slow disk, with a minute for each attempt at it.
    """

    long: Callable[[], Path]
    short: Callable[[], Path]
    limited: Site

    def weights(self) -> bytes:
        return (self.long() / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def beside(site: Site, finished: list[Job]) -> Iterator[Beside]:
    limited = site.copy("limited")
    (limited.folder / "slow-disk").mkdir()
    (limited.folder / "slow-disk" / "sitecustomize.py").write_text(SLOW_DISK)
    # SLURM looks every half minute, and tells those then whose turn comes before it looks again.
    change = ["runtime=1", "slurm_extra=--signal=TERM@5", "slurm_partition=apart"]
    options = ("--retries", "6", "--set-resources", *(f"pretrain_model:{one}" for one in change))
    with limited.snakemake("pretrain", "long.yaml", options=options):
        long = site.train_alone("long", "long.yaml")
        yield Beside(long, site.train_alone("short", "short.yaml"), limited)


def assert_whole(site: Site, beside: Beside) -> None:
    """The pretraining has the weights of the one that nothing cut, and nothing lies about."""
    load_model_info(site.pretrained)  # checks the files against their digests
    assert (site.pretrained / "model.safetensors").read_bytes() == beside.weights()
    steps = [(row["step"], row["split"]) for row in rows(site.pretrained)]
    assert steps == [(row["step"], row["split"]) for row in rows(beside.long())]
    left = {path.name for path in site.pretrained.iterdir()}
    assert {name for name in left if not name.endswith(".key.json")} == {
        "model.json",
        "model.safetensors",
        "last.safetensors",
        "metrics.jsonl",
    }


# --- A quiet day, but for one job -----------------------------------------------------------------


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
    batched = {job.stage for job in others if job.stage in ("volumes", "rois", "qc")}
    assert len(others) == len({job.stage for job in others}) + len(batched)


# --- Trainings that are cut -----------------------------------------------------------------------


def test_a_training_that_is_told_to_stop_is_continued_to_the_same_bits(site: Site, beside: Beside):
    with site.snakemake("pretrain", "long.yaml"):
        number = site.wait_for_checkpoint()
        # What `--signal=TERM@120` in the profile does when the time is nearly up.
        ask("scancel", "--signal=TERM", str(number))
    jobs = site.jobs()
    assert [job.state for job in jobs.values()] == ["FAILED", "COMPLETED"]
    assert_whole(site, beside)
    # The log has both attempts.
    first, second = site.log().split("--- ")[-2:]
    assert f"SLURM job {number}\n" in first
    assert "told to stop after step" in first
    assert f"SLURM job {max(jobs)}\n" in second
    assert "told to stop" not in second


def test_the_work_of_a_node_that_dies_is_done_by_another_to_the_same_bits(
    site: Site, beside: Beside
):
    shutil.rmtree(site.pretrained)
    with site.snakemake("pretrain", "long.yaml"):
        number = site.wait_for_checkpoint()
        lost = site.jobs()[number].nodes[0]
        site.cluster.cut_power(lost)
        site.cluster.give_up(lost)
    (job,) = site.jobs().values()
    assert job.nodes == [lost, *{*NODES} - {lost}]
    assert job.state == "COMPLETED"
    assert_whole(site, beside)
    site.cluster.start_node(lost)


def test_a_training_that_lives_on_where_its_node_was_given_up_leaves_the_folder_to_its_successor(
    site: Site, beside: Beside
):
    shutil.rmtree(site.pretrained)
    with site.snakemake("pretrain", "long.yaml"):
        number = site.wait_for_checkpoint()
        lost, before = site.jobs()[number].nodes[0], site.owners()
        training = site.put_to_sleep(number)
        site.cluster.kill_slurmd(lost)
        site.cluster.give_up(lost)
        wait_for(lambda: bool(site.owners() - before), "the successor", 60)
        os.kill(training, signal.SIGCONT)
    wait_for(lambda: not Path(f"/proc/{training}").exists(), "the end of the older training")
    (job,) = site.jobs().values()
    assert job.nodes == [lost, *{*NODES} - {lost}]
    assert job.state == "COMPLETED"
    assert site.log().count("a later process has taken this folder over") == 1
    assert_whole(site, beside)
    site.cluster.start_node(lost)


def test_a_workflow_that_is_cut_short_is_started_again(site: Site, beside: Beside):
    """By Ctrl-C, which cancels its jobs, and by a kill, after which they live on.

    One of these sleeps until all is done, and then finds that it has a successor.
    """
    shutil.rmtree(site.pretrained)
    with site.snakemake("pretrain", "long.yaml", status=1) as run:
        cancelled = site.wait_for_checkpoint()
        run.send_signal(signal.SIGINT)
    wait_for(lambda: not is_there(cancelled), "the end of the job")
    with site.snakemake("pretrain", "long.yaml", status=-signal.SIGKILL) as run:
        number = site.wait_for_checkpoint(steps=200)
        training = site.put_to_sleep(number)
        run.kill()
    site.ask_snakemake("pretrain", "--unlock")
    with site.snakemake("pretrain", "long.yaml"):
        pass
    assert [job.state for job in site.jobs().values()] == ["COMPLETED"]
    assert_whole(site, beside)
    os.kill(training, signal.SIGCONT)
    wait_for(lambda: not is_there(number), "the end of the job")
    assert "a later process has taken this folder over" in site.log()
    assert_whole(site, beside)
    assert "Nothing to be done" in site.ask_snakemake("pretrain", "--dry-run")


def is_there(job: int) -> bool:
    """Whether a job still runs."""
    return str(job) in ask("squeue", "--noheader", "--format", "%i").split()


def test_a_training_on_two_nodes_is_the_same_one_to_rounding(site: Site, beside: Beside):
    """And all its processes stop when they are told to, and are continued."""
    two = site.copy("two")
    with two.snakemake("pretrain", "two-nodes.yaml"):
        number = two.wait_for_checkpoint(steps=50)
        ask("scancel", "--signal=TERM", str(number))
    jobs = list(two.jobs().values())
    assert [job.state for job in jobs] == ["FAILED", "COMPLETED"]
    assert {job.allocated for job in jobs} == {"n[1-2]"}
    assert two.log().count("told to stop after step") == 1
    together, alone = rows(two.pretrained), rows(beside.short())
    assert [row["step"] for row in together] == [row["step"] for row in alone]
    for row, other in zip(together, alone, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3), row["step"]
    assert load_model_info(two.pretrained)["processes"] == 2


def test_dvc_runs_its_stages_on_the_cluster(site: Site, tmp_path: Path):
    pytest.importorskip("dvc", reason="the workflow extra is missing")
    program = tmp_path / "bin" / "snakemake"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{SNAKEMAKE}")
    program.chmod(0o755)
    lab = make_repository(site.root, tmp_path / "lab")
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent)])
    environment = {**site.cluster.environment, "SNAKEMAKE_PROFILE": "slurm"}
    environment["PATH"] = os.pathsep.join([path, environment["PATH"]])
    on_cluster = Repository(lab.folder, environment)
    assert on_cluster.reproduce("tokens@tiny") == ["index@tiny", "volumes@tiny", "tokens@tiny"]
    finished = (site.cluster.folder / "finished").read_text().splitlines()
    jobs = [line for line in finished if f"WorkDir={lab.folder} " in line]
    assert len(jobs) == 5
    assert all("JobState=COMPLETED" in job for job in jobs)
    # Here, without the cluster, the same results are current.
    assert lab.reproduce("tokens@tiny") == []


def test_a_training_is_cut_by_its_time_limit_and_continued_to_the_same_bits(beside: Beside):
    limited = beside.limited
    wait_for((limited.pretrained / "model.json").exists, "the end of the training", 400)
    wait_for(lambda: not any(is_there(job) for job in limited.jobs()), "the end of its job")
    *cut, last = limited.jobs().values()
    assert {(job.limit, job.allocated) for job in cut} == {("1", APART)}
    # Where the machine is slow, a minute may end before the training has begun to listen.
    assert {job.state for job in cut} <= {"FAILED", "TIMEOUT"}
    assert (last.state, last.limit) == ("COMPLETED", "1")
    assert 1 <= limited.log().count("told to stop after step") <= len(cut)
    assert_whole(limited, beside)
