"""Check the Zarr stores of a dataset against the digests in its manifests.

Design choices
--------------
- The manifests are what is right. Every store that they list is read whole, in threads: reading
  and digesting let other threads run meanwhile.
- Problems are collected, not raised one by one: after a purge of a scratch file system one wants
  the whole list.
- Nothing is repaired here. What is damaged is discarded when asked for, and the stages make it
  again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from neuromamba.config import Config
from neuromamba.contents import content_table, digest_store, measure_store
from neuromamba.files import InputError, digest_file, read_json
from neuromamba.layout import Layout
from neuromamba.tables import read_table, write_table

SHOWN = 20
"""Problems of one kind that the error message lists."""
SOURCES = {
    "volumes": {"bold": "source_sha256", "mask": "mask_sha256"},
    "rois": {"bold": "source_sha256"},
}
"""By what is made of a run first: columns of the index, and the attributes with their digests."""
AGAIN = "--discard forgets them; `snakemake all` then makes them again"
OPTIONAL = ("anat", "codes")
"""Stages that not every model asks for: they are checked where they have been made."""
CURES = {
    "missing": AGAIN,
    "changed": AGAIN,
    "surplus": "no manifest lists them; delete them while no job is running",
    "source": "copy them again; or, if they were meant to change, start again from the index",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a kind of `CURES`, a path or run, and the manifest that lists it."""

    kind: str
    name: str
    detail: str
    manifest: str | None = None


@dataclass(frozen=True)
class Found:
    """What was found at one store, or at one run's sources."""

    files: int = 0
    bytes: int = 0
    problems: Sequence[Problem] = ()


def run_verify(
    config: Config,
    dataset: str,
    stages: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    jobs: int = 1,
    sources: bool = False,
    quick: bool = False,
    output: Path | None = None,
    discard: bool = False,
) -> str:
    """Check the stores that the manifests of some stages list.

    Parameters
    ----------
    config, dataset
        The run, and which of its datasets.
    stages
        `None`: the dataset's `arrays`, and T1w images and codes where there are any. Codes of a
        tokenizer that each fold has trained are checked fold by fold.
    batches
        Numbers of the batches to check; `None`: all of them, and that there are no other stores.
    jobs
        Threads.
    sources
        Check also the BOLD files and masks of the index, by the digests that the volumes keep; or
        the tables of ROI series.
    quick
        Compare only keys, numbers of files and sizes: damage inside of a file is not seen.
    output
        Where to write a table of all problems (`problem`, `name`, `detail`).
    discard
        Remove the stores that have changed, and the manifests of the batches in which something has
        changed or is missing, so that the workflow makes them again.

    Returns
    -------
    str
        What was checked, and how fast.

    Raises
    ------
    InputError
        Listing what is missing, changed or surplus; or when a manifest is absent or has no digests.
    """
    layout, arrays = Layout.of(config, dataset), config.datasets[dataset].arrays
    chosen = range(config.compute.batches) if batches is None else batches
    places = _places(config, dataset, stages, chosen)
    tables = [(stage, place, _contents(place, stage, chosen)) for stage, place in places]
    problems: list[Problem] = []
    lines: list[str] = []
    with ThreadPoolExecutor(jobs) as pool:
        for stage, place, table in tables:
            check = partial(_check_store, place, stage, quick)
            _work(pool, stage, check, table.to_dict("records"), quick, problems, lines)
            if batches is None:
                problems += _surplus(place, stage, set(table["run"]))
        if sources:
            paths = read_table(layout.index, dtype=str)[["run", "bold", "mask"]]
            table = _contents(layout, arrays[0], chosen)[["run"]].merge(paths, "left", on="run")
            check = partial(_check_source, layout, arrays[0], quick)
            _work(pool, "sources", check, table.to_dict("records"), quick, problems, lines)
    if output is not None:
        rows = [(problem.kind, problem.name, problem.detail) for problem in problems]
        write_table(output, pd.DataFrame(rows, columns=["problem", "name", "detail"]))
    if discard:
        _discard(problems)
    if problems:
        raise InputError("\n".join([f"{len(problems)} problems", *_explain(problems), *lines]))
    return "\n".join(lines)


def _places(
    config: Config, dataset: str, stages: Sequence[str] | None, batches: Sequence[int]
) -> list[tuple[str, Layout]]:
    """The stages to check, and where: in one place, but for codes that are each fold's own."""
    arrays, places = config.datasets[dataset].arrays, []
    for stage in stages or (*arrays, *OPTIONAL):
        own = stage == "codes" and config.codes.trained
        for fold in config.splits.names if own else [""]:
            place = Layout.of(config.in_fold(fold), dataset)
            made = any(place.manifest(stage, batch).exists() for batch in batches)
            if stages or stage in arrays or made:
                places.append((stage, place))
    return places


