"""The last process that came to a folder writes there; what an older one does, changes nothing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import kills
import pytest

from neuromamba.owned import OwnedFolder, TakenOverError, own

pytestmark = pytest.mark.usefixtures("forkserver")
PRELOAD = "kills"
CONTEXT = multiprocessing.get_context("forkserver")


def content(folder: Path) -> dict[str, bytes]:
    """All that is in a folder: files by their bytes, links by their goal, empty folders."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.fsencode(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[name] = b"empty"
    return found


# --- One after the other --------------------------------------------------------------------------


def test_what_is_written_appears_whole_and_replaces_what_was_there(tmp_path):
    with own(tmp_path / "training") as folder:
        for text in ("old", "new"):
            with folder.writing(folder.path / "below" / "one") as temporary:
                temporary.mkdir()
                (temporary / text).write_text(text)
            with folder.writing(folder.path / "file") as temporary:
                temporary.write_text(text)
                assert text not in {path.name for path in folder.path.iterdir()}
        folder.remove(folder.path / "was never there")
    assert content(tmp_path / "training") == {"below/one/new": b"new", "file": b"new"}


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    with own(tmp_path) as folder:
        with folder.writing(tmp_path / "file") as temporary:
            temporary.write_text("old")
        with contextlib.suppress(ZeroDivisionError), folder.writing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    assert content(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_older_process_cannot_finish_what_it_was_writing(tmp_path, kind):
    old = OwnedFolder(tmp_path)
    writing = old.writing(tmp_path / "below" / "it")
    temporary = writing.__enter__()
    if kind == "folder":
        temporary.mkdir()
        temporary /= "in it"
    temporary.write_text("old")
    OwnedFolder(tmp_path).release()
    with pytest.raises(TakenOverError, match="a later process has taken this folder over"):
        writing.__exit__(None, None, None)
    assert content(tmp_path) == {}


def test_an_older_process_can_neither_begin_to_write_nor_remove(tmp_path):
    old, new = OwnedFolder(tmp_path), OwnedFolder(tmp_path)
    with new.writing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    for act in (old.check, lambda: old.remove(tmp_path / "file")):
        with pytest.raises(TakenOverError):
            act()
    with pytest.raises(TakenOverError), old.writing(tmp_path / "file"):
        pytest.fail("it was let in")
    old.release()
    new.release()
    assert content(tmp_path) == {"file": b"new"}


# --- Two trainings at once ------------------------------------------------------------------------


def start(folder: Path, *stop: int):
    hear, pipe = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=kills.run, args=(folder, pipe, *(stop or [None])))
    process.start()
    pipe.close()
    assert hear.recv()
    return process, hear


def is_stopped(process) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process, _ = start(folder)
    process.join(60)
    assert process.exitcode == 0
    return folder


FILES = ["model.safetensors", "last.safetensors", "snapshots/step-00000080/model.safetensors"]


@pytest.mark.parametrize("moment", [25, 47, 101, 136, 203, 333, 649, 1000])
def test_a_training_that_wakes_up_after_its_successor_changes_nothing(tmp_path, whole, moment):
    """It sleeps at some touch of a file: amid a checkpoint, its renames, the removal of another."""
    old, hear = start(tmp_path, moment, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while not is_stopped(old):
        assert time.monotonic() < deadline
        assert old.exitcode is None
        time.sleep(0.02)
    new, _ = start(tmp_path)
    new.join(60)
    assert new.exitcode == 0
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    before = content(tmp_path)
    os.kill(old.pid, signal.SIGCONT)
    old.join(60)
    assert old.exitcode == 2
    assert "a later process has taken this folder over" in hear.recv()
    assert content(tmp_path) == before
    assert not [name for name in before if ".tmp-" in name]


def test_a_successor_ends_a_training_that_is_going_on(tmp_path, whole):
    old, hear = start(tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "step-00000003").exists():
        assert time.monotonic() < deadline
    new, _ = start(tmp_path)
    for process in (old, new):
        process.join(60)
    assert (old.exitcode, new.exitcode) == (2, 0)
    assert "a later process has taken this folder over" in hear.recv()
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert not list(tmp_path.rglob(".tmp-*"))
