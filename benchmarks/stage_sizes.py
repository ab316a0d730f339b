"""What the data stages make of a run and what they take for it: files, bytes, time, memory.

    python benchmarks/stage_sizes.py            # 5 minutes, 8 GB of disk
    python benchmarks/stage_sizes.py --write    # and put it into neuromamba/measured.yaml

Runs of several lengths are synthesised (97 x 115 x 97 voxels of 2 mm, int16, with noise outside the
brain, half a millimetre off the target grid, so that everything is interpolated) in fMRIPrep's
layout. Each goes through the commands `neuromamba volumes`, `tokens` and `rois` as a job would run
them, with one thread for the numerical libraries. A second call of each, which finds all made and
only looks, tells what the start of a job costs; it is taken off. Figures are medians over rounds.

Beside that: what the digests of the manifests take, against the stage whose stores they are of, and
how the bytes a volume compare with those of a real scan (`--real`, a folder of derivatives).
`--write` also puts the speeds of training steps there that `benchmarks/step.py` has measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from common import RESULTS, head, machine, run_command, write_results
from data_layer_common import write_inputs

from neuromamba.config import Rois, Tokens, Volumes
from neuromamba.contents import digest_store
from neuromamba.measured import MEASURED
from neuromamba.tables import read_table

STAGES = ("volumes", "tokens", "rois")
SIZES = ("files", "folders", "bytes")
TIMES = ("seconds", "cpu_seconds", "start_seconds")
TIME_PATCHES = 10
"""In a window of `benchmarks/step.py`."""
NAME = "sub-01_task-rest_space-MNI152NLin2009cAsym_res-2_desc"
COMMAND = Path(sys.executable).with_name("neuromamba")


def lay_out(folder: Path, inputs: Path, n: int) -> None:
    """One run of `n` volumes as fMRIPrep would name it."""
    func = folder / "sub-01" / "func"
    func.mkdir(parents=True)
    (func / f"{NAME}-preproc_bold.nii.gz").hardlink_to(inputs / f"bold-{n}.nii.gz")
    (func / f"{NAME}-brain_mask.nii.gz").hardlink_to(inputs / "mask.nii.gz")
    sidecar = {"RepetitionTime": 0.735}
    (func / f"{NAME}-preproc_bold.json").write_text(json.dumps(sidecar))


def run_stage(folder: Path, stage: str, dataset: str) -> dict[str, float]:
    """Run one command as a job would."""
    options = ["--config", folder / "config.yaml", "--dataset", dataset]
    return run_command([COMMAND, stage, *options], folder / "log.txt")


def measure_run(folder: Path, dataset: str) -> dict[str, dict[str, Any]]:
    """All stages of one run: what its store is, and what making it took beyond a job's start."""
    results = folder / "results" / dataset
    shutil.rmtree(results, ignore_errors=True)
    run_stage(folder, "index", dataset)
    found = {}
    for stage in STAGES:
        whole, start = (run_stage(folder, stage, dataset) for _ in range(2))
        row = read_table(results / stage / "batch-0.tsv").iloc[0]
        store = results / stage / f"{row['run']}.zarr"
        began = time.perf_counter()
        content = digest_store(store)
        found[stage] = {
            "files": content["files"],
            "bytes": content["bytes"],
            "folders": 1 + sum(path.is_dir() for path in store.rglob("*")),
            "seconds": whole["seconds"] - start["seconds"],
            "cpu_seconds": whole["cpu_seconds"] - start["cpu_seconds"],
            "peak_mb": whole["peak_mb"],
            "start_seconds": start["seconds"],
            "digest_seconds": time.perf_counter() - began,
        }
    return found


