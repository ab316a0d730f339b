"""Rows of `metrics.jsonl`: speed, waiting, memory, and the share of what the machine can do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from fake_runs import CPU, Toy, rows, samples, train

from neuromamba.throughput import Meter, peak_flops, peak_memory


class Busy(Toy):
    """Takes some time, and tells of its operations."""

    def loss(self, batch):
        time.sleep(0.03 * self.training)
        return super().loss(batch)

    def flops(self, batch):
        return 1000.0 * len(batch["x"])


def with_tokens(first: int, size: int) -> dict:
    return {**samples(first, size), "tokens": torch.zeros(3 * size, 5, 7)}


def trained(folder) -> list[dict]:
    return [row for row in rows(folder) if row["split"] == "train"]


def test_a_row_tells_speed_and_what_is_left(tmp_path):
    started = time.perf_counter()
    train(tmp_path, model=Busy(), training=with_tokens, accumulate=2, steps=6, warmup_steps=0)
    took = time.perf_counter() - started
    first, second = trained(tmp_path)
    assert 0.06 * 3 < first["seconds"] < second["seconds"] < took
    # 3 steps of 2 passes of 4 windows of 15 tokens.
    assert first["samples_per_second"] == pytest.approx(24 / first["seconds"])
    assert first["tokens_per_second"] == pytest.approx(15 * first["samples_per_second"])
    assert first["seconds_left"] == pytest.approx(first["seconds"])
    assert second["seconds_left"] == 0
    assert second["samples_per_second"] == pytest.approx(
        24 / (second["seconds"] - first["seconds"])
    )


def test_the_share_of_waiting_is_that_of_the_data(tmp_path):
    def slow(first, size):
        time.sleep(0.1)
        return samples(first, size)

    common = {"steps": 6, "log_every": 6, "warmup_steps": 0}
    train(tmp_path / "fast", model=Busy(), **common)
    train(tmp_path / "slow", training=slow, **common)
    assert trained(tmp_path / "fast")[0]["data_wait"] < 0.25
    assert 0.5 < trained(tmp_path / "slow")[0]["data_wait"] < 1


def test_utilisation_is_the_models_operations_over_those_of_a_matrix_product(tmp_path):
    train(tmp_path, model=Busy(), steps=6, warmup_steps=0)
    row = trained(tmp_path)[-1]
    expected = 3 * 1000.0 * row["samples_per_second"] / peak_flops(CPU, "float32")
    assert row["mfu"] == pytest.approx(expected)
    train(tmp_path / "silent", steps=6, warmup_steps=0)
    silent = trained(tmp_path / "silent")[-1]
    assert not {"mfu", "tokens_per_second"} & silent.keys()


def test_a_matrix_product_is_the_yardstick():
    size = 1024
    matrix = torch.ones(size, size)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    # Other work on the machine can slow either down by some factor.
    assert 0.1 < peak_flops(CPU, "float32") * min(times) / (2 * size**3) < 10


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells memory otherwise")
def test_peak_memory_is_in_mebibytes_and_at_least_what_is_in_use():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 0.9 * now < peak_memory(CPU) < 100 * now


def test_a_meter_counts_steps():
    meter = Meter()
    meter.add(tokens=10.0, flops=0.0, waited=0.0, started=time.perf_counter() - 2.0)
    speeds = meter.speeds(windows=4, steps_left=3, peak=lambda: 1.0)
    assert speeds["tokens_per_second"] == pytest.approx(5.0, rel=0.01)
    assert speeds["seconds_left"] == pytest.approx(6.0, rel=0.01)
    assert "mfu" not in speeds
