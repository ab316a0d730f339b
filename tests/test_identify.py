"""Identification of test subjects: what is compared, by what, and who is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray
import zarr
from fake_runs import FakeStore, make_config, write_dataset
from torch import nn

from neuromamba import identify as stage
from neuromamba import occasions
from neuromamba.config import Config
from neuromamba.files import InputError, read_json
from neuromamba.identify import by_rois, run_identify, still
from neuromamba.layout import Layout
from neuromamba.occasions import Occasion, halve, seen_volumes
from neuromamba.pretrain import run_pretrain
from neuromamba.store import finish
from neuromamba.tables import read_table, write_table

TEST = [f"sub-{number:02}" for number in range(3, 11)]
ODD = TEST[::2]  # who have two runs
PREDICTORS = ["model", "model-still", "fc", "mean-image", "brain-shape"]


class OwnStore(FakeStore):
    """Voxels that swing by as much as is each subject's own, about a mean that is the same."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        rng = np.random.default_rng(int(self.attrs["subject"].removeprefix("sub-")))
        swing = rng.uniform(1, 3, size=8)
        self.values = (np.r_[swing, -swing] + 0.05 * self.values).astype(np.float32)


class Swings(nn.Module):
    """A model that looks at nothing but how far each voxel swings."""

    needs = ("tokens",)
    width = 16

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def embed(self, batch):
        rows = batch["tokens"].split(batch["patches"].tolist())
        return torch.stack([window.abs().mean((0, 1)) for window in rows])


