"""Writes are whole or not there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from neuromamba.files import InputError, atomic_path, digest_json, read_json, write_json, write_text
from neuromamba.tables import read_table, write_table


def write_half(path: Path, folder: bool) -> None:
    """Begin to write a file or a folder, and fail."""
    with atomic_path(path) as temporary:
        if folder:
            temporary.mkdir()
        else:
            temporary.write_text("half")
        raise OSError("the disk is full")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match="full"):
        write_half(tmp_path / "a.txt", folder=False)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert entries(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path):
    for content in ("first", "second"):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert entries(tmp_path / "folder") == ["second"]
    assert entries(tmp_path) == ["folder"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path):
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "old").touch()
    with pytest.raises(OSError, match="full"):
        write_half(tmp_path / "folder", folder=True)
    assert entries(tmp_path / "folder") == ["old"]
    assert entries(tmp_path) == ["folder"]


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path: Path):
    code = (
        "import os, signal, sys\n"
        "from neuromamba.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "result.txt")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "result.txt").exists()
    assert all(name.startswith(".tmp-") for name in entries(tmp_path))


def test_json_round_trip_and_its_errors(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None]})
    assert read_json(path) == {"b": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert read_json(path) == {"b": [1, 2.5, None]}
    path.write_text("{")
    with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
        read_json(path)
    with pytest.raises(InputError, match=r"b\.json does not exist"):
        read_json(tmp_path / "b.json")


def test_tables_keep_missing_values_and_leading_zeros(tmp_path: Path):
    table = pd.DataFrame({"id": ["0050", "NA"], "value": [1.5, None]})
    write_table(tmp_path / "a.tsv", table)
    assert (tmp_path / "a.tsv").read_text() == "id\tvalue\n0050\t1.5\nNA\tn/a\n"
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.tsv", dtype={"id": str}), table)
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(InputError, match="not a readable table"):
        read_table(tmp_path / "empty.tsv")


def test_the_digest_of_settings_does_not_depend_on_their_order():
    assert digest_json({"a": 1, "b": 2}) == digest_json({"b": 2, "a": 1})
    assert digest_json({"a": 1}) != digest_json({"a": 2})
