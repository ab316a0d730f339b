"""Time, memory, FLOPs and parameters for one sample: NeuroMamba beside SwiFT and NeuroSTORM.

    git clone https://github.com/Transconnectome/SwiFT
    git clone https://github.com/CUHK-AIM-Group/NeuroSTORM
    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py --swift SwiFT --neurostorm NeuroSTORM

Forward and backward pass of one sample of 96 x 96 x 96 voxels and 20 volumes, batch 1, with the
settings that each was published with. The peers read the whole box, NeuroMamba the 1,481 patches
that the 2 mm MNI mask keeps (`whole box`: all 4,096). The losses are not the same task: NeuroMamba
predicts next patches, `NeuroSTORM MAE` masked ones, and SwiFT's and NeuroSTORM's backbones, which
fine-tuning trains, get the mean of their squared outputs. The models compute different things, so
this says what a sample costs, not which is better.

FLOPs are those of the matrix products and convolutions that ran, as torch counts them (a
multiply-add is two; what NeuroMamba recomputes in its backward pass is among them). Convolutions as
shifted sums, scans step by step, norms and softmax are not counted, on any side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    head,
    in_process,
    loads,
    machine,
    measure,
    rounds,
    seconds,
    write_results,
)
from peers_rivals import neurostorm, swift
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BRAIN, BOX = 1481, 4096
"""Patches of 6 x 6 x 6 voxels."""


@dataclass(frozen=True)
class Case:
    """What one process runs."""

    side: str
    device: str
    threads: int
    repeats: int
    count: bool = False
    swift: str | None = None
    neurostorm: str | None = None


# --- One side, in a process of its own ------------------------------------------------------------


def run_case(case: Case) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    model, loss, note = build(case)
    half = "bf16" in case.side.split()

    def step() -> None:
        model.zero_grad()
        with torch.autocast(torch.device(case.device).type, torch.bfloat16, enabled=half):
            value = loss()
        value.backward()

    got = measure(step, case.device, case.repeats)
    if case.count:
        with FlopCounterMode(display=False) as counter:
            step()
        got["flops"] = counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return got | {"parameters": parameters, "note": note}


def build(case: Case) -> tuple[nn.Module, Callable[[], Tensor], str]:
    """A model, its loss on a sample, and a note."""
    if case.side.startswith("NeuroMamba"):
        return build_ours(case)
    note = ""
    if case.side.startswith("SwiFT"):
        model = swift(str(case.swift))
    else:
        model, note = neurostorm(str(case.neurostorm), pretraining="MAE" in case.side)
    model.to(case.device)
    volumes = torch.randn(1, 1, 96, 96, 96, 20, device=case.device)

    def loss() -> Tensor:
        output = model(volumes)
        return output[1] if "MAE" in case.side else output.square().mean()

    return model, loss, note


def build_ours(case: Case) -> tuple[nn.Module, Callable[[], Tensor], str]:
    from step import Case as StepCase
    from step import make_batch, make_model

    patches = BOX if "box" in case.side else BRAIN
    words = case.side.split()
    flags = " ".join(["ours", *(word for word in words if word in ("compile", "checkpoint"))])
    settings = StepCase(flags, words[1], patches, 1, case.device, case.threads, case.repeats)
    model = make_model(settings).to(case.device)
    batch = make_batch(settings)
    analytic = 3 * model.flops(batch) / 1e9  # type: ignore[operator]
    note = f"{analytic:.0f} GFLOP without recomputation"
    return model, lambda: model.loss(batch)["loss"], note  # type: ignore[operator]


# --- All sides ------------------------------------------------------------------------------------


def choose_sides(options: argparse.Namespace) -> list[str]:
    sides = ["NeuroMamba small", "NeuroMamba small checkpoint", "NeuroMamba small bf16"]
    sides += ["NeuroMamba base", "NeuroMamba small whole box"]
    if options.swift:
        sides += ["SwiFT", "SwiFT bf16"]
    if options.neurostorm:
        sides += ["NeuroSTORM", "NeuroSTORM MAE"]
    return sides


def table(pooled: dict[str, Any]) -> list[str]:
    base = pooled["NeuroMamba small"]
    rows = [
        "| model | forward + backward | beside NeuroMamba small | processor time beside it "
        "| peak memory | FLOPs | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, got in pooled.items():
        if "failed" in got:
            rows.append(f"| {side} | not run: {got['failed']} | | | | | |")
            continue
        rows.append(
            f"| {side} | {seconds(got):.2f} s | {seconds(got) / seconds(base):.2f}x | "
            f"{seconds(got, 'cpu_seconds') / seconds(base, 'cpu_seconds'):.2f}x | "
            f"{got['peak_mb']:.0f} MiB | {got['flops'] / 1e9:.0f} G | "
            f"{got['parameters'] / 1e6:.2f} M |"
        )
    notes = [f"- {side}: {got['note']}." for side, got in pooled.items() if got.get("note")]
    return [*rows, "", *notes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--swift", help="a checkout of SwiFT")
    parser.add_argument("--neurostorm", help="a checkout of NeuroSTORM")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="runs a side and round")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)))))
        return
    host = machine("torch", "monai", "mamba-ssm", "neuromamba", device=options.device)
    case = Case("", options.device, options.threads, options.repeats)
    case = replace(case, swift=options.swift, neurostorm=options.neurostorm)

    def run(side: str, first: bool) -> dict[str, Any]:
        here = replace(case, side=side, count=first)
        return in_process(__file__, "--case", json.dumps(asdict(here)))

    pooled = rounds(choose_sides(options), options.rounds, run)
    text = "\n".join(
        [
            head(host, ["torch"]),
            f"One 96^3 x 20 sample, {options.device}, threads: {options.threads}; medians of "
            f"{options.rounds} rounds of {options.repeats} runs, a process a side and round; "
            f"{loads(pooled)}.",
            "",
            *table(pooled),
        ]
    )
    print(text)
    write_results(options.results, "peers", {"machine": host, "sides": pooled}, text)


if __name__ == "__main__":
    main()
