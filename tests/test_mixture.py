"""Pretraining on several datasets together: shares, names, and what later stages make of it."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fake_runs import FakeStore, make_config, write_dataset

from neuromamba.batches import TokenWindows, Windows
from neuromamba.checkpoint import load_model_info
from neuromamba.config import Config, Tokens
from neuromamba.files import InputError
from neuromamba.finetune import run_finetune
from neuromamba.layout import Layout
from neuromamba.pretrain import run_pretrain
from neuromamba.record import seen_subjects

WEIGHTS = {"big": 0.75, "small": 0.25}


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    """Two datasets, whose subjects have the same names."""
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    write_dataset(tmp_path)
    shutil.copytree(tmp_path / "results" / "fake", tmp_path / "results" / "other")
    return tmp_path


def mixed_config(folder: Path, **changes) -> Config:
    plain = make_config(folder).model_dump()
    plain["datasets"]["other"] = plain["datasets"]["fake"]
    plain["mixtures"] = {"both": {"fake": 3, "other": 1}}
    plain["models"]["tiny"]["pretrain"]["mixture"] = "both"
    return Config.model_validate(plain | changes)


def open_windows(counts: dict[str, int], weights: dict[str, float] | None) -> Windows:
    runs = {
        f"{name}/sub-{n}": [f"{name}/sub-{n}_task-rest"]
        for name, count in counts.items()
        for n in range(20, 20 + count)
    }
    tokens = Tokens(patch=2, time_patch=2)
    return Windows(runs, [TokenWindows(Path, 8, tokens, "global")], weights=weights)


def test_datasets_give_their_share_and_their_subjects_take_turns(fake):
    windows = open_windows({"big": 12, "small": 3}, WEIGHTS)
    drawn = [windows.sample(0, n).subject for n in range(4000)]
    counts = Counter(name.split("/")[0] for name in drawn)
    assert counts["big"] / 4000 == pytest.approx(0.75, abs=0.03)
    for name, count in Counter(drawn).items():
        expected = 4000 * WEIGHTS[name.split("/")[0]] / {"big": 12, "small": 3}[name.split("/")[0]]
        assert count == pytest.approx(expected, rel=0.25), name
    assert drawn == [windows.sample(0, n).subject for n in range(4000)]
    assert drawn != [windows.sample(1, n).subject for n in range(4000)]


def test_a_dataset_without_windows_is_refused(fake):
    with pytest.raises(InputError, match="dataset small: none of its runs gives a window"):
        open_windows({"big": 2}, WEIGHTS)


def test_a_store_of_another_dataset(tmp_path):
    layout = Layout(tmp_path, "both")
    assert layout.array("tokens", "hcp/sub-1_rest") == tmp_path / "hcp/tokens/sub-1_rest.zarr"
    assert layout.array("tokens", "sub-1_rest") == tmp_path / "both/tokens/sub-1_rest.zarr"


def test_pretraining_on_a_mixture_uses_the_training_subjects_of_all(fake):
    config = mixed_config(fake)
    run_pretrain(config, "both", "tiny", 0)
    info = load_model_info(Layout(fake / "results", "both").pretrain("tiny", 0))
    names = [f"sub-{n:02d}" for n in range(1, 15)]
    for part, expected in {"train": names[4:], "validation": names[:2]}.items():
        assert sorted(info["subjects"][part]) == sorted(
            f"{dataset}/{name}" for dataset in ("fake", "other") for name in expected
        )
    assert info["settings"]["mixture"] == {"fake": 0.75, "other": 0.25}
    assert set(info["inputs"]["split"]) == {"fake", "other"}
    assert seen_subjects(info, "other") >= {*names[4:], *names[:2]}
    assert not seen_subjects(info, "other") & set(names[2:4])


def test_other_weights_are_another_training(fake):
    run_pretrain(mixed_config(fake), "both", "tiny", 0)
    changed = mixed_config(fake, mixtures={"both": {"fake": 1, "other": 1}})
    with pytest.raises(InputError, match=r"mixture\.fake: 0\.75 -> 0\.5"):
        run_pretrain(changed, "both", "tiny", 0)


def test_fine_tuning_starts_from_the_mixture(fake):
    config = mixed_config(fake)
    with pytest.raises(InputError, match=r"both/tiny/seed-0/pretrain/model.json does not exist"):
        run_finetune(config, "other", "tiny", 0, "sex")
    run_pretrain(config, "both", "tiny", 0)
    run_finetune(config, "other", "tiny", 0, "sex")
    info = load_model_info(Layout(fake / "results", "other").finetune("tiny", 0, "sex"))
    assert info["pretrained_from"]["dataset"] == "both"
    names = {f"sub-{n:02d}" for n in range(1, 15)}
    assert seen_subjects(info, "other") & names == names - {"sub-03", "sub-04"}


def test_samples_do_not_change_for_a_single_dataset(fake):
    """A dataset of its own is drawn from as before there were mixtures."""
    windows = open_windows({"big": 5}, None)
    numbers = range(5)
    order = np.random.default_rng([3, 0, 0]).permutation(5)
    assert [windows.sample(3, n).subject for n in numbers] == [windows.subjects[k] for k in order]
