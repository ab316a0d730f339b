"""Windows and batches: their order, their padding, and the subjects they may open."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray
from fake_runs import VALUES, FakeStore, make_config, write_dataset

from neuromamba.batches import (
    TokenWindows,
    Window,
    Windows,
    group_runs,
    list_runs,
    make_readers,
)
from neuromamba.bids import run_index
from neuromamba.config import Config, Tokens
from neuromamba.demo import write_demo
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.prefetch import prefetch
from neuromamba.tables import read_table, write_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

RUNS = {
    "sub-01": ["sub-01_run-1", "sub-01_run-2", "sub-01_run-3"],
    "sub-02": ["sub-02_run-1"],
    "sub-03": ["sub-03_run-1"],
}


@pytest.fixture(autouse=True)
def _fake_stores(monkeypatch):
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    FakeStore.poisoned, FakeStore.short, FakeStore.opened = set(), set(), []


def reader(volumes: int = 8, normalization: str = "global") -> TokenWindows:
    tokens = Tokens(patch=2, time_patch=2)
    return TokenWindows(lambda run: Path(f"tokens/{run}.zarr"), volumes, tokens, normalization)


def test_a_sample_depends_on_seed_and_number_alone():
    one, other = Windows(RUNS, [reader()]), Windows(dict(reversed(RUNS.items())), [reader()])
    forward = [one.sample(3, n) for n in range(40)]
    backward = [other.sample(3, n) for n in reversed(range(40))]
    assert forward == backward[::-1]
    assert forward != [one.sample(4, n) for n in range(40)]


def test_subjects_take_equal_turns_whatever_they_bring():
    windows = Windows(RUNS, [reader()])
    for epoch in range(5):
        seen = [windows.sample(0, 3 * epoch + turn).subject for turn in range(3)]
        assert sorted(seen) == sorted(RUNS)
    orders = {tuple(windows.sample(0, 3 * e + t).subject for t in range(3)) for e in range(20)}
    assert len(orders) > 1


def test_samples_reach_all_runs_and_all_starts():
    windows = Windows(RUNS, [reader()])
    drawn = [windows.sample(0, n) for n in range(900)]
    starts = {run: {w.start for w in drawn if w.run == run} for of in RUNS.values() for run in of}
    for run, found in starts.items():
        assert found == set(range(FakeStore(Path(run)).n_time_patches - 4 + 1))
    counts = Counter(w.run for w in drawn if w.subject == "sub-01")
    assert min(counts.values()) > 0.7 * 100


def test_consecutive_batches_are_the_samples_in_order():
    windows = Windows(RUNS, [reader()])
    runs = [windows.training_batch(0, first, 4)["run"] for first in (0, 4, 8)]
    assert list(itertools.chain(*runs)) == [windows.sample(0, n).run for n in range(12)]


def test_a_batch_holds_the_stores_values_one_window_after_the_other():
    runs = {name: of[:1] for name, of in RUNS.items()}
    stores = [FakeStore(Path(of[0])) for of in runs.values()]
    counts = [store.n_tokens for store in stores]
    assert len(set(counts)) > 1
    windows = Windows(runs, [reader()])
    batch = windows.batch([Window(name, of[0], 1) for name, of in runs.items()])
    assert batch["patches"].tolist() == counts
    assert batch["tokens"].shape == (sum(counts), 4, VALUES)
    assert {batch[name].dtype for name in ("tokens", "mean", "centers")} == {torch.float32}
    parts = {name: batch[name].split(counts) for name in ("tokens", "mean", "centers")}
    for row, store in enumerate(stores):
        expected = store.normalized(1, 4, "global").swapaxes(0, 1)
        np.testing.assert_array_equal(parts["tokens"][row], expected)
        np.testing.assert_array_equal(parts["centers"][row], store.center)
        np.testing.assert_array_equal(parts["mean"][row], store.mean_normalized("global"))


def test_normalization_is_the_models():
    window = [Window("sub-02", "sub-02_run-1", 0)]
    given = {
        kind: Windows({"sub-02": ["sub-02_run-1"]}, [reader(8, kind)]).batch(window)
        for kind in ("global", "voxel")
    }
    assert torch.allclose(given["global"]["tokens"], given["voxel"]["tokens"] + 1)
    assert given["global"]["mean"].min() == 1
    assert not given["voxel"]["mean"].any()


def test_spaced_windows_reach_both_ends_or_stand_in_the_middle():
    run = "sub-02_run-1"
    last = FakeStore(Path(run)).n_time_patches - 4
    windows = Windows({"sub-02": [run]}, [reader()])
    starts = {k: [w.start for w in windows.spaced(k)] for k in (1, 2, 3, 50)}
    assert last >= 2
    assert starts[1] == [int(last / 2 + 0.5)]
    assert starts[2] == [0, last]
    assert starts[3] == [0, int(last / 2 + 0.5), last]
    assert starts[50] == list(range(last + 1))


def test_spaced_windows_of_some_subjects_in_their_order():
    windows = Windows(RUNS, [reader()])
    assert [w.run for w in windows.spaced(1, ["sub-03", "sub-02"])] == [
        "sub-03_run-1",
        "sub-02_run-1",
    ]


def test_a_short_run_is_left_out_with_a_reason_and_the_others_go_on():
    FakeStore.short = {"sub-01_run-2"}
    windows = Windows(RUNS, [reader()], max_excluded=0.2)
    assert windows.runs["sub-01"] == ["sub-01_run-1", "sub-01_run-3"]
    reason = windows.left_out["sub-01_run-2"]
    assert "sub-01_run-2.zarr" in reason
    assert "volumes.min_volumes to 8" in reason


def test_a_subject_without_a_long_enough_run_is_not_sampled():
    FakeStore.short = {"sub-02_run-1"}
    windows = Windows(RUNS, [reader()], max_excluded=0.5)
    assert windows.subjects == ["sub-01", "sub-03"]


def test_too_many_short_runs_are_refused_by_name():
    FakeStore.short = {"sub-02_run-1", "sub-03_run-1"}
    with pytest.raises(InputError, match="sub-02_run-1") as error:
        Windows(RUNS, [reader()], max_excluded=0.2)
    assert "2 of 5" in str(error.value)
    with pytest.raises(InputError, match="no runs"):
        Windows({}, [reader()])


def test_stores_of_another_patch_size_are_refused():
    tokens = Tokens(patch=3, time_patch=2)
    wrong = TokenWindows(lambda run: Path(f"tokens/{run}.zarr"), 8, tokens, "global")
    with pytest.raises(InputError, match=r"16 values a token .* give 54; make the tokens again"):
        Windows({"sub-02": ["sub-02_run-1"]}, [wrong])


def test_only_the_given_runs_are_opened():
    windows = Windows({"sub-02": RUNS["sub-02"]}, [reader()])
    windows.training_batch(0, 0, 4)
    assert set(FakeStore.opened) == {"sub-02_run-1"}


class Sevens:
    """A second need: one number for each window."""

    def positions(self, run):
        return 2

    def read(self, run, start):
        return {"seven": np.array([7 + start])}

    def collate(self, samples):
        return {"seven": torch.from_numpy(np.stack([sample["seven"] for sample in samples]))}


def test_readers_of_several_needs_share_the_windows():
    windows = Windows(RUNS, [reader(), Sevens()])
    assert {windows.sample(0, n).start for n in range(60)} == {0, 1}
    batch = windows.batch([Window("sub-02", "sub-02_run-1", 1)])
    assert batch["seven"].tolist() == [[8]]
    assert len(batch["patches"]) == 1


def test_a_need_that_no_reader_serves_is_refused(tmp_path):
    config = make_config(tmp_path)
    network = torch.nn.Module()
    network.needs = ("tokens", "anat")
    with pytest.raises(InputError, match="needs anat; batches of family neuromamba carry tokens"):
        make_readers(network, Layout(tmp_path, "fake"), config.models["tiny"], config.tokens)


def test_runs_are_those_of_the_subjects_that_have_tokens(tmp_path):
    write_dataset(tmp_path)
    config = make_config(tmp_path)
    manifest = Layout(tmp_path / "results", "fake").manifest("tokens", 0)
    table = read_table(manifest)
    table["reason"] = table["reason"].astype(object)
    table.loc[table["run"] == "sub-05_task-rest_run-1", "reason"] = "T = 3"
    write_table(manifest, table)
    runs = list_runs(config, "fake", ["sub-05", "sub-06"], ["tokens"])
    assert isinstance(runs, pd.DataFrame)
    assert group_runs(runs) == {
        "sub-05": ["sub-05_task-rest_run-2"],
        "sub-06": ["sub-06_task-rest_run-1"],
    }


def test_prefetch_keeps_the_order():
    assert list(prefetch(range(100))) == list(range(100))


def test_prefetch_stays_a_little_ahead_only():
    made = []
    items = prefetch((made.append(n) or n for n in range(100)), ahead=2)
    assert next(items) == 0
    time.sleep(0.2)
    assert len(made) <= 4
    items.close()


def test_prefetch_raises_at_the_items_place():
    def items():
        yield 1
        yield 2
        raise InputError("the third is damaged")

    got = []
    with pytest.raises(InputError, match="third"):
        got.extend(prefetch(items()))
    assert got == [1, 2]


def test_a_closed_prefetch_leaves_no_thread():
    items = prefetch(itertools.count())
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture(scope="module")
def real_stores(tmp_path_factory):
    """Three synthetic subjects through the stages before this one."""
    folder = tmp_path_factory.mktemp("real")
    write_demo(folder / "data", subjects=3, volumes=24, voxel_size=8.0, seed=0)
    config = Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {"demo": {"derivatives": str(folder / "data")}},
            "models": {"tiny": {"family": "neuromamba", "volumes": 8}},
            "volumes": {"shape": (24, 24, 24), "voxel_size": 8.0, "shard_volumes": 16},
        }
    )
    run_index(config, "demo")
    run_volumes(config, "demo", 0)
    run_tokens(config, "demo", 0)
    return config


@pytest.mark.parametrize("normalization", ["global", "voxel"])
def test_a_batch_of_real_stores_is_the_volumes_cut_into_patches(
    real_stores, normalization, monkeypatch
):
    monkeypatch.undo()
    layout, tokens = Layout(Path(real_stores.results), "demo"), real_stores.tokens
    index = read_table(layout.index)
    runs = group_runs(list_runs(real_stores, "demo", index["subject"], ["tokens"]))
    assert len(runs) == 3
    reader = TokenWindows(lambda run: layout.array("tokens", run), 8, tokens, normalization)
    windows = Windows(runs, [reader])
    (run, *_) = next(iter(runs.values()))
    batch = windows.batch([Window(windows.subjects[0], run, 3)])
    volumes = xarray.open_zarr(layout.array("volumes", run)).load()
    bold = volumes["bold"].astype("float64")
    if normalization == "voxel":
        z = (bold - volumes["mean"]) / volumes["sd"]
    else:
        z = (bold - volumes.attrs["global_mean"]) / volumes.attrs["global_sd"]
    z = np.nan_to_num(z.to_numpy())[6 : 6 + 8].reshape(4, 2, 24, 24, 24)
    kept = 0
    for row, center in enumerate(batch["centers"].numpy()):
        x, y, s = (np.floor(center * 4).astype(int)) * 6
        patch = z[:, :, s : s + 6, y : y + 6, x : x + 6].reshape(4, -1)
        np.testing.assert_allclose(batch["tokens"][row], patch, rtol=1e-3, atol=5e-3)
        kept += np.abs(patch).sum()
    assert kept == pytest.approx(np.abs(z).sum())
