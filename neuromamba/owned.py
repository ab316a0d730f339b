"""A folder in which one process writes: the last one that came.

A node that the cluster has given up may live on, and the training on it, while its successor runs
on another one. Of the two only the successor may change anything.

How it is kept
--------------
- All that a process writes begins in a hidden folder of its own, `.tmp-owner-<random>`, and is
  renamed from there to its place. What it removes is renamed into there first.
- A newcomer makes its folder, then removes those of all others. From then on no rename of theirs
  can succeed, for its source or its goal is gone. The file system does a rename in one step, so
  there is no moment between looking who owns the folder and writing to it.
- A growing file is put in its place by such a rename and then written through a handle that stays
  open: when a newcomer puts another one there, the rows of the older process go to a file that has
  no name any more.
- Of two that come at the same moment, each may remove the other's folder. Then both end.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuromamba.files import InputError

_OWNER = ".tmp-owner-"


class TakenOverError(InputError):
    """A later process has begun to write in a folder, so this one must not."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: a later process has taken this folder over, so this one ends and leaves "
            "everything there as it is; nothing needs to be done"
        )


class OwnedFolder:
    """The right to write in a folder, for as long as no other process claims it.

    Parameters
    ----------
    path
        The folder, which need not exist. Those that claimed it before lose it.
    claims
        False in all of several processes that train together but one: these write nothing.
    """

    def __init__(self, path: Path, claims: bool = True) -> None:
        self.path = path
        self._own = path / f"{_OWNER}{uuid.uuid4().hex}"
        if claims:
            self._own.mkdir(parents=True)
            for other in path.glob(f"{_OWNER}*"):
                if other != self._own:
                    # Renamed first, for to remove a folder and all in it takes more than one step.
                    self.remove(other)

    def check(self) -> None:
        """Raise `TakenOverError` when another process has claimed the folder."""
        if not self._own.is_dir():
            raise TakenOverError(self.path)

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Yield a temporary path, and rename it to `path` when the block succeeds.

        The block makes a file or a folder there; what stood at `path` is replaced. When it raises,
        what it made is removed.

        Parameters
        ----------
        path
            In the folder, or in one that it holds.

        Raises
        ------
        TakenOverError
            When another process claims the folder before the end.
        """
        self.check()
        temporary = self._new(path.name)
        try:
            yield temporary
            if not path.parent.is_dir():
                folder = self._new(path.parent.name)
                folder.mkdir()
                folder.rename(path.parent)
            if path.is_dir() and not path.is_symlink():
                self.remove(path)
            temporary.rename(path)
        except Exception:
            self.check()
            raise
        finally:
            _discard(temporary)

    def remove(self, path: Path) -> None:
        """Remove a file, a link, or a folder with all in it; `TakenOverError` as for `writing`."""
        self.check()
        try:
            taken = self._take(path)
        except FileNotFoundError:
            self.check()
            return
        _discard(taken)

    def release(self) -> None:
        """Leave no trace of having owned the folder."""
        shutil.rmtree(self._own, ignore_errors=True)

    def _new(self, name: str) -> Path:
        return self._own / f"{uuid.uuid4().hex[:8]}-{name}"

    def _take(self, path: Path) -> Path:
        return path.rename(self._new(path.name))


@contextmanager
def own(path: Path, claims: bool = True) -> Iterator[OwnedFolder]:
    """Own a folder within a block."""
    folder = OwnedFolder(path, claims)
    try:
        yield folder
    finally:
        folder.release()


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
