"""Check a dataset against its manifests: nothing wrong passes, and all that is wrong is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError
from scans import make_config, series, write_index, write_run

from neuromamba.cli import main
from neuromamba.config import Config, save_config
from neuromamba.contents import Contents, content_table, digest_store
from neuromamba.files import InputError, write_json
from neuromamba.layout import Layout
from neuromamba.rois import run_rois
from neuromamba.stage import process_runs
from neuromamba.stages import BATCHED
from neuromamba.tables import read_table
from neuromamba.token_store import TokenStore
from neuromamba.tokens import run_tokens
from neuromamba.verify import SHOWN, run_verify
from neuromamba.volumes import run_volumes


def write_stage(config: Config, stage: str, runs: int = 6) -> Layout:
    """Made-up stores of one stage in two batches, and their manifests."""
    layout = Layout.of(config, "toy")
    for batch in range(2):
        names = [f"sub-{number:02d}_task-rest" for number in range(batch, runs, 2)]
        for name in names:
            store = layout.array(stage, name)
            (store / "values").mkdir(parents=True)
            (store / "values" / "c.0.0.0").write_text(name * 1000)
            write_json(store / "zarr.json", {"attributes": {"key": "k"}})
        manifest = layout.manifest(stage, batch)
        contents = Contents(layout, stage, batch)

        def make(name: str, contents: Contents = contents) -> dict[str, object]:
            return contents.add(name, {"key": "k"})

        process_runs(stage, names, make, manifest, 0)
    return layout


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config(tmp_path, compute={"batches": 2})


def damage(layout: Layout) -> dict[str, Path]:
    """One store of each kind of trouble."""
    stores = {kind: layout.array("tokens", f"sub-{n:02d}_task-rest") for n, kind in NUMBERED}
    shutil.rmtree(stores["missing"])
    values = stores["changed"] / "values/c.0.0.0"
    values.write_text(values.read_text().replace("sub", "SUB", 1))
    (stores["shorter"] / "values/c.0.0.0").write_text("")
    shutil.copytree(stores["whole"], stores["whole"].with_name("sub-99_task-rest.zarr"))
    (stores["whole"].with_name(".tmp-1234-sub-98_task-rest.zarr")).mkdir()
    return stores


NUMBERED = list(enumerate(["missing", "changed", "shorter", "whole"]))


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_whole_dataset_passes_and_tells_what_was_read(config: Config, jobs: int):
    layout = write_stage(config, "tokens")
    size = sum(content_table(layout.manifest("tokens", batch))["bytes"].sum() for batch in (0, 1))
    said = run_verify(config, "toy", ["tokens"], jobs=jobs)
    assert f"tokens: 6 runs, 12 files, {size / 1e9:.3f} GB read at " in said


@pytest.mark.parametrize("jobs", [1, 4])
def test_all_that_is_wrong_is_told_with_the_cure(config: Config, tmp_path: Path, jobs: int):
    stores = damage(write_stage(config, "tokens"))
    with pytest.raises(InputError) as caught:
        run_verify(config, "toy", ["tokens"], jobs=jobs, output=tmp_path / "wrong.tsv")
    message = str(caught.value)
    assert "5 problems" in message
    manifest = Layout.of(config, "toy").manifest("tokens", 0)
    assert f"{stores['missing']}: listed in {manifest}" in message
    assert "--discard forgets them" in message
    table = read_table(tmp_path / "wrong.tsv").set_index("name")
    assert table["problem"].value_counts().to_dict() == {"missing": 1, "changed": 2, "surplus": 2}
    assert table["detail"][str(stores["changed"])].startswith("sha256 ")
    assert table["detail"][str(stores["shorter"])].startswith("bytes ")


def test_discard_removes_what_is_damaged_and_its_lists_alone(config: Config):
    layout = write_stage(config, "tokens")
    stores = damage(layout)
    with pytest.raises(InputError, match="5 problems"):
        run_verify(config, "toy", ["tokens"], discard=True)
    left = {kind for kind, store in stores.items() if store.exists()}
    assert left == {"whole"}
    assert not any(layout.manifest("tokens", batch).exists() for batch in (0, 1))
    assert layout.array("tokens", "sub-99_task-rest").exists()  # of which nothing is known


def test_without_discard_nothing_is_removed(config: Config):
    layout = write_stage(config, "tokens")
    damage(layout)
    before = sorted(Path(config.results).rglob("*"))
    with pytest.raises(InputError):
        run_verify(config, "toy", ["tokens"])
    assert sorted(Path(config.results).rglob("*")) == before


def test_quick_sees_sizes_and_keys(config: Config):
    layout = write_stage(config, "tokens")
    stores = damage(layout)
    other = layout.array("tokens", "sub-04_task-rest")
    write_json(other / "zarr.json", {"attributes": {"key": "b"}})
    with pytest.raises(InputError, match="5 problems") as caught:
        run_verify(config, "toy", ["tokens"], quick=True)
    assert f"{other}: key b, not k" in str(caught.value)
    assert str(stores["changed"]) not in str(caught.value)
    assert str(stores["shorter"]) in str(caught.value)


def test_a_batch_alone_knows_nothing_of_surplus_stores(config: Config):
    layout = write_stage(config, "tokens")
    shutil.rmtree(layout.array("tokens", "sub-01_task-rest"))  # of batch 1
    assert "tokens: 3 runs" in run_verify(config, "toy", ["tokens"], batches=[0])
    with pytest.raises(InputError, match="1 problems"):
        run_verify(config, "toy", ["tokens"], batches=[1])


@pytest.mark.parametrize("folds", [1, 3])
def test_codes_and_images_are_checked_where_they_have_been_made(tmp_path: Path, folds: int):
    split = {"splits": {"protocol": "k-fold", "folds": folds}} if folds > 1 else {}
    own = {"tokenizer": "slices"}
    config = make_config(tmp_path, compute={"batches": 2}, codes=own, **split)
    for stage in BATCHED:
        write_stage(config, stage)
    write_stage(config, "anat")
    assert "codes" not in run_verify(config, "toy")
    with pytest.raises(InputError, match="does not exist; finish the stage first"):
        run_verify(config, "toy", ["codes"])
    places = [write_stage(config.in_fold(name), "codes") for name in config.splits.names]
    found = run_verify(config, "toy")
    assert found.count("codes: 6 runs, 12 files") == folds
    assert found.count("anat: 6 runs, 12 files") == 1
    values = places[-1].array("codes", "sub-03_task-rest") / "values/c.0.0.0"
    values.write_text(values.read_text().replace("sub", "SUB", 1))
    with pytest.raises(InputError, match=f"1 changed.*\n  {values.parents[1]}: sha256"):
        run_verify(config, "toy", ["codes"], discard=True)
    assert not places[-1].manifest("codes", 1).exists()
    assert places[-1].manifest("codes", 0).exists()


def test_a_long_list_is_cut_and_says_so(config: Config):
    layout = write_stage(config, "tokens", runs=2 * SHOWN)
    shutil.rmtree(layout.array("tokens", "x").parent / "sub-00_task-rest.zarr")
    for store in layout.array("tokens", "x").parent.glob("*.zarr"):
        shutil.rmtree(store)
    with pytest.raises(InputError, match=f"and {SHOWN} more; --output FILE") as caught:
        run_verify(config, "toy", ["tokens"])
    assert str(caught.value).count("listed in") == SHOWN


def test_without_manifest_or_digest_it_says_what_to_do(config: Config):
    layout = write_stage(config, "tokens")
    manifest = layout.manifest("tokens", 0)
    manifest.write_text("run\treason\tkey\nsub-00_task-rest\tn/a\ta\n")
    with pytest.raises(InputError, match=r"batch-0\.tsv lacks digests; delete it"):
        run_verify(config, "toy", ["tokens"])
    with pytest.raises(InputError, match=r"rois/batch-0\.tsv does not exist; finish the stage"):
        run_verify(config, "toy", ["rois"])


# --- Arrays elsewhere -----------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> tuple[Config, Path]:
    """Two runs through all data stages, with their arrays on another file system, so to say."""
    arrays = tmp_path / "scratch" / "of-mine"
    config = make_config(tmp_path).model_copy(update={"arrays": str(arrays)})
    rows = [write_run(tmp_path / "raw", f"sub-0{n}_task-rest", series(seed=n)) for n in (1, 2)]
    write_index(config, rows)
    for stage in (run_volumes, run_tokens, run_rois):
        stage(config, "toy", 0)
    return config, arrays


def test_only_tables_stay_under_results(made: tuple[Config, Path]):
    config, arrays = made
    assert {path.suffix for path in Path(config.results).rglob("*") if path.is_file()} == {".tsv"}
    assert not list(Path(config.results).rglob("*.zarr"))
    stores = sorted(path.relative_to(arrays).as_posix() for path in arrays.glob("toy/*/*"))
    names = ["sub-01_task-rest.zarr", "sub-02_task-rest.zarr"]
    assert stores == sorted(f"toy/{stage}/{name}" for stage in BATCHED for name in names)
    TokenStore(Layout.of(config, "toy").array("tokens", "sub-01_task-rest")).window(0, 2)


def test_a_variable_in_the_path_is_refused_because_nobody_would_expand_it(tmp_path: Path):
    settings = make_config(tmp_path).model_dump(mode="json")
    with pytest.raises(ValidationError, match="arrays"):
        Config.model_validate({**settings, "arrays": "$SCRATCH/neuromamba"})


def test_moved_arrays_are_the_same_dataset(made: tuple[Config, Path], tmp_path: Path):
    config, arrays = made
    moved = arrays.rename(tmp_path / "archive")
    with pytest.raises(InputError, match="6 problems"):
        run_verify(config, "toy")
    said = run_verify(config.model_copy(update={"arrays": str(moved)}), "toy", sources=True)
    assert [line.split(":")[0] for line in said.splitlines()] == [*BATCHED, "sources"]


def test_discarded_stores_are_made_again_to_the_same_bytes(made: tuple[Config, Path]):
    config, _ = made
    layout = Layout.of(config, "toy")
    before = layout.manifest("tokens", 0).read_text()
    change(next(layout.array("tokens", "sub-01_task-rest").glob("values/c.*")))
    with pytest.raises(InputError, match="1 problems"):
        run_verify(config, "toy", discard=True)
    run_tokens(config, "toy", 0)
    assert layout.manifest("tokens", 0).read_text() == before
    run_verify(config, "toy")


def test_making_a_store_again_gives_the_same_bytes(made: tuple[Config, Path]):
    config, _ = made
    store = Layout.of(config, "toy").array("volumes", "sub-01_task-rest")
    before = digest_store(store)
    shutil.rmtree(store)
    run_volumes(config, "toy", 0)
    assert digest_store(store) == before
    run_verify(config, "toy")


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change, "is not the file the volumes were made from"),
        (Path.unlink, "cannot be read"),
    ],
)
def test_sources_that_changed_are_told(
    made: tuple[Config, Path], spoil: Callable[[Path], None], words: str
):
    config, _ = made
    bold = Path(read_table(Layout.of(config, "toy").index)["bold"][0])
    spoil(bold)
    run_verify(config, "toy")
    with pytest.raises(InputError, match=f"1 problems(.|\n)*{bold}: {words}"):
        run_verify(config, "toy", sources=True)


def test_the_command_ends_with_status_2_and_the_list(
    made: tuple[Config, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, arrays = made
    save_config(tmp_path / "config.yaml", config)
    command = ["verify", "--config", str(tmp_path / "config.yaml"), "--dataset", "toy"]
    assert main([*command, "--jobs", "2"]) == 0
    assert "rois: 2 runs" in capsys.readouterr().out
    change(next((arrays / "toy/rois/sub-01_task-rest.zarr").rglob("c/*/*")))
    assert main([*command, "--stage", "volumes", "tokens"]) == 0
    assert main([*command, "--stage", "rois"]) == 2
    assert "sub-01_task-rest.zarr: sha256 " in capsys.readouterr().err


def test_a_problem_table_without_problems_is_empty(config: Config, tmp_path: Path):
    write_stage(config, "rois")
    run_verify(config, "toy", ["rois"], output=tmp_path / "wrong.tsv")
    assert isinstance(table := read_table(tmp_path / "wrong.tsv"), pd.DataFrame)
    assert table.empty
