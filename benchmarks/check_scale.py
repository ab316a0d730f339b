"""How long does it take to tell what of a raw dataset can be used, and with how much memory?

    python benchmarks/check_scale.py                                    # 10,000 subjects, 2 minutes
    python -m venv /tmp/rivals && /tmp/rivals/bin/pip install pybids bids2table
    python benchmarks/check_scale.py --rivals /tmp/rivals/bin/python    # and their ways, 10 minutes

A tree of tiny subjects is made: BOLD with its sidecar, T1w with its sidecar, an events table, one
sidecar at the top that all runs inherit, and a table of subjects. Every file is one of its own.
Each side finds all runs and looks up their numbers of volumes and repetition times, by the
inheritance principle where it knows it:

- ours: `neuromamba check`, which also judges each T1w image, the times of the slices, the ends of
  the files, the labels, and the split.
- walk: `os.walk`, `nibabel.load` of each BOLD file, and the sidecar beside it alone.
- bids2table: its index, `nibabel.load` of each BOLD file, and its own lookup of metadata.
- pybids: a `BIDSLayout` without validation, `nibabel.load` and `get_metadata` of each BOLD file.

All sides must find the same. Each is a process of its own for each round, and the file cache is
warm for all of them. Goal: ours under 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import nibabel
import numpy as np
from common import RESULTS, head, machine, peak_mb, run_command, seconds, write_results

GOAL = 5.0
VOLUMES = 200
TASK = "task-rest"
INHERITED = {"TaskName": "rest", "RepetitionTime": 2.0, "SliceEncodingDirection": "k"}
OWN = {"EchoTime": 0.03, "SliceTiming": [0.0, 1.0]}


# --- The tree -------------------------------------------------------------------------------------


def make_tree(folder: Path, subjects: int) -> None:
    """Write a raw dataset."""
    folder.mkdir()
    bold, t1w = image(folder, (2, 2, 2, VOLUMES), 2.0), image(folder, (4, 4, 4), 1.0)
    description = {"Name": "tiny", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (folder / "dataset_description.json").write_text(json.dumps(description))
    (folder / f"{TASK}_bold.json").write_text(json.dumps(INHERITED))
    rows = ["participant_id\tsex\tsite"]
    for number in range(subjects):
        name = f"sub-{number:06}"
        func, anat = folder / name / "func", folder / name / "anat"
        func.mkdir(parents=True)
        anat.mkdir()
        (func / f"{name}_{TASK}_bold.nii.gz").write_bytes(bold)
        (func / f"{name}_{TASK}_bold.json").write_text(json.dumps(OWN))
        (func / f"{name}_{TASK}_events.tsv").write_text("onset\tduration\n0\t1\n")
        (anat / f"{name}_T1w.nii.gz").write_bytes(t1w)
        (anat / f"{name}_T1w.json").write_text('{"Manufacturer": "none"}')
        rows.append(f"{name}\t{'FM'[number % 2]}\t{number % 7}")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")


def image(folder: Path, shape: tuple[int, ...], step: float) -> bytes:
    """The bytes of a compressed image."""
    made = nibabel.Nifti1Image(np.ones(shape, np.int16), np.eye(4))
    if len(shape) > 3:
        made.header.set_zooms((3, 3, 3, step))
    path = folder / "template.nii.gz"
    nibabel.save(made, path)
    content = path.read_bytes()
    path.unlink()
    return content


# --- The sides ------------------------------------------------------------------------------------


def ours(folder: Path) -> dict[str, Any]:
    from neuromamba.check import check_dataset
    from neuromamba.config import build_config

    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    dataset = {
        "bids": str(folder),
        "space": "MNI152NLin2009aSym",
        "participants": {"file": str(folder / "participants.tsv"), "site_column": "site"},
        "targets": {"sex": sex},
    }
    config = {"datasets": {"tiny": dataset}, "models": {"none": {"family": "neuromamba"}}}
    check = check_dataset(build_config(config, ".", "check_scale.py"), "tiny")
    return total((run.n_volumes, run.repetition_time) for run in check.runs)


def walk(folder: Path) -> dict[str, Any]:
    inherited = json.loads((folder / f"{TASK}_bold.json").read_text())
    paths = [
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.endswith("_bold.nii.gz")
    ]
    return total(
        (volumes_of(path), {**inherited, **sidecar_of(path)}["RepetitionTime"]) for path in paths
    )


def bids2table(folder: Path) -> dict[str, Any]:
    import bids2table

    table = bids2table.index_dataset(folder).to_pandas()
    rows = table[(table["suffix"] == "bold") & (table["ext"] == ".nii.gz")]
    paths = [Path(root, path) for root, path in zip(rows["root"], rows["path"], strict=True)]
    return total(
        (volumes_of(path), bids2table.load_bids_metadata(path)["RepetitionTime"]) for path in paths
    )


def pybids(folder: Path) -> dict[str, Any]:
    import bids

    layout = bids.BIDSLayout(folder, validate=False)
    images = layout.get(suffix="bold", extension=".nii.gz")
    return total((volumes_of(one.path), one.get_metadata()["RepetitionTime"]) for one in images)


SIDES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ours": ours,
    "walk": walk,
    "bids2table": bids2table,
    "pybids": pybids,
}
RIVALS = {"bids2table": "bids2table", "pybids": "pybids"}
"""Sides that need a package of that name."""


def volumes_of(path: Path | str) -> int:
    return int(nibabel.load(path).shape[3])


def sidecar_of(path: Path) -> dict[str, Any]:
    own = path.with_name(path.name.replace(".nii.gz", ".json"))
    return json.loads(own.read_text()) if own.exists() else {}


def total(runs: Iterable[tuple[int | None, float | None]]) -> dict[str, Any]:
    """What is compared: runs, volumes and seconds of scans."""
    found = [(n or 0, step or 0.0) for n, step in runs]
    scans = sum(n * step for n, step in found)
    return {"runs": len(found), "volumes": sum(n for n, _ in found), "scan_seconds": scans}


def run_side(side: str, folder: Path) -> None:
    """Time one side in this process, imports left out, and print what it measured."""
    __import__(RIVALS[side].replace("pybids", "bids") if side in RIVALS else "nibabel")
    if side == "ours":
        __import__("neuromamba.check")
    start, start_cpu = time.perf_counter(), time.process_time()
    found = SIDES[side](folder)
    took = {
        "seconds": [time.perf_counter() - start],
        "cpu_seconds": [time.process_time() - start_cpu],
        "peak_mb": peak_mb(),
        "load": [os.getloadavg()[0]],
    }
    print(json.dumps({**took, "found": found}))


# --- Measuring ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn, as often as asked for; slow ones only once."""
    result: dict[str, Any] = {"machine": machine("neuromamba", "nibabel"), "sides": {}}
    result["subjects"] = options.subjects
    sides = ["ours", "walk", *(RIVALS if options.rivals else [])]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "bids"
        make_tree(folder, options.subjects)
        for number in range(options.rounds):
            for side in sides:
                if number and side in RIVALS:
                    continue
                print(f"round {number + 1}: {side}", file=sys.stderr, flush=True)
                python = options.rivals if side in RIVALS else sys.executable
                pool(result["sides"], side, one_round(python, side, folder, Path(name)))
    return result


