"""Estimates: measured figures come out as they are, and others follow from them by arithmetic."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from neuromamba.cli import main
from neuromamba.config import Config, load_config
from neuromamba.estimate import Plan, estimate_stages, estimate_training, run_estimate
from neuromamba.files import InputError
from neuromamba.measured import Measured, Point, Speed, read_measured, read_own
from neuromamba.stages import BATCHED
from neuromamba.tables import write_table


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return load_config([root / "config" / "config.yaml"])


def measured(*lengths: int, training: tuple[Speed, ...] = ()) -> Measured:
    """A stage makes 10 files and 100 bytes a volume on top of 1000, in a second for 100 volumes."""
    points = [
        Point(
            stage,
            volumes=n,
            files=10,
            folders=2,
            bytes=1000 + 100 * n,
            seconds=n / 100,
            cpu_seconds=n / 50,
            start_seconds=3,
            peak_mb=n,
        )
        for stage in BATCHED
        for n in lengths
    ]
    return Measured("here", points, tokens_per_time_patch=1000, training=list(training))


def test_the_figures_of_the_package_are_of_the_shipped_settings(config: Config):
    shipped = read_measured()
    assert {point.stage for point in shipped.points} == set(BATCHED)
    plan = Plan(subjects=7, runs=2, volumes=490, subjects_per_job=3)
    table = estimate_stages(plan, shipped).set_index("stage")
    for point in shipped.points:
        if point.volumes == 490:
            row = table.loc[point.stage]
            assert (row["files_per_run"], row["bytes_per_run"]) == (point.files, point.bytes)
            assert (row["files"], row["bytes"]) == (14 * point.files, 14 * point.bytes)
    assert (table.loc[list(BATCHED), "jobs"] == 3).all()
    assert run_estimate(config, plan)


@pytest.mark.parametrize("volumes", [50, 100, 250, 400, 800])
def test_other_lengths_lie_on_a_line(volumes: int):
    table = estimate_stages(Plan(10, 1, volumes, 4), measured(100, 400)).set_index("stage")
    assert table.loc["tokens", "bytes_per_run"] == 1000 + 100 * volumes
    assert table.loc["tokens", "files"] == 100
    assert table.loc["tokens", "inodes"] == 120
    assert table.loc["tokens", "core_hours"] == pytest.approx((10 * volumes / 50 + 3 * 3) / 3600)
    assert table.loc["tokens", "hours_per_job"] == pytest.approx((4 * volumes / 100 + 3) / 3600)
    assert table.loc["tokens", "peak_mb"] == 400
    assert table.loc["all", "jobs"] == 9
    assert table.loc["all", "bytes"] == 30 * (1000 + 100 * volumes)


def test_lengths_that_hardly_differ_give_proportions():
    few = measured(99, 101)
    row = estimate_stages(Plan(1, 1, 200, 1), few).iloc[0]
    assert row["bytes"] == 2 * (1000 + 100 * 100)


def test_training_is_windows_by_speed(config: Config):
    speed = Speed("neuromamba-small", "a device", tokens_per_second=1e6)
    (row,) = estimate_training(config, Plan(100, 1, 400, 10), measured(400, training=(speed,)))
    settings = config.models["neuromamba-small"].pretrain
    windows = settings.steps * settings.batch_size
    assert row["windows"] == windows
    assert row["passes"] == pytest.approx(windows / (100 * 400 / 20))
    assert row["hours"] == pytest.approx(windows * 10 * 1000 / 1e6 / 3600)
    assert not estimate_training(config, Plan(1, 1, 400, 1), measured(400))


def write_own(folder: Path) -> None:
    """Two finished batches of two runs, of one of which the time is known."""
    for batch in range(2):
        runs = [f"sub-{batch}{number}" for number in range(2)]
        for stage in BATCHED:
            table = pd.DataFrame({"run": [*runs, "sub-bad"], "reason": [None, None, "broken"]})
            table = table.assign(n_volumes=[100, 300, None], n_tokens=[1400, 1600, None])
            table = table.assign(files=[20, 22, None], bytes=[4e6, 6e6, None], sha256="0" * 64)
            write_table(folder / stage / f"batch-{batch}.tsv", table)
    for stage in BATCHED:
        path = Path("logs") / folder / stage / "batch-0.benchmark.tsv"
        path.parent.mkdir(parents=True)
        path.write_text(
            "s\th:m:s\tmax_rss\tmax_vms\tmean_load\tcpu_time\n6.0\t0:00:06\t500\t-\t150.0\t9.0\n"
        )
    training = folder / "neuromamba-small" / "seed-0" / "pretrain"
    training.mkdir(parents=True)
    rows = [{"split": "train", "tokens_per_second": speed} for speed in (100.0, 5000.0, 5200.0)]
    rows.append({"split": "validation", "loss": 1.0})
    (training / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_own(Path("results/mine"))
    return Path("results/mine")


def test_own_results_are_measured(own: Path):
    found = read_own(own)
    assert [point.stage for point in found.points] == list(BATCHED)
    point = found.points[0]
    assert (point.volumes, point.files, point.bytes) == (200, 21, 5e6)
    # Three runs were worked on in that batch, one of them in vain.
    assert (point.seconds, point.cpu_seconds, point.peak_mb) == (2, 3, 500)
    assert found.tokens_per_time_patch == 1500
    assert found.training[0].model == "neuromamba-small"
    assert found.training[0].tokens_per_second == 5000


def test_without_benchmark_files_times_are_unknown(config: Config, own: Path, tmp_path: Path):
    (tmp_path / "logs").rename(tmp_path / "other")
    text = run_estimate(config, Plan(100, 1, 200, 10), own)
    assert "n/a" in text
    table = json.loads(run_estimate(config, Plan(100, 1, 200, 10), own, "json"))
    assert table["stages"][0]["core_hours"] is None
    assert table["stages"][0]["bytes"] == 5e8
    assert math.isnan(read_own(own).points[0].seconds)


def test_of_roi_series_there_is_one_stage_and_training_is_told_in_windows(root: Path, own: Path):
    for stage in ("volumes", "tokens"):
        shutil.rmtree(own / stage)
    training = own / "lmae" / "seed-0" / "pretrain" / "fold-1"
    training.mkdir(parents=True)
    row = {"split": "train", "samples_per_second": 20.0}
    (training / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    config = load_config([root / "config/config.yaml"], ["models=[lmae]"])
    found = json.loads(run_estimate(config, Plan(100, 1, 200, 10), own, "json"))
    assert [stage["stage"] for stage in found["stages"]] == ["rois", "all"]
    assert found["stages"][0]["bytes"] == 5e8
    (pretraining,) = found["training"]
    settings = config.models["lmae"].pretrain
    assert pretraining["hours"] == settings.steps * settings.batch_size / 20.0 / 3600


def test_a_folder_without_finished_batches_is_refused(own: Path):
    for path in (own / "tokens").glob("*"):
        path.unlink()
    with pytest.raises(InputError, match=r"results/mine/tokens has no batch-\*\.tsv with digests"):
        read_own(own)


def test_formats_say_the_same(config: Config):
    plan = Plan(40647, 1, 480, 256)
    table = pd.read_csv(io.StringIO(run_estimate(config, plan, form="tsv")), sep="\t")
    whole = json.loads(run_estimate(config, plan, form="json"))
    assert whole["plan"]["subjects"] == 40647
    assert [row["bytes"] for row in whole["stages"]] == table["bytes"].tolist()
    text = run_estimate(config, plan)
    assert f"{table['inodes'].iloc[-1]:,}" in text
    assert "compute.batches: 159" in text
    assert "480 volumes lies between" in text


def test_other_settings_are_refused_until_they_are_measured(root: Path, own: Path):
    demo = load_config([root / "config" / name for name in ("config.yaml", "demo.yaml")])
    with pytest.raises(InputError, match=r"volumes\.shape = \[96, 96, 96\](.|\n)*--measured"):
        run_estimate(demo, Plan(10, 1, 200, 5))
    assert "Pretraining neuromamba-tiny: not measured" in run_estimate(
        demo, Plan(10, 1, 200, 5), own
    )


def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--config", str(root / "config" / "config.yaml"), "--subjects", "10"]
    assert main(["estimate", *options, "--volumes", "490"]) == 0
    assert "10 subjects x 1 runs x 490 volumes" in capsys.readouterr().out
    assert main(["estimate", *options, "--volumes", "0"]) == 2
    assert "volumes: must be at least 1" in capsys.readouterr().err
