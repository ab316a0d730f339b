"""Windows of codes, and a training on them from the stores to predictions and a shared model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import code_stores
import numpy as np
import pytest
import torch
from code_stores import (
    FACTS,
    MADE_BY,
    TOKENS,
    WIDTH,
    make_codes,
    make_config,
    write_dataset,
    write_store,
)

from neuromamba.batches import Window, Windows, make_readers
from neuromamba.code_windows import CodeStore, CodeWindows
from neuromamba.config import Config
from neuromamba.embed import open_embedder, open_shared, run_embed
from neuromamba.explain import run_explain
from neuromamba.export import run_export
from neuromamba.files import InputError, read_json
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.forecast import run_forecast
from neuromamba.identify import still
from neuromamba.layout import Layout
from neuromamba.pretrain import codes_of, make_network, run_pretrain
from neuromamba.tables import read_table

torch.set_num_threads(1)


def reader(folder: Path) -> CodeWindows:
    return CodeWindows(lambda run: folder / f"{run}.zarr", 12, 2, FACTS)


# --- The reader -----------------------------------------------------------------------------------


def test_a_window_is_the_volumes_that_were_written(tmp_path: Path) -> None:
    codes = make_codes(1, 39).astype(np.float16)
    write_store(tmp_path / "one.zarr", codes, 1.25)
    found = reader(tmp_path)
    assert found.positions("one") == (39 - 12) // 2 + 1
    for start in (0, 1, 7, 13):  # from one shard, and across the edges of two and three
        sample = found.read("one", start)
        assert sample["codes"].dtype == np.float32
        assert (sample["codes"] == codes[2 * start : 2 * start + 12]).all()
    batch = found.collate([found.read("one", 0), found.read("one", 13)])
    assert batch["codes"].shape == (2, 12, TOKENS, WIDTH)
    assert batch["codes"].dtype == batch["repetition_time"].dtype == torch.float32
    assert batch["repetition_time"].tolist() == [1.25, 1.25]
    store = CodeStore(tmp_path / "one.zarr")
    assert (store.n_volumes, store.n_tokens, store.code_width) == (39, TOKENS, WIDTH)


def test_short_runs_are_told_how_to_leave_them_out(tmp_path: Path) -> None:
    write_store(tmp_path / "short.zarr", make_codes(1, 11))
    with pytest.raises(InputError, match=r"short has 11 volumes.*min_volumes to 12"):
        reader(tmp_path).positions("short")
    write_store(tmp_path / "long.zarr", make_codes(2, 12))
    assert reader(tmp_path).positions("long") == 1


def test_codes_of_another_tokenizer_are_never_read(tmp_path: Path) -> None:
    write_store(tmp_path / "other.zarr", make_codes(1), sha256="d" * 64)
    write_store(tmp_path / "wide.zarr", np.zeros((20, TOKENS, 2 * WIDTH)))
    write_store(tmp_path / "moved.zarr", make_codes(1), revision="abc")
    found = reader(tmp_path)
    write_store(tmp_path / "scaled.zarr", make_codes(1), normalization="voxel")
    for run in ("other", "wide", "scaled"):
        with pytest.raises(InputError, match="make the codes again with the settings"):
            found.positions(run)
        with pytest.raises(InputError, match="make the codes again with the settings"):
            found.read(run, 0)
    # Where the same weights came from makes no difference.
    assert found.positions("moved") > 0


def test_stores_that_are_damaged_or_tell_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        reader(tmp_path).positions("absent")
    write_store(tmp_path / "one.zarr", make_codes(1))
    meta = tmp_path / "one.zarr" / "zarr.json"
    facts = json.loads(meta.read_text())
    del facts["attributes"]["tokenizer"]["sha256"]
    meta.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="does not tell which tokenizer made it"):
        reader(tmp_path).positions("one")
    write_store(tmp_path / "two.zarr", make_codes(1))
    (shard,) = (tmp_path / "two.zarr" / "values").glob("c.1.*")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError, match="delete the store"):
        reader(tmp_path).read("two", 5)


def test_datasets_of_a_mixture_need_one_tokenizer(tmp_path: Path) -> None:
    model = make_config(tmp_path).models["codes"]
    layout = Layout(tmp_path / "results", "all")
    for dataset, made_by in (("one", {}), ("two", {"revision": "x"}), ("three", {"sha256": "e"})):
        path = layout.array("codes", f"{dataset}/run")
        write_store(path, make_codes(1), **made_by)
    assert codes_of(layout, model, ["one/run", "two/run"]) == FACTS
    with pytest.raises(InputError, match="one and three have codes of different tokenizers"):
        codes_of(layout, model, ["one/run", "three/run"])
    series = make_config(tmp_path, family="tablet").models["codes"]
    assert codes_of(layout, series, []) is None


# --- From the stores to predictions ---------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("codes")
    write_dataset(folder)
    config = make_config(folder)
    run_pretrain(config, "fake", "codes", 0)
    run_finetune(config, "fake", "codes", 0, "sex")
    return folder, config


def test_the_record_tells_whose_codes_were_read(trained: tuple[Path, Config]) -> None:
    _, config = trained
    layout = Layout.of(config, "fake")
    for folder in (layout.pretrain("codes", 0), layout.finetune("codes", 0, "sex")):
        told = read_json(folder / "model.json")["settings"]["codes"]
        assert told == FACTS


def test_it_tells_the_sex_of_people_it_has_never_seen(trained: tuple[Path, Config]) -> None:
    _, config = trained
    first = code_stores.TRAIN + code_stores.VALIDATION + 1
    names = [f"sub-{first + k:02d}" for k in range(code_stores.TEST)]
    found = predict_subjects(config, "fake", "codes", 0, "sex", names)
    right = (found["prob_male"] > 0.5) == [int(name[4:]) % 2 == 0 for name in names]
    assert right.mean() > 0.9
    alone = predict_subjects(config, "fake", "codes", 0, "sex", names[3:4])
    assert alone["prob_male"].iloc[0] == found["prob_male"].iloc[3]


def test_pretraining_learns_what_is_hidden(trained: tuple[Path, Config]) -> None:
    _, config = trained
    best = read_json(Layout.of(config, "fake").pretrain("codes", 0) / "model.json")["best"]
    assert best["skill_visible"] > 0.7


def test_windows_are_spaced_and_drawn_as_those_of_other_families(
    trained: tuple[Path, Config],
) -> None:
    _, config = trained
    layout, section = Layout.of(config, "fake"), config.models["codes"]
    network = make_network(config, "codes", 0, {"codes": FACTS})
    windows = Windows(
        {"sub-01": ["sub-01_task-rest"]}, make_readers(network, layout, section, config.tokens)
    )
    assert windows.spaced(3) == [Window("sub-01", "sub-01_task-rest", k) for k in (0, 9, 17)]
    starts = {windows.sample(0, n).start for n in range(200)}
    assert starts == set(range(18))
    assert set(windows.batch(windows.spaced(3))) == {"subject", "run", "codes", "repetition_time"}


def test_another_tokenizer_is_refused_by_a_finished_model(
    trained: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "copy")
    config = make_config(tmp_path / "copy")
    layout = Layout.of(config, "fake")
    shutil.copy(folder / "participants.tsv", tmp_path / "copy")
    for path in (layout.root / "codes").glob("*.zarr"):
        number = int(path.name[4:6])
        shutil.rmtree(path)
        write_store(path, make_codes(number), sha256="f" * 64)
    with pytest.raises(InputError, match=r"other settings.*\n.*sha256"):
        run_finetune(config, "fake", "codes", 0, "sex")
    with pytest.raises(InputError, match=r"other settings.*\n.*sha256"):
        predict_subjects(config, "fake", "codes", 0, "sex", ["sub-40"])
    with pytest.raises(InputError, match="make the codes again"):
        run_embed(
            config, "fake", open_embedder(config, "fake", "codes", 0), "run", tmp_path / "e.tsv"
        )


def test_it_is_shared_with_what_tells_its_tokenizer(
    trained: tuple[Path, Config], tmp_path: Path
) -> None:
    _, config = trained
    run_export(config, "fake", "codes", 0, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert MADE_BY["sha256"] in card
    assert "2604.03619" in card
    for name, embedder in (
        ("own", open_embedder(config, "fake", "codes", 0)),
        ("shared", open_shared(config, tmp_path / "shared")),
    ):
        run_embed(
            config, "fake", embedder, "run", tmp_path / f"{name}.tsv", runs=["sub-40_task-rest"]
        )
    own, shared = (read_table(tmp_path / f"{name}.tsv") for name in ("own", "shared"))
    assert own.equals(shared)
    with pytest.raises(InputError, match="does not embed tokens"):
        run_embed(config, "fake", embedder, "token", tmp_path / "tokens")


def test_maps_and_forecasts_are_refused_with_the_reason(trained: tuple[Path, Config]) -> None:
    _, config = trained
    with pytest.raises(InputError, match="reads codes: a map in space takes a model that reads"):
        run_explain(config, "fake", "codes", 0, "sex")
    with pytest.raises(InputError, match="makes no forecasts"):
        run_forecast(config, "fake", "codes", 0)
    assert not config.models["codes"].explains


def test_a_still_window_has_its_mean_codes_at_all_times() -> None:
    codes = torch.randn(2, 6, TOKENS, WIDTH)
    found = still({"codes": codes, "repetition_time": torch.ones(2)}, 2)["codes"]
    assert found.shape == codes.shape
    torch.testing.assert_close(found[:, 4], codes.mean(1))
