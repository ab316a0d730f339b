"""Embeddings of runs, subjects and tokens: what they average, and what they do not depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
from fake_models import make_models, use_fake_stores
from fake_runs import FakeStore, make_config

from neuromamba.checkpoint import load_weights
from neuromamba.cli import main
from neuromamba.config import Config, save_config
from neuromamba.embed import open_embedder, open_shared, run_embed
from neuromamba.files import InputError
from neuromamba.finetune import run_finetune
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.tables import read_table

WIDTH = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a pretrained, a fine-tuned and an exported model."""
    folder = tmp_path_factory.mktemp("embed")
    make_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        use_fake_stores(patch)
        run_finetune(make_config(folder), "fake", "tiny", 0, "sex")
    return folder


@pytest.fixture(autouse=True)
def _fake_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_stores(monkeypatch)


@pytest.fixture
def config(made: Path) -> Config:
    return make_config(made)


def embed(config: Config, level: str, output: Path, weights=None, target=None, **options) -> None:
    if weights:
        embedder = open_shared(config, weights)
    else:
        embedder = open_embedder(config, "fake", "tiny", 0, target)
    run_embed(config, "fake", embedder, level, output, **options)


def values(path: Path, by: str = "run") -> dict[str, np.ndarray]:
    table = read_table(path, dtype={by: str}).set_index(by)
    columns = [f"e{k}" for k in range(WIDTH)]
    return {str(name): row.to_numpy(np.float32) for name, row in table[columns].iterrows()}


def by_hand(config: Config, run: str, starts: list[int], function: str = "embed") -> np.ndarray:
    """What the pretrained model says of windows of a run, each by itself: (window, ...)."""
    network = build_model(config.models["tiny"], 16)
    load_weights(network, Layout(Path(config.results), "fake").pretrain("tiny", 0))
    store, found = FakeStore(Path(f"{run}.zarr")), []
    for start in starts:
        tokens = torch.from_numpy(store.normalized(start, 4, "global").swapaxes(0, 1).copy())
        batch = {
            "tokens": tokens,
            "patches": torch.tensor([len(tokens)]),
            "centers": torch.from_numpy(store.center),
        }
        with torch.no_grad():
            found.append(getattr(network.eval(), function)(batch).numpy())
    return np.stack(found)


RUN = "sub-03_task-rest_run-1"


def test_a_run_is_the_mean_of_its_windows(config: Config, tmp_path: Path) -> None:
    embed(config, "run", tmp_path / "runs.tsv", count=3)
    last = FakeStore(Path(f"{RUN}.zarr")).n_time_patches - 4
    starts = np.unique(np.floor(np.linspace(0, last, 3) + 0.5).astype(int)).tolist()
    expected = by_hand(config, RUN, starts)[:, 0].mean(0)
    assert values(tmp_path / "runs.tsv")[RUN] == pytest.approx(expected, abs=1e-6)
    table = read_table(tmp_path / "runs.tsv").set_index("run")
    assert table.loc[RUN, "windows"] == len(starts)
    assert len(table) == 21, "training, validation and test subjects alike"


def test_a_subject_is_the_mean_of_its_runs(config: Config, tmp_path: Path) -> None:
    embed(config, "run", tmp_path / "runs.tsv")
    embed(config, "subject", tmp_path / "subjects.tsv")
    runs, subjects = values(tmp_path / "runs.tsv"), values(tmp_path / "subjects.tsv", "subject")
    assert len(subjects) == 14
    both = (runs[RUN] + runs[RUN[:-1] + "2"]) / 2
    assert subjects["sub-03"] == pytest.approx(both, abs=1e-6)
    assert (subjects["sub-04"] == runs["sub-04_task-rest_run-1"]).all()
    counts = read_table(tmp_path / "subjects.tsv").set_index("subject")["runs"]
    assert (counts["sub-03"], counts["sub-04"]) == (2, 1)


def test_an_embedding_is_the_same_whatever_else_is_embedded(config: Config, tmp_path: Path) -> None:
    embed(config, "run", tmp_path / "all.tsv")
    embed(config, "run", tmp_path / "one.tsv", runs=[RUN])
    embed(config, "run", tmp_path / "its.tsv", subjects=["sub-03"])
    one, every = values(tmp_path / "one.tsv"), values(tmp_path / "all.tsv")
    assert list(one) == [RUN]
    assert (one[RUN] == every[RUN]).all()
    assert sorted(values(tmp_path / "its.tsv")) == [RUN, RUN[:-1] + "2"]


def test_arrays_hold_what_the_table_holds(config: Config, tmp_path: Path) -> None:
    embed(config, "run", tmp_path / "runs.tsv")
    embed(config, "run", tmp_path / "runs.npz")
    with np.load(tmp_path / "runs.npz", allow_pickle=False) as arrays:
        assert arrays["embedding"].dtype == np.float32
        found = dict(zip(arrays["run"], arrays["embedding"], strict=True))
        assert set(arrays["subject"]) == {f"sub-{k:02}" for k in range(1, 15)}
        assert arrays["windows"].dtype == np.int64
    for run, row in values(tmp_path / "runs.tsv").items():
        assert (found[run] == row).all()


