"""How fast, lean and exact is the state-space scan, beside the other ways to run it in torch.

    pip install -r benchmarks/requirements.txt
    python benchmarks/ssd.py                     # about 15 minutes
    python benchmarks/ssd.py --rounds 1          # 3 minutes
    python benchmarks/ssd.py --mamba-ssm PATH    # a folder that holds mamba_ssm; or install it
    python benchmarks/ssd.py --device cuda       # and mamba-ssm's Triton kernels

Forward and backward pass of one sequence of the length of a 20-volume window of 4,096 patches.
The scan alone (`core`): ours, the torch path of transformers, the listing of the Mamba-2 paper, the
reference of mamba-ssm. The whole layer (`layer`): ours and that of transformers with the same
weights. Every side gets the same inputs; outputs and all gradients are compared. Numbers after an @
are chunk sizes. Errors are against the recurrence, one step at a time in float64, on a short
sequence; `extreme` has step sizes from 0.001 to 100.

The memory of a side is its peak above the inputs, outputs and gradients included: resident pages of
its process on a CPU, what torch allocated on a GPU. The Triton kernels multiply float32 in TF32.
The layer of transformers takes mamba-ssm's kernels wherever `import mamba_ssm` works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    differences,
    head,
    in_process,
    loads,
    machine,
    measure,
    rounds,
    save_tensors,
    seconds,
    write_results,
)
from ssd_rivals import find_scan, transformers_layer
from torch import Tensor

CORE = ["ours@64", "transformers@256", "transformers@64", "listing@64"]
CORE += ["mamba-ssm-reference@256", "mamba-ssm-reference@64"]
GPU_CORE = ["ours@128", "ours@256", "mamba-ssm-triton@256", "mamba-ssm-triton@128"]
LAYER = ["ours@64", "transformers@256", "transformers@64"]
HEAD_DIM = 64
RANGES = {"usual": (1e-3, 1e-1), "extreme": (1e-3, 1e2)}
"""Limits of the step sizes, log-uniform; `usual` is what a fresh model has."""


@dataclass(frozen=True)
class Case:
    """What one process runs."""

    level: str
    side: str
    length: int
    width: int
    state: int
    dtype: str
    device: str
    threads: int
    steps: str = "usual"
    repeats: int = 0
    save: str | None = None
    mamba_ssm: str | None = None


# --- One side, in a process of its own ------------------------------------------------------------


def run_case(case: Case) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    step = core_step(case) if case.level == "core" else layer_step(case)
    step(256)
    got = measure(lambda: step(case.length), case.device, case.repeats)
    if case.save:
        save_tensors(Path(case.save), step(case.length))
    return got


def core_step(case: Case) -> Callable[[int], dict[str, Tensor]]:
    name, _, chunk = case.side.partition("@")
    scan = find_scan(name, case.mamba_ssm)
    inputs, dy = core_inputs(case, torch.float64 if name == "recurrence" else torch.float32)

    def step(length: int) -> dict[str, Tensor]:
        part = {k: v[:, :length] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        y = scan(*part.values(), int(chunk or 0))
        gradients = torch.autograd.grad(y, list(inputs.values()), dy[:, :length].to(y.dtype))
        return {"y": y, **{f"d{k}": v for k, v in zip(inputs, gradients, strict=True)}}

    return step


def core_inputs(case: Case, high: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The same numbers in every process; step sizes and per-head values never in half precision."""
    torch.manual_seed(0)
    heads = 2 * case.width // HEAD_DIM
    low = high if high == torch.float64 else getattr(torch, case.dtype)
    smallest, largest = RANGES[case.steps]
    shape = (1, case.length, heads)
    exponent = torch.rand(shape)
    values = {
        "x": torch.randn(*shape, HEAD_DIM).to(low),
        "dt": (smallest * (largest / smallest) ** exponent).to(high),
        "A": -(1 + 15 * torch.rand(heads)).to(high),
        "B": torch.randn(1, case.length, case.state).to(low),
        "C": torch.randn(1, case.length, case.state).to(low),
        "D": torch.randn(heads).to(high),
    }
    inputs = {k: v.to(case.device).requires_grad_() for k, v in values.items()}
    return inputs, torch.randn(*shape, HEAD_DIM).to(low).to(case.device)


def layer_step(case: Case) -> Callable[[int], dict[str, Tensor]]:
    from neuromamba.models.ssm import Mamba2

    name, _, chunk = case.side.partition("@")
    torch.manual_seed(0)
    u = torch.randn(1, case.length, case.width).to(case.device).requires_grad_()
    dy = torch.randn(1, case.length, case.width).to(case.device)
    layer: torch.nn.Module = Mamba2(case.width, case.state, HEAD_DIM, chunk=int(chunk))
    if name == "transformers":
        layer = transformers_layer(layer, case.width, int(chunk))
    layer.to(case.device)
    parameters = dict(layer.named_parameters())

    def step(length: int) -> dict[str, Tensor]:
        half = case.dtype != "float32"
        with torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=half):
            y = layer(u[:, :length])
        wanted = [u, parameters["in_proj.weight"], parameters["A_log"], parameters["dt_bias"]]
        names = ("y", "du", "din_proj", "dA_log", "ddt_bias")
        # All parameters, so that no side is spared a part of the work.
        every = torch.autograd.grad(y, [*wanted, *parameters.values()], dy[:, :length].to(y.dtype))
        return dict(zip(names, (y, *every[:4]), strict=True))

    return step


