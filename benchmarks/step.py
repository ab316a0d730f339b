"""How long and how much memory does a training step take, beside a naive model, in one run.

    python benchmarks/step.py                                  # about 10 minutes, 8 GB of memory
    python benchmarks/step.py --patches 1481 --rounds 1        # quicker
    python benchmarks/step.py --device cuda --packed 1 4 16 --sizes small base \\
        --kernels torch compile mamba-ssm --repeats 20         # a machine with a GPU

A step is the forward pass, the backward pass and AdamW, on windows of 20 volumes: 1,481 brain
patches (what the 2 mm MNI mask keeps) and 2,048, ten time patches each. Ours in float32, with bf16
autocast, with recomputed blocks, compiled; and the naive model of `step_naive.py`, with the same
weights. Losses and all gradients of the first step are compared with those of the naive model in
float32, and the script fails when those of torch in float32 are not the same.

Memory is the peak above the model and its input; on a CPU that of the process, on a GPU what torch
allocated. `packed` windows make one sequence for ours; the naive model takes them one by one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
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
    norm_of_difference,
    rounds,
    save_tensors,
    seconds,
    write_results,
)
from step_naive import naive_copy, name_here
from torch import Tensor, nn

from neuromamba.config.schema import Compute, NeuroMamba
from neuromamba.models import build_model

VALUES, TIME_PATCHES = 432, 10
SIZES = {
    "tiny": (32, 2, 16),
    "small": (128, 12, 32),
    "base": (192, 12, 48),
    "large": (768, 12, 192),
}
"""Width, depth and state; `small` and `base` are the published ones."""

TOLERANCE = {"loss": 1e-5, "gradients": 1e-4, "worst_tensor": 1e-3}
"""Largest relative differences in float32; mamba-ssm's kernels multiply it in TF32."""


@dataclass(frozen=True)
class Case:
    """What one process runs. `side` is a model and, in words, how it runs."""

    side: str
    size: str
    patches: int
    packed: int
    device: str
    threads: int
    repeats: int
    save: str | None = None


# --- One side, in a process of its own ------------------------------------------------------------


def run_case(case: Case) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    model = make_model(case).to(case.device)
    batch = make_batch(case)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []

    def forward_backward() -> Tensor:
        half = "bf16" in case.side.split()
        with torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=half):
            loss = model.loss(batch)["loss"]  # type: ignore[operator]
        loss.backward()
        return loss.detach()

    def step() -> None:
        optimizer.zero_grad()
        losses.append(float(forward_backward()))
        optimizer.step()

    got = measure(step, case.device, case.repeats)
    if case.save:
        # A model with the first weights again.
        model = make_model(case).to(case.device)
        forward_backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        save_tensors(Path(case.save), {name_here(n): v.flatten() for n, v in grads.items()})
    return got | {"losses": losses, "parameters": sum(p.numel() for p in model.parameters())}


def make_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    words = case.side.split()
    width, depth, state = SIZES[case.size]
    settings = NeuroMamba(
        family="neuromamba",
        width=width,
        depth=depth,
        state=state,
        parametrization="standard",
        checkpoint_blocks="checkpoint" in words,
    )
    compute = Compute(
        kernels="mamba-ssm" if "mamba-ssm" in words else "torch", compile="compile" in words
    )
    ours = build_model(settings, VALUES, compute)
    ours.pool.requires_grad_(False)
    return naive_copy(ours, settings, VALUES) if words[0] == "naive" else ours


def make_batch(case: Case) -> dict[str, Tensor]:
    """Windows of noise that is smooth in time, which cost what real ones do."""
    random = torch.Generator().manual_seed(1)
    rows = case.patches * case.packed
    steps = torch.randn(rows, TIME_PATCHES, VALUES, generator=random)
    batch = {
        "tokens": steps.cumsum(1) / 3,
        "patches": torch.full((case.packed,), case.patches),
        "centers": torch.rand(rows, 3, generator=random),
        "mean": torch.zeros(rows, VALUES),
    }
    return {name: value.to(case.device) for name, value in batch.items()}


# --- All sides ------------------------------------------------------------------------------------