def _contents(layout: Layout, stage: str, batches: Iterable[int]) -> pd.DataFrame:
    """What the manifests of a stage list; refuse those without digests."""
    tables = []
    for batch in batches:
        manifest = layout.manifest(stage, batch)
        if not manifest.exists():
            raise InputError(
                f"{manifest} does not exist; finish the stage first, or choose others by --stage"
            )
        table = content_table(manifest)
        if table.isna().any(axis=None):
            raise InputError(
                f"{manifest} lacks digests; delete it, and `snakemake all` writes it again"
            )
        tables.append(table.assign(manifest=str(manifest)))
    return pd.concat(tables, ignore_index=True)


def _work(
    pool: ThreadPoolExecutor,
    what: str,
    check: Callable[[dict[str, Any]], Found],
    rows: Sequence[dict[Any, Any]],
    quick: bool,
    problems: list[Problem],
    lines: list[str],
) -> None:
    """Check all rows in threads, with progress; add to `problems` and `lines`."""
    start, files, size = time.perf_counter(), 0, 0
    shown = tqdm(pool.map(check, rows), what, total=len(rows), unit="run", mininterval=1.0)
    for found in shown:
        files += found.files
        size += found.bytes
        problems += found.problems
    seconds = time.perf_counter() - start
    how = "compared by size" if quick else f"read at {size / 1e6 / seconds:.0f} MB/s"
    lines.append(
        f"{what}: {len(rows)} runs, {files} files, {size / 1e9:.3f} GB {how} in {seconds:.1f} s"
    )


def _check_store(layout: Layout, stage: str, quick: bool, row: dict[str, Any]) -> Found:
    store = layout.array(stage, row["run"])

    def problem(kind: str, detail: str) -> Problem:
        return Problem(kind, str(store), f"{detail}{row['manifest']}", row["manifest"])

    if not store.is_dir():
        return Found(problems=[problem("missing", "listed in ")])
    try:
        now = _glance(store) if quick else digest_store(store)
    except (OSError, InputError) as error:
        return Found(problems=[problem("changed", f"cannot be read ({error}); listed in ")])
    wrong = [f"{name} {now[name]}, not {row[name]}" for name in now if now[name] != row[name]]
    problems = [problem("changed", f"{'; '.join(wrong)}; listed in ")] if wrong else []
    return Found(now["files"], now["bytes"], problems)


def _glance(store: Path) -> dict[str, Any]:
    """The size of a store, and the key that tells what it was made from."""
    attributes = read_json(store / "zarr.json").get("attributes", {})
    return {**measure_store(store), "key": attributes.get("key")}


def _check_source(layout: Layout, stage: str, quick: bool, row: dict[str, Any]) -> Found:
    """Compare a run's sources with the digests in the attributes of what was made of them first."""
    files = size = 0
    problems = []
    try:
        attributes = read_json(layout.array(stage, row["run"]) / "zarr.json")["attributes"]
    except (InputError, KeyError) as error:
        return Found(problems=[Problem("source", row["run"], f"its digests are lost ({error})")])
    for column, key in SOURCES[stage].items():
        if pd.isna(row[column]):
            problems.append(Problem("source", row["run"], f"has no {column} in the index any more"))
            continue
        path = Path(row[column])
        try:
            size += path.stat().st_size
            files += 1
            if not quick and digest_file(path) != attributes[key]:
                detail = f"is not the file the {stage} were made from"
                problems.append(Problem("source", str(path), detail))
        except OSError as error:
            problems.append(Problem("source", str(path), f"cannot be read ({error})"))
    return Found(files, size, problems)


def _surplus(layout: Layout, stage: str, runs: set[str]) -> list[Problem]:
    """Stores, and what killed jobs have left, that no manifest lists."""
    folder = layout.array(stage, "any").parent
    known = {layout.array(stage, run).name for run in runs}
    problems = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        if entry.name.startswith(".tmp-"):
            problems.append(Problem("surplus", str(entry), "left by a job that was killed"))
        elif entry.suffix == ".zarr" and entry.name not in known:
            problems.append(Problem("surplus", str(entry), "in no manifest"))
    return problems


def _discard(problems: Sequence[Problem]) -> None:
    for problem in problems:
        if problem.manifest is not None:
            Path(problem.manifest).unlink(missing_ok=True)
            if problem.kind == "changed":
                shutil.rmtree(problem.name)


def _explain(problems: Sequence[Problem]) -> list[str]:
    """The problems by kind, with what to do about each kind."""
    lines = []
    for kind, cure in CURES.items():
        of_kind = [f"  {one.name}: {one.detail}" for one in problems if one.kind == kind]
        if of_kind:
            lines += [f"{len(of_kind)} {kind} ({cure}):", *of_kind[:SHOWN]]
        if len(of_kind) > SHOWN:
            lines.append(f"  and {len(of_kind) - SHOWN} more; --output FILE writes all of them")
    return lines