# --- All sides ------------------------------------------------------------------------------------


def run_sides(case: Case, sides: list[str], n: int, folder: Path) -> dict[str, Any]:
    """Rounds of all sides, and how far each is from the first of them."""

    def run(side: str, first: bool) -> dict[str, Any]:
        save = str(folder / f"{side}.npz") if first else None
        return in_process(
            __file__, "--case", json.dumps(asdict(replace(case, side=side, save=save)))
        )

    pooled = rounds(sides, n, run)
    reference = folder / f"{sides[0]}.npz"
    for side, got in pooled.items():
        if "failed" not in got:
            got["differences"] = differences(folder / f"{side}.npz", reference)
    return pooled


def run_errors(case: Case, sides: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Distance of each side from the recurrence in float64, at usual or extreme step sizes."""
    case = replace(case, repeats=0)
    pooled = run_sides(case, ["recurrence", *sides], 1, folder)
    return {side: got.get("differences", got) for side, got in pooled.items() if side in sides}


def table(case: Case, pooled: Mapping[str, Any]) -> list[str]:
    own = next(iter(pooled.values()))
    own_cpu = seconds(own, "cpu_seconds")
    rows = [
        f"**{case.level}**, {case.dtype}, {case.device}, threads: {case.threads}, {loads(pooled)}",
        "",
        "| side | forward + backward | beside ours | processor time beside ours | peak memory "
        "| beside ours | output differs | gradients differ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side, got in pooled.items():
        if "failed" in got:
            rows.append(f"| {side} | not run: {got['failed']} | | | | | | |")
            continue
        gradients = max(v for k, v in got["differences"].items() if k != "y")
        rows.append(
            f"| {side} | {seconds(got) * 1e3:.0f} ms | {seconds(got) / seconds(own):.2f}x | "
            f"{seconds(got, 'cpu_seconds') / own_cpu:.2f}x | {got['peak_mb']:.0f} MiB | "
            f"{got['peak_mb'] / own['peak_mb']:.2f}x | {got['differences']['y']:.1g} | "
            f"{gradients:.1g} |"
        )
    return [*rows, ""]


def error_table(case: Case, errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    rows = [
        f"Errors against the recurrence in float64, {case.length} steps, inputs in {case.dtype}: "
        "largest difference over largest value",
        "",
        "| side | " + " | ".join(f"{s}: output | {s}: worst gradient" for s in errors) + " |",
        "|---" * (1 + 2 * len(errors)) + "|",
    ]
    for side in next(iter(errors.values())):
        cells = []
        for by_side in errors.values():
            got = by_side[side]
            gradients = {k: v for k, v in got.items() if k.startswith("d")}
            if not gradients:
                cells += ["not run", ""]
                continue
            worst = max(gradients, key=lambda k: gradients[k])
            cells += [f"{got['y']:.1e}", f"{gradients[worst]:.1e} ({worst})"]
        rows.append(f"| {side} | " + " | ".join(cells) + " |")
    return [*rows, ""]


def measure_all(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    packages = ("torch", "transformers", "mamba-ssm", "triton", "neuromamba")
    host = machine(*packages, device=options.device)
    result: dict[str, Any] = {"machine": host, "cases": []}
    rows = [
        head(host, packages[:3]),
        f"{options.length} steps, width {options.width}, {2 * options.width // HEAD_DIM} heads of "
        f"{HEAD_DIM}, state {options.state}. Medians of {options.rounds} rounds of "
        f"{options.repeats} runs, a process a side and round. Differences are from the first row, "
        "over its largest value.",
        "",
    ]
    sides = {"core": CORE + (GPU_CORE if host["gpu"] else []), "layer": LAYER}
    for threads, dtype, level in product(options.threads, options.dtypes, sides):
        case = Case(
            level=level,
            side="",
            length=options.length,
            width=options.width,
            state=options.state,
            dtype=dtype,
            device=options.device,
            threads=threads,
            repeats=options.repeats,
            mamba_ssm=options.mamba_ssm,
        )
        pooled = run_sides(case, sides[level], options.rounds, folder)
        result["cases"].append({"case": asdict(case), "sides": pooled})
        rows += table(case, pooled)
    short = replace(case, level="core", dtype="float32", length=1024)
    result["errors"] = {
        steps: run_errors(replace(short, steps=steps), sides["core"], folder) for steps in RANGES
    }
    rows += error_table(short, result["errors"])
    return result, "\n".join(rows).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=20480)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--state", type=int, default=64)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="runs a side and round")
    parser.add_argument("--mamba-ssm", help="folder that holds mamba_ssm, if it is not installed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result, text = measure_all(options, Path(folder))
    print(text)
    write_results(options.results, "ssd", result, text)


if __name__ == "__main__":
    main()