def write_rois(
    path: Path, own: int, seed: int, volumes: int = 20, missing: int | None = None
) -> None:
    """ROI series whose correlations and means are the own ones of a subject."""
    mixing = np.random.default_rng(own).standard_normal((6, 6))
    series = np.random.default_rng(seed).standard_normal((volumes, 6)) @ mixing
    if missing is not None:
        series[:, missing] = np.nan
    data = xarray.Dataset({"timeseries": (("time", "roi"), series.astype(np.float32))})
    data.to_zarr(path, zarr_format=3, consolidated=False, mode="w")
    finish(zarr.open_group(path), {})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a pretrained model, ROI stores, and eight test subjects."""
    folder = tmp_path_factory.mktemp("identify")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromamba.batches.TokenStore", FakeStore)
        write_dataset(folder)
        layout = Layout(folder / "results", "fake")
        split = read_table(layout.split, dtype=str)
        split.loc[split["subject"].isin(TEST), "part"] = "test"
        write_table(layout.split, split)
        patch.setattr(FakeStore, "poisoned", set(TEST))
        run_pretrain(make_config(folder, volumes=4), "fake", "tiny", 0)
    index = read_table(layout.index, dtype=str)
    for batch in range(2):
        table = read_table(layout.manifest("tokens", batch), dtype=str)
        write_table(layout.manifest("rois", batch), table)
    for seed, (run, subject) in enumerate(index[["run", "subject"]].itertuples(index=False)):
        if subject in TEST:
            write_rois(layout.array("rois", run), int(subject[4:]), 1000 + seed)
    return folder


@pytest.fixture(autouse=True)
def _fake_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("batches", "identify"):
        monkeypatch.setattr(f"neuromamba.{module}.TokenStore", FakeStore)
    for name in ("poisoned", "short"):
        monkeypatch.setattr(FakeStore, name, set())
    monkeypatch.setattr(occasions, "GAP", 3.0)  # one time patch: fake runs are short


def small(folder: Path, **evaluate: object) -> Config:
    raw = make_config(folder, volumes=4).model_dump(mode="json")
    raw["evaluate"] |= {"bootstrap": 50, "permutations": 50, **evaluate}
    return Config.model_validate(raw)


def results(folder: Path) -> Path:
    return Layout(folder / "results", "fake").identify("tiny", 0)


def run(folder: Path, **evaluate: object) -> pd.DataFrame:
    """Run the stage, and its table by kind of pair and predictor."""
    run_identify(small(folder, **evaluate), "fake", "tiny", 0)
    return read_table(results(folder) / "identify.tsv").set_index(["pairs", "predictor"])


# --- The stage ----------------------------------------------------------------------------------


def test_every_predictor_has_a_row_for_each_kind_of_pair(made: Path) -> None:
    table = run(made)
    assert table.index.tolist() == [
        (kind, name) for kind in ("all", "runs", "halves") for name in PREDICTORS
    ]
    assert table.loc["all", "n"].eq(8).all()
    assert table.loc["runs", "n"].eq(4).all()
    facts = read_json(results(made) / "identify.json")
    assert facts["n_pairs"] == {"runs": 4, "halves": 4}
    assert (facts["n_subjects"], facts["n_test_subjects"]) == (8, 8)
    assert facts["seen_subjects"] == []
    assert facts["subjects_left_out"] == {}
    assert facts["share_of_volumes"] == 1
    svg = (results(made) / "identify.svg").read_text()
    for words in ("FC baseline", "anatomy", "8 test subjects", "95% intervals"):
        assert words in svg
    assert {path.name for path in results(made).iterdir()} == {
        *("pairs.tsv", "similarity.npz", "identify.tsv", "identify.svg", "identify.json")
    }, "what the features lay in is gone"


def test_halves_share_a_brain_mask_and_runs_need_not(made: Path) -> None:
    table = run(made)
    assert table.loc[("halves", "brain-shape"), "accuracy"] > 0.6
    assert table.loc[("halves", "brain-shape"), "idiff"] > 0


def test_identity_over_time_is_found_and_stillness_takes_it_away(made: Path, monkeypatch) -> None:
    for module in ("batches", "identify"):
        monkeypatch.setattr(f"neuromamba.{module}.TokenStore", OwnStore)
    info = {"files": {"model.safetensors": "x"}, "subjects": {"train": [], "validation": []}}
    monkeypatch.setattr(stage, "open_pretrained", lambda *_: (Swings().eval(), info))
    monkeypatch.setattr(stage, "find_seen", lambda *_: [])
    table = run(made).loc["all"]
    assert table.loc["model", "accuracy"] == 1
    assert table.loc["model", "accuracy_p"] == pytest.approx(1 / 51)
    assert table.loc["model-still", "accuracy"] < 0.6
    assert table.loc["fc", "percentile_rank"] > 90


def test_the_embedding_is_the_mean_over_the_windows_of_an_occasion(made: Path) -> None:
    """Of the first run of a subject: what `embed` of each of its windows gives, averaged."""
    run(made)
    with np.load(results(made) / "similarity.npz", allow_pickle=False) as arrays:
        assert arrays["subject"].tolist() == TEST
        assert arrays.files == ["subject", *PREDICTORS]
        found = arrays["model"]
    network, _ = stage.open_pretrained(small(made), "fake", "tiny", 0)
    pairs = read_table(results(made) / "pairs.tsv", dtype={"subject": str}).set_index("subject")

    def embedding(subject: str, which: str) -> np.ndarray:
        row = pairs.loc[subject]
        store = FakeStore(Path(f"{row[which]}.zarr"))
        start, stop = row[f"{which}_start"] // 2, row[f"{which}_stop"] // 2
        parts = []
        for first in Occasion("", start, stop).starts(2):
            tokens = torch.from_numpy(store.normalized(first, 2, "global").swapaxes(0, 1).copy())
            patches, centers = torch.tensor([len(tokens)]), torch.from_numpy(store.center)
            with torch.no_grad():
                batch = {"tokens": tokens, "patches": patches, "centers": centers}
                parts.append(network.embed(batch)[0].numpy())
        return np.mean(parts, axis=0)

    for i, j in ((0, 0), (0, 3), (5, 2)):
        one, other = embedding(TEST[i], "first"), embedding(TEST[j], "second")
        assert found[i, j] == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-5)


def test_fc_is_of_the_volumes_of_the_occasion(made: Path) -> None:
    run(made)
    layout = Layout(made / "results", "fake")
    pairs = read_table(results(made) / "pairs.tsv")

    def fc(row: pd.Series, which: str) -> np.ndarray:
        series = xarray.open_zarr(layout.array("rois", row[which]))["timeseries"].values
        of = series[row[f"{which}_start"] : row[f"{which}_stop"]]
        return np.corrcoef(of, rowvar=False)[np.triu_indices(6, k=1)]

    with np.load(results(made) / "similarity.npz", allow_pickle=False) as arrays:
        for i, j in ((0, 0), (1, 1), (1, 4), (3, 0)):
            one, other = fc(pairs.iloc[i], "first"), fc(pairs.iloc[j], "second")
            assert arrays["fc"][i, j] == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-5)


def test_it_gives_the_same_bytes_each_time_and_in_any_order(made: Path) -> None:
    run(made)
    names = ("pairs.tsv", "identify.tsv", "identify.svg", "similarity.npz")
    before = {name: (results(made) / name).read_bytes() for name in names}
    split = Layout(made / "results", "fake").split
    text = split.read_text()
    head, *rows = text.splitlines()
    try:
        split.write_text("\n".join([head, *reversed(rows)]) + "\n")
        run(made)
    finally:
        split.write_text(text)
    for name in names:
        assert (results(made) / name).read_bytes() == before[name], name


def test_a_short_run_leaves_its_subject_out_with_a_reason(made: Path, monkeypatch) -> None:
    one_run = "sub-04_task-rest_run-1"
    monkeypatch.setattr(FakeStore, "short", {one_run})
    table = run(made)
    assert table.loc["all", "n"].eq(7).all()
    reasons = read_json(results(made) / "identify.json")["subjects_left_out"]
    assert list(reasons) == ["sub-04"]
    assert f"its one run, {one_run}, has 2 time patches" in reasons["sub-04"]
    assert "two windows of 2 with 3 s between them take 5" in reasons["sub-04"]


def test_a_subject_whose_second_run_is_lost_is_compared_by_halves(made: Path) -> None:
    layout = Layout(made / "results", "fake")
    path = next(
        path
        for path in (layout.manifest("rois", batch) for batch in range(2))
        if "sub-03_task-rest_run-2" in path.read_text()
    )
    before = path.read_text()
    table = read_table(path, dtype=str)
    table.loc[table["run"] == "sub-03_task-rest_run-2", "reason"] = "an atlas of another space"
    write_table(path, table)
    try:
        run(made)
    finally:
        path.write_text(before)
    row = read_table(results(made) / "pairs.tsv", dtype=str).set_index("subject").loc["sub-03"]
    assert (row["pairs"], row["first"]) == ("halves", row["second"])
    left_out = read_json(results(made) / "identify.json")["left_out"]
    assert left_out == {"sub-03_task-rest_run-2": "it has no ROI series"}


def test_a_missing_roi_stops_nobody(made: Path) -> None:
    path = Layout(made / "results", "fake").array("rois", "sub-05_task-rest_run-1")
    write_rois(path, 5, 1, missing=2)
    try:
        table = run(made)
    finally:
        write_rois(path, 5, 1)
    assert table.loc["all", "n"].eq(8).all()
    assert np.isfinite(table["accuracy"]).all()


# --- Who is compared ----------------------------------------------------------------------------


def test_halves_are_equally_long_and_apart() -> None:
    pair = halve("sub-01", "run", 41, 6)
    assert (pair.first, pair.second) == (Occasion("run", 0, 17), Occasion("run", 24, 41))
    starts = [start for of in (pair.first, pair.second) for start in of.starts(4)]
    volumes = seen_volumes(starts, 8, 2)
    assert sorted(set(range(82)) - set(volumes)) == list(range(34, 48))


@pytest.mark.parametrize(("patches", "count"), [(4, 1), (5, 2), (8, 2), (9, 3), (1000, 16)])
def test_windows_cover_an_occasion_or_are_as_many_as_allowed(patches: int, count: int) -> None:
    starts = Occasion("run", 10, 10 + patches).starts(4)
    assert len(starts) == count
    assert starts[0] == 10
    assert starts[-1] == 10 + patches - 4
    if count < occasions.WINDOWS:
        assert len(seen_volumes(starts, 4, 1)) == patches


def test_another_session_comes_before_the_same_task_and_that_before_the_order() -> None:
    facts = {
        "a": {"session": "1", "task": "rest"},
        "b": {"session": "1", "task": "rest"},
        "c": {"session": "2", "task": "nback"},
        "d": {"session": "2", "task": "rest"},
    }
    choose = occasions.other_run
    assert choose(["a", "b", "c", "d"], facts) == ("sessions", "d")
    assert choose(["a", "b", "c"], facts) == ("sessions", "c")
    assert choose(["a", "b"], facts) == ("runs", "b")


def test_a_still_window_has_its_mean_volume_throughout() -> None:
    tokens = torch.randn(3, 5, 12)  # two volumes a patch, six voxels
    found = still({"tokens": tokens, "run": ["a"]}, 2)
    assert found["run"] == ["a"]
    expected = tokens.reshape(3, 10, 6).mean(1)
    assert torch.allclose(found["tokens"].reshape(3, 10, 6), expected[:, None].expand(3, 10, 6))


# --- What is refused ----------------------------------------------------------------------------


def test_a_model_that_has_seen_a_test_subject_is_refused_unless_allowed(made: Path) -> None:
    split = Layout(made / "results", "fake").split
    before = split.read_bytes()
    split.write_bytes(before.replace(b"sub-14\ttrain", b"sub-14\ttest"))
    layout = Layout(made / "results", "fake")
    write_rois(layout.array("rois", "sub-14_task-rest_run-1"), 14, 5)
    try:
        with pytest.raises(InputError, match=r"1 of 9 test subjects.*sub-14.*allow_seen"):
            run(made)
        run(made, allow_seen_subjects=True)
    finally:
        split.write_bytes(before)
    assert read_json(results(made) / "identify.json")["seen_subjects"] == ["sub-14"]


def test_nobody_is_told_from_nobody(made: Path, monkeypatch) -> None:
    monkeypatch.setattr(occasions, "GAP", 1000.0)
    layout = Layout(made / "results", "fake")
    before = layout.split.read_text()
    parts = read_table(layout.split, dtype=str)
    alone = parts["subject"].isin([*ODD, "sub-04"])
    parts.loc[(parts["part"] == "test") & alone, "part"] = "train"
    write_table(layout.split, parts)
    try:
        with pytest.raises(InputError, match=r"0 of 3 test subjects.*takes 2.*sub-06: its one run"):
            run(made)
    finally:
        layout.split.write_text(before)


def test_rois_of_another_length_are_refused(tmp_path: Path) -> None:
    write_rois(tmp_path / "a.zarr", 1, 2, volumes=10)
    with pytest.raises(InputError, match=r"a\.zarr: not the ROI series of this run"):
        by_rois(tmp_path / "a.zarr", np.arange(12))
