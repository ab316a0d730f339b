"""What the Zarr stores of the data stages hold, to the byte: file counts, sizes and digests.

The manifest of each batch carries them, so that a dataset can be versioned by its manifests alone
and checked against them, wherever its arrays lie and however large they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.files import digest_file
from neuromamba.layout import Layout
from neuromamba.tables import read_table

CONTENT_COLUMNS = ("files", "bytes", "sha256")
MADE_OF = "zarr.json"
"""The file of a store that is written last."""


def list_files(store: Path) -> list[tuple[str, Path]]:
    """The files of a store: path relative to it, with `/`, in the order of the paths' bytes."""
    files = [path for path in store.rglob("*") if not path.is_dir()]
    return sorted((path.relative_to(store).as_posix(), path) for path in files)


def measure_store(store: Path) -> dict[str, int]:
    """Number of `files` and sum of their `bytes`, without reading them."""
    sizes = [path.stat().st_size for _, path in list_files(store)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def digest_store(store: Path) -> dict[str, Any]:
    """Measure a store, and digest it: `files`, `bytes` and `sha256`.

    The digest is that of the list that `sha256sum` prints for the files in the order of their
    names. By coreutils, in the store's folder:

        find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum

    Files are read in pieces, so memory does not grow with their size.

    Raises
    ------
    OSError
        When a file cannot be read.
    """
    listing = hashlib.sha256()
    for name, path in list_files(store):
        listing.update(f"{digest_file(path)}  {name}\n".encode())
    return {**measure_store(store), "sha256": listing.hexdigest()}


class Contents:
    """The contents of the stores of one batch, which are digested only once.

    The file `Layout.digests` remembers them, because Snakemake removes a manifest before its job
    runs again. A store whose key, number of files, size or date is another is digested again.
    """

    def __init__(self, layout: Layout, stage: str, batch: int):
        self._layout, self._stage = layout, stage
        self._memory = layout.digests(stage, batch)
        self._known = _remembered(self._memory)

    def add(self, run: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The manifest's row of a run whose store is whole: `facts` and `CONTENT_COLUMNS`.

        Parameters
        ----------
        run
            The run.
        facts
            Its facts, with `key`, which tells what the store was made from.
        """
        store = self._layout.array(self._stage, run)
        date = (store / MADE_OF).stat().st_mtime_ns
        now = {"run": run, "key": facts["key"], "mtime_ns": date, **measure_store(store)}
        known = self._known.get(run, {})
        if any(known.get(name) != value for name, value in now.items()) or "sha256" not in known:
            known = now | digest_store(store)
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with self._memory.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(known) + "\n")
        return facts | {name: known[name] for name in CONTENT_COLUMNS}


def _remembered(memory: Path) -> dict[str, dict[str, Any]]:
    """What was last written of each run."""
    known: dict[str, dict[str, Any]] = {}
    for line in memory.read_text().splitlines() if memory.exists() else []:
        try:
            row = json.loads(line)
            known[row["run"]] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a job was killed while it wrote this line
    return known


def content_table(manifest: Path) -> pd.DataFrame:
    """The usable runs of a manifest: `run`, `key` and `CONTENT_COLUMNS`.

    Raises
    ------
    InputError
        When there is no such manifest.
    """
    table = read_table(manifest, dtype={"run": str, "reason": str, "key": str, "sha256": str})
    table = table[table["reason"].isna()]
    return table.reindex(columns=["run", "key", *CONTENT_COLUMNS])