def one_round(python: str, side: str, folder: Path, place: Path) -> dict[str, Any]:
    log = place / "log.txt"
    run_command([python, __file__, "--side", side, "--tree", folder], log)
    return json.loads(log.read_text().strip().splitlines()[-1])


def pool(sides: dict[str, Any], side: str, got: dict[str, Any]) -> None:
    """Add a round's figures; refuse those of a side that found something else."""
    first = next(iter(sides.values()), got)
    if got["found"] != first["found"]:
        raise SystemExit(f"{side} found {got['found']}, where ours found {first['found']}")
    old = sides.setdefault(side, got)
    if old is not got:
        for what in ("seconds", "cpu_seconds", "load"):
            old[what] += got[what]
        old["peak_mb"] = max(old["peak_mb"], got["peak_mb"])


def as_text(result: dict[str, Any], versions: str) -> str:
    mine = result["sides"]["ours"]
    lines = [
        head(result["machine"], ["neuromamba", "nibabel"]) + (f" {versions}." if versions else ""),
        "",
        f"{result['subjects']:,} subjects, a run each.",
        "",
        "| side | rounds | seconds | of the processor | times ours | peak memory, MB | load |",
        "|" + "---|" * 7,
    ]
    for name, side in result["sides"].items():
        took = seconds(side)
        lines.append(
            f"| {name} | {len(side['seconds'])} | {took:.2f} | {seconds(side, 'cpu_seconds'):.2f} "
            f"| {took / seconds(mine):.1f} | {side['peak_mb']:.0f} | {max(side['load']):.1f} |"
        )
    reached = "reached" if seconds(mine) < GOAL else "missed"
    lines += [
        "",
        f"Medians. By the clock, the goal of {GOAL:g} s is {reached}; the load is about 1 where "
        "nothing else runs. All sides found the same numbers of volumes and repetition times.",
    ]
    return "\n".join(lines)


def versions_of(python: str | None) -> str:
    if python is None:
        return ""
    code = "from importlib.metadata import version as v; import sys"
    code += "; print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log.txt"
        run_command([python, "-c", code, *RIVALS.values()], log)
        return log.read_text().strip()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rivals", help="a Python that has pybids and bids2table")
    parser.add_argument("--folder", type=Path, help="where the tree goes (default: as tempfile)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--tree", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run_side(options.side, options.tree)
        return
    result = measure(options)
    text = as_text(result, versions_of(options.rivals))
    print(text)
    write_results(RESULTS, "check_scale", result, text, f"{result['subjects']}-subjects")


if __name__ == "__main__":
    main()
