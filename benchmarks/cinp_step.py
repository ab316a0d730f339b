"""How long one training step of Cinp takes at the paper's sizes, and what batch fits into memory.

    python benchmarks/cinp_step.py                      # about 20 minutes on one core
    python benchmarks/cinp_step.py --batches 2 --edge 64

Images of 96 voxels an edge, 768 channels, 116 regions; INC, MIM and INM; forward, backward, no
update. Without `chunk` memory grows with the batch; with `chunk` 1 it stays, but for the images,
the embeddings and what the allocator keeps of each chunk, while each sample is encoded once more.
Every case runs in a process of its own. From lines through the peaks, the largest batch that fits
into memory is worked out. On Linux, MALLOC_MMAP_THRESHOLD_=65536 in the environment makes the
allocator keep less: of a small model at 64 voxels a sample then took 2.5 MB instead of 25 MB.

A device other than the CPU is not measured here.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from typing import Any

import numpy as np
import torch
from common import RESULTS, head, in_process, machine, peak_mb, reset_peak, write_results

from neuromamba.config import Cinp
from neuromamba.models import build_model

ROIS = 116
PACKAGES = ("torch", "monai")


def make_batch(samples: int, edge: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    fc = torch.rand(samples, ROIS, ROIS, generator=drawn) * 2 - 1
    there = torch.ones(samples, dtype=torch.bool)
    return {
        "anat": torch.rand(samples, edge, edge, edge, generator=drawn),
        "fc": (fc + fc.mT) / 2,
        "present": torch.ones(samples, ROIS, dtype=torch.bool),
        "has_anat": there,
        "has_fc": there,
        "person": torch.arange(samples),
    }


def run_case(batch_size: int, chunk: int, edge: int, precision: str) -> dict[str, Any]:
    """One step, after a forward pass of one sample that loads what is loaded late."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = Cinp.model_validate({"family": "cinp", "chunk": chunk or None})
    model = build_model(settings, 0, n_rois=ROIS).train()
    batch = make_batch(batch_size, edge)
    with torch.no_grad():
        model.loss(make_batch(1, 32))
    reset_peak()
    before, started, used = peak_mb(), time.perf_counter(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        loss = model.loss(batch)["loss"]
    loss.backward()
    return {
        "batch": batch_size,
        "chunk": chunk or None,
        "precision": precision,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "model_mb": before,
        "peak_mb": peak_mb(),
        "parameters": sum(one.numel() for one in model.parameters()),
        "loss": float(loss.detach()),
    }


def largest_batches(cases: list[dict[str, Any]], memory_mb: float) -> dict[str, int]:
    """The largest batch as a whole, and in chunks of one, by lines through the peaks in float32.

    Adam's two moments come on top of the weights and gradients in both.
    """
    moments = 2 * 4 * cases[0]["parameters"] / 2**20
    fits = {}
    for name, chunk in (("whole", None), ("chunk", 1)):
        known = [one for one in cases if one["chunk"] == chunk and one["precision"] == "float32"]
        peaks = [one["peak_mb"] for one in known]
        slope, start = np.polyfit([one["batch"] for one in known], peaks, 1)
        fits[name] = int((memory_mb - moments - start) // slope)
    return fits


def describe(cases: list[dict[str, Any]], fits: dict[str, int], edge: int, gib: float) -> str:
    lines = [
        "| batch | chunk | precision | step | a sample | processor time | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in cases:
        row = [
            str(one["batch"]),
            str(one["chunk"] or "whole"),
            one["precision"],
            f"{one['seconds']:.0f} s",
            f"{one['seconds'] / one['batch']:.1f} s",
            f"{one['cpu_seconds']:.0f} s",
            f"{one['peak_mb'] / 1024:.2f} GiB",
        ]
        lines.append(f"| {' | '.join(row)} |")
    millions = cases[0]["parameters"] / 1e6
    about = (
        f"{edge}^3 voxels, 768 channels, {ROIS} regions, {millions:.1f} M parameters, one thread."
    )
    fit = (
        f"In {gib:g} GiB, with Adam's moments, a batch of {fits['whole']} fits as a whole, and of "
        f"{fits['chunk']} in chunks of one; both worked out from the peaks above."
    )
    return "\n".join([about, "", *lines, "", fit])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--edge", type=int, default=96)
    parser.add_argument("--memory", type=float, default=24.0, help="GiB that there are")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(**json.loads(options.case))))
        return
    host = machine(*PACKAGES)
    wanted = [(size, chunk, "float32") for size, chunk in product(options.batches, (0, 1))]
    wanted += [(max(options.batches), 1, "bfloat16")]
    cases = []
    for size, chunk, precision in wanted:
        if size == chunk:
            continue
        case = {"batch_size": size, "chunk": chunk, "edge": options.edge, "precision": precision}
        found = in_process(__file__, "--case", json.dumps(case))
        if "failed" in found:
            raise SystemExit(f"{case}: {found['failed']}")
        cases.append(found)
    fits = largest_batches(cases, options.memory * 1024)
    text = f"{head(host, PACKAGES)}\n{describe(cases, fits, options.edge, options.memory)}\n"
    result = {"machine": host, "cases": cases, "fits": fits, "memory_gib": options.memory}
    write_results(RESULTS, "cinp_step", result, text)


if __name__ == "__main__":
    main()
