"""Digests of stores: what they are, when they change, and when they are not taken again."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from neuromamba import contents
from neuromamba.contents import Contents, content_table, digest_store
from neuromamba.layout import Layout


def write_store(store: Path, fill: bytes = b"values") -> Path:
    for name, content in {
        "zarr.json": b"{}",
        "bold/c/0/0": fill * 1000,
        "bold/c/1/0": fill * 10,
        "bold/zarr.json": b"{ }",
        "bold-2/zarr.json": b"",
    }.items():
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return store


def layout_of(folder: Path) -> Layout:
    return Layout(folder, "toy", folder / "arrays")


def row_of(layout: Layout, key: str = "a") -> dict[str, Any]:
    return Contents(layout, "tokens", 0).add("run", {"key": key, "n_tokens": 5})


def test_the_digest_is_what_coreutils_say(tmp_path: Path):
    store = write_store(tmp_path / "a.zarr")
    command = "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    printed = subprocess.run(
        ["bash", "-c", command], cwd=store, capture_output=True, check=True, text=True
    ).stdout
    assert digest_store(store) == {"files": 5, "bytes": 6065, "sha256": printed.split()[0]}
    assert command.replace("\\", "\\\\") in Path(contents.__file__).read_text()


@pytest.mark.parametrize("change", ["content", "name", "removed", "added", "moved between files"])
def test_the_digest_notices_every_change_and_nothing_else(tmp_path: Path, change: str):
    store = write_store(tmp_path / "a.zarr")
    before = digest_store(store)
    moved = tmp_path / "elsewhere" / "b.zarr"
    shutil.copytree(store, moved)
    assert digest_store(moved) == before
    first, second = store / "bold/c/0/0", store / "bold/c/1/0"
    match change:
        case "content":
            first.write_bytes(b"Values" + first.read_bytes()[6:])
        case "name":
            first.rename(first.with_name("1"))
        case "removed":
            second.unlink()
        case "added":
            (store / "stray").touch()
        case "moved between files":
            whole = first.read_bytes()
            first.write_bytes(whole[:-6])
            second.write_bytes(whole[-6:] + second.read_bytes())
    assert digest_store(store)["sha256"] != before["sha256"]


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stores that were read to be digested."""
    names: list[str] = []

    def digest(store: Path) -> dict[str, Any]:
        names.append(store.name)
        return digest_store(store)

    monkeypatch.setattr(contents, "digest_store", digest)
    return names


def test_a_store_is_not_read_again_for_the_next_manifest(tmp_path: Path, digested: list[str]):
    layout = layout_of(tmp_path)
    store = write_store(layout.array("tokens", "run"))
    first = row_of(layout)
    assert first == {"key": "a", "n_tokens": 5, **digest_store(store)}
    assert row_of(layout) == first
    assert digested == ["run.zarr"]


@pytest.mark.parametrize("reason", ["key", "size", "date", "no memory"])
def test_a_store_that_may_be_another_one_is_read_again(
    tmp_path: Path, digested: list[str], reason: str
):
    layout = layout_of(tmp_path)
    store = write_store(layout.array("tokens", "run"))
    row_of(layout)
    match reason:
        case "size":
            (store / "bold/c/1/0").write_bytes(b"")
        case "date":
            date = (store / "zarr.json").stat().st_mtime_ns
            write_store(store, b"valueS")
            os.utime(store / "zarr.json", ns=(date + 1, date + 1))
        case "no memory":
            layout.digests("tokens", 0).unlink()
    row = row_of(layout, key="b" if reason == "key" else "a")
    assert digested == ["run.zarr", "run.zarr"]
    assert row["sha256"] == digest_store(store)["sha256"]
    assert row_of(layout, key=row["key"]) == row
    assert len(digested) == 2


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path, digested: list[str]):
    layout = layout_of(tmp_path)
    write_store(layout.array("tokens", "run"))
    row = row_of(layout)
    memory = layout.digests("tokens", 0)
    memory.write_text(memory.read_text() + '{"run": "run", "key": "a", "fil')
    assert row_of(layout) == row
    assert digested == ["run.zarr"]


def test_a_manifest_of_before_the_digests_is_read(tmp_path: Path):
    manifest = tmp_path / "batch-0.tsv"
    manifest.write_text("run\treason\tkey\nrun\tn/a\ta\nbad\ttruncated\tn/a\n")
    table = content_table(manifest)
    assert table["run"].tolist() == ["run"]
    assert table["sha256"].isna().all()