def test_tokens_keep_their_places(config: Config, tmp_path: Path) -> None:
    embed(config, "token", tmp_path / "tokens", runs=[RUN], count=2)
    store = FakeStore(Path(f"{RUN}.zarr"))
    found = xarray.open_zarr(tmp_path / "tokens" / f"{RUN}.zarr")
    assert found["embedding"].dims == ("token", "channel")
    assert found["embedding"].dtype == np.float32
    assert (found["grid_index"].values == store.grid_index).all()
    assert (found["center"].values == store.center).all()
    expected = by_hand(config, RUN, [0, store.n_time_patches - 4], "encode").mean((0, 2))
    assert found["embedding"].values == pytest.approx(expected, abs=1e-6)
    assert found.attrs["affine"] == store.attrs["affine"]
    # Before fine-tuning, a window's embedding is the mean of its tokens.
    embed(config, "run", tmp_path / "run.tsv", runs=[RUN], count=2)
    mean = found["embedding"].values.mean(0)
    assert values(tmp_path / "run.tsv")[RUN] == pytest.approx(mean, abs=1e-5)


def test_stores_that_are_there_are_kept_unless_the_windows_change(
    config: Config, tmp_path: Path
) -> None:
    path = tmp_path / f"{RUN}.zarr" / "zarr.json"
    embed(config, "token", tmp_path, runs=[RUN], count=1)
    before = path.stat().st_mtime_ns
    embed(config, "token", tmp_path, runs=[RUN], count=1)
    assert path.stat().st_mtime_ns == before
    embed(config, "token", tmp_path, runs=[RUN], count=2)
    assert path.stat().st_mtime_ns > before
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_shared_model_embeds_as_the_one_it_was_made_from(
    made: Path, config: Config, tmp_path: Path
) -> None:
    embed(config, "run", tmp_path / "own.tsv", count=3)
    embed(config, "run", tmp_path / "shared.tsv", count=3, weights=made / "shared")
    own, shared = (values(tmp_path / f"{name}.tsv") for name in ("own", "shared"))
    assert all((own[run] == shared[run]).all() for run in own)


def test_a_fine_tuned_model_embeds_otherwise(config: Config, tmp_path: Path) -> None:
    embed(config, "run", tmp_path / "own.tsv", runs=[RUN])
    embed(config, "run", tmp_path / "tuned.tsv", runs=[RUN], target="sex")
    own, tuned = (values(tmp_path / f"{name}.tsv")[RUN] for name in ("own", "tuned"))
    assert np.abs(own - tuned).max() > 1e-4


# --- What is refused ----------------------------------------------------------------------------


def test_tokens_of_another_grid_are_refused(made: Path, tmp_path: Path, monkeypatch) -> None:
    attributes = FakeStore.__init__

    def finer(self, path):
        attributes(self, path)
        self.attrs["affine"] = np.diag([1.0, 1.0, 1.0, 1.0]).tolist()

    monkeypatch.setattr(FakeStore, "__init__", finer)
    with pytest.raises(InputError, match=r"voxel_size is 1\.0, the model needs 2\.0"):
        embed(make_config(made), "run", tmp_path / "runs.tsv", weights=made / "shared")


def test_a_model_of_other_settings_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="normalization: global -> voxel"):
        embed(make_config(made, normalization="voxel"), "run", tmp_path / "runs.tsv")


def test_unknown_runs_and_subjects_are_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--runs: sub-99_task-rest has no tokens in fake"):
        embed(config, "run", tmp_path / "runs.tsv", runs=[RUN, "sub-99_task-rest"])
    with pytest.raises(InputError, match="--subjects: sub-99 has no tokens"):
        embed(config, "run", tmp_path / "runs.tsv", subjects=["sub-99"])


def test_a_table_has_a_name_that_tells_its_form(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a table of runs is named \*\.tsv or \*\.npz"):
        embed(config, "run", tmp_path / "runs.csv")


def test_no_window_is_no_embedding(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--windows 0: a run is embedded by at least 1 window"):
        embed(config, "run", tmp_path / "runs.tsv", count=0)


def test_a_folder_that_is_not_there_is_not_looked_up_elsewhere(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--weights: there is no folder lab/tiny"):
        embed(config, "run", tmp_path / "runs.tsv", weights=Path("lab/tiny"))


def test_short_runs_are_left_out_and_told(config: Config, tmp_path: Path, capsys) -> None:
    FakeStore.short = {RUN}
    embed(config, "run", tmp_path / "runs.tsv")
    assert RUN not in values(tmp_path / "runs.tsv")
    assert f"{RUN} is left out: " in capsys.readouterr().err


def test_the_command(made: Path, config: Config, tmp_path: Path, capsys) -> None:
    save_config(tmp_path / "config.yaml", config)
    start = ["embed", "--config", str(tmp_path / "config.yaml"), "--level", "run"]
    for name, options in (
        ("own", []),
        ("shared", ["--weights", str(made / "shared")]),
        ("tuned", ["--target", "sex"]),
    ):
        output = str(tmp_path / f"{name}.tsv")
        windows = ["--runs", RUN, "--windows", "2"]
        assert main([*start, "--output", output, *windows, *options]) == 0
    assert (values(tmp_path / "own.tsv")[RUN] == values(tmp_path / "shared.tsv")[RUN]).all()
    wrong = ["--output", str(tmp_path / "x.tsv"), "--target", "height"]
    assert main([*start, *wrong]) == 2
    assert "the config has sex, age" in capsys.readouterr().err