def run_sides(case: Case, sides: list[str], n: int, folder: Path) -> dict[str, Any]:
    def run(side: str, first: bool) -> dict[str, Any]:
        save = str(folder / f"{side}.npz") if first else None
        here = replace(case, side=side, save=save)
        return in_process(__file__, "--case", json.dumps(asdict(here)))

    pooled = rounds(sides, n, run)
    for side, got in pooled.items():
        if "failed" not in got and "failed" not in pooled["naive"]:
            compare(side, got, pooled["naive"], folder)
    return pooled


def compare(side: str, got: dict[str, Any], naive: Mapping[str, Any], folder: Path) -> None:
    """Note how far a side is from the naive model, and whether that is more than rounding."""
    files = folder / f"{side}.npz", folder / "naive.npz"
    got["differences"] = {
        "loss": abs(got["losses"][0] / naive["losses"][0] - 1),
        "gradients": norm_of_difference(*files),
        "worst_tensor": max(differences(*files).values()),
    }
    exact = not {"bf16", "mamba-ssm"} & set(side.split())
    got["wrong"] = exact and any(got["differences"][k] > v for k, v in TOLERANCE.items())


def choose_sides(kernels: list[str]) -> list[str]:
    words = ["" if kernel == "torch" else f" {kernel}" for kernel in kernels]
    sides = [f"ours{half}{word}" for half in ("", " bf16") for word in words]
    return [*sides, "ours checkpoint", f"ours bf16{words[-1]} checkpoint", "naive", "naive bf16"]


def table(case: Case, pooled: Mapping[str, Any]) -> list[str]:
    rows = [
        f"**{case.size}**, windows packed: {case.packed}, tokens a window: "
        f"{case.patches * TIME_PATCHES:,}, {case.device}, threads: {case.threads}, {loads(pooled)}",
        "",
        "| side | a step | naive takes | of the processor | windows/s | peak memory | naive takes "
        "| loss differs | gradients differ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    naive = pooled["naive"]
    for side, got in pooled.items():
        if "failed" in got:
            rows.append(f"| {side} | not run: {got['failed']} | | | | | | | |")
            continue
        beside, differ = ["", "", ""], ["", ""]
        if "failed" not in naive:
            beside = [
                f"{seconds(naive) / seconds(got):.2f}x",
                f"{seconds(naive, 'cpu_seconds') / seconds(got, 'cpu_seconds'):.2f}x",
                f"{naive['peak_mb'] / got['peak_mb']:.2f}x",
            ]
            differ = [f"{got['differences'][k]:.1g}" for k in ("loss", "gradients")]
        rows.append(
            f"| {side} | {seconds(got):.3f} s | {beside[0]} | {beside[1]} | "
            f"{case.packed / seconds(got):.2f} | {got['peak_mb']:.0f} MiB | {beside[2]} | "
            f"{differ[0]} | {differ[1]}{' **wrong**' if got.get('wrong') else ''} |"
        )
    return [*rows, ""]


def measure_all(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    host = machine("torch", "triton", "mamba-ssm", "neuromamba", device=options.device)
    result: dict[str, Any] = {"machine": host, "cases": []}
    rows = [
        head(host, ["torch"]),
        f"Medians of {options.rounds} rounds of {options.repeats} steps, a process a side and "
        "round. Differences are from the naive model in float32, relative: the first loss, and all "
        "gradients as one vector.",
        "",
    ]
    grid = product(options.sizes, options.patches, options.packed, options.threads)
    for size, patches, packed, threads in grid:
        case = Case("", size, patches, packed, options.device, threads, options.repeats)
        pooled = run_sides(case, choose_sides(options.kernels), options.rounds, folder)
        result["cases"].append({"case": asdict(case), "sides": pooled})
        rows += table(case, pooled)
    return result, "\n".join(rows).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--patches", type=int, nargs="+", default=[1481, 2048], help="a window")
    parser.add_argument("--packed", type=int, nargs="+", default=[1], help="windows a step")
    parser.add_argument("--kernels", nargs="+", default=["torch", "compile"], help="and mamba-ssm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="steps a side and round")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result, text = measure_all(options, Path(folder))
    print(text)
    write_results(options.results, "step", result, text)
    if any(side.get("wrong") for case in result["cases"] for side in case["sides"].values()):
        raise SystemExit("some side does not compute what the naive model does: see `wrong`")


if __name__ == "__main__":
    main()