def pool(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Medians of times and the most of memory, by stage; sizes must be the same in all rounds."""
    pooled: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        rows = [of_round[stage] for of_round in rounds]
        for name in SIZES:
            if len({row[name] for row in rows}) > 1:
                raise SystemExit(f"{stage}: {name} differ between rounds")
        take: dict[str, Callable[..., Any]] = dict.fromkeys((*SIZES, "peak_mb"), max)
        pooled[stage] = {
            name: take.get(name, median)([row[name] for row in rows]) for name in rows[0]
        }
    return pooled


def n_tokens(folder: Path, dataset: str) -> int:
    table = read_table(folder / "results" / dataset / "tokens" / "batch-0.tsv")
    return int(table["n_tokens"].iloc[0])


def compare_real(folder: Path, real: Path) -> dict[str, Any]:
    """Bytes of a real scan's stores, and how many volumes it has."""
    measure_run(folder, "real")
    results = folder / "results" / "real"
    (scan,) = real.rglob("*desc-preproc_bold.nii.gz")
    facts = {"source": scan.stat().st_size}
    for stage in STAGES:
        row = read_table(results / stage / "batch-0.tsv").iloc[0]
        facts[stage] = int(row["bytes"])
        if stage == "volumes":
            facts["volumes_of_it"] = int(row["n_volumes"])
    return facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": machine("neuromamba", "zarr", "numpy"), "runs": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_inputs(folder, options.volumes, "noise", seed=0)
        config: dict[str, Any] = {"results": str(folder / "results"), "datasets": {}}
        config["models"] = {"none": {"family": "neuromamba"}}
        for n in options.volumes:
            lay_out(folder / f"raw-{n}", folder, n)
            config["datasets"][f"run-{n}"] = {"derivatives": str(folder / f"raw-{n}")}
        if options.real:
            config["datasets"]["real"] = {"derivatives": str(options.real.resolve())}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        rounds: dict[int, list[Any]] = {n: [] for n in options.volumes}
        for number in range(options.rounds):
            for n in options.volumes:
                print(f"round {number + 1}: {n} volumes", file=sys.stderr, flush=True)
                rounds[n].append(measure_run(folder, f"run-{n}"))
        for n in options.volumes:
            size = (folder / f"bold-{n}.nii.gz").stat().st_size
            facts = {"n_volumes": n, "n_tokens": n_tokens(folder, f"run-{n}")}
            result["runs"].append({**facts, "source_bytes": size, "stages": pool(rounds[n])})
        if options.real:
            result["real"] = compare_real(folder, options.real)
    return result


def synthetic(result: dict[str, Any], stage: str, volumes: int) -> float:
    """Megabytes of a synthetic run of some length, by a straight line through the measured ones."""
    lengths = [run["n_volumes"] for run in result["runs"]]
    sizes = [run["stages"][stage]["bytes"] / 1e6 for run in result["runs"]]
    return float(np.polyval(np.polyfit(lengths, sizes, 1), volumes))


# --- What is written ------------------------------------------------------------------------------


def as_text(result: dict[str, Any]) -> str:
    lines = [
        head(result["machine"], ["neuromamba", "zarr", "numpy"]),
        "",
        "| stage | volumes | files | folders | MB | seconds | of the processor | peak memory, MB | "
        "a job's start, s | digest, s | digest / stage |",
        "|" + "---|" * 11,
    ]
    for run in result["runs"]:
        for stage, row in run["stages"].items():
            lines.append(
                f"| {stage} | {run['n_volumes']} | {row['files']} | {row['folders']} | "
                f"{row['bytes'] / 1e6:.1f} | "
                f"{row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {row['peak_mb']:.0f} | "
                f"{row['start_seconds']:.1f} | {row['digest_seconds']:.2f} | "
                f"{row['digest_seconds'] / row['seconds']:.2f} |"
            )
    lines += ["", "Seconds include the digests and leave out a job's start."]
    if "real" in result:
        real, n = result["real"], result["real"]["volumes_of_it"]
        pairs = [
            f"{stage} {real[stage] / 1e6:.1f} MB ({synthetic(result, stage, n):.1f})"
            for stage in STAGES
        ]
        lines.append(
            f"A real scan of {n} volumes (and a synthetic one of that length, by a straight line): "
            f"{', '.join(pairs)}; its .nii.gz {real['source'] / 1e6:.1f} MB."
        )
    return "\n".join(lines)


def as_measured(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that `neuromamba estimate` works with."""
    rows = []
    for stage in STAGES:
        for run in result["runs"]:
            row = run["stages"][stage]
            times = {name: round(row[name], 2) for name in TIMES}
            sizes = {name: row[name] for name in SIZES}
            place = {"stage": stage, "volumes": run["n_volumes"]}
            rows.append({**place, **sizes, **times, "peak_mb": round(row["peak_mb"])})
    host = result["machine"]
    settings = {"volumes": Volumes(), "tokens": Tokens(), "rois": Rois()}
    return {
        "where": f"{host['processor']}, {host['cores']} cores",
        "date": host["date"],
        "how": "python benchmarks/stage_sizes.py --write",
        "settings": {name: section.model_dump(mode="json") for name, section in settings.items()},
        "tokens_per_time_patch": result["runs"][0]["n_tokens"],
        "stages": rows,
        "training": trainings(),
    }


def trainings() -> list[dict[str, Any]]:
    """Speeds of whole training steps, the last that were measured on each device."""
    found = {}
    for path in sorted(RESULTS.glob("step_*.json")):
        result = json.loads(path.read_text())
        host = result["machine"]
        for entry in result["cases"]:
            case = entry["case"]
            threads = f", {case['threads']} core" + "s" * (case["threads"] > 1)
            place = host["gpu"] or host["processor"] + threads
            for side, precision in (("ours", "float32"), ("ours bf16", "bfloat16")):
                if "seconds" in entry["sides"].get(side, {}):
                    tokens = case["patches"] * TIME_PATCHES * case["packed"]
                    windows = f"{case['packed']} window" + "s" * (case["packed"] > 1)
                    device = f"{place}, {precision}, {windows} at once"
                    model = f"neuromamba-{case['size']}"
                    speed = tokens / median(entry["sides"][side]["seconds"])
                    found[model, device] = round(speed)
    return [
        {"model": model, "device": device, "tokens_per_second": speed}
        for (model, device), speed in found.items()
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, nargs="+", default=[160, 490, 1200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--real", type=Path, help="derivatives of a real scan, to compare bytes")
    parser.add_argument("--folder", type=Path, help="where the scans go (default: as tempfile)")
    parser.add_argument("--write", action="store_true", help=f"also write {MEASURED.name}")
    options = parser.parse_args()
    result = measure(options)
    text = as_text(result)
    print(text)
    write_results(RESULTS, "stage_sizes", result, text)
    if options.write:
        MEASURED.write_text(yaml.safe_dump(as_measured(result), sort_keys=False))


if __name__ == "__main__":
    main()
