"""What a training step costs against the length of its window: TABLeT beside NeuroMamba.

    python benchmarks/window_length.py                           # about 8 minutes on one core
    python benchmarks/window_length.py --scan DERIVATIVES        # on the patches of a real scan
    python benchmarks/window_length.py --device cuda --precision bfloat16 \\
        --volumes 20 50 100 200 256 --repeats 10                 # a machine with a GPU

A step is the pretraining's forward pass, backward pass and AdamW, of one window of T volumes at
96 x 96 x 96: TABLeT at the published sizes on its 27 tokens a volume, NeuroMamba at its two
published sizes on its brain patches, each of them also with recomputed blocks (`checkpoint`). Every
case runs in a process of its own, so that none inherits another's memory.

NeuroMamba reads the brain patches of `--scan` (the first run of a folder of derivatives, through
the stages `volumes` and `tokens`), in time forth and back again where T is longer than the run;
without a scan, noise on the 1,481 patches of the 2 mm MNI mask. TABLeT's codes are noise of their
shape: what a step costs does not depend on the values, and the autoencoder, which runs once a
dataset and not in a step, is not part of this.

Memory is the peak above the model and its input, gradients and AdamW's moments included; on a CPU
that of the process, on a GPU what torch allocated. A case that does not fit is told as that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, head, in_process, loads, machine, measure, seconds, write_results
from torch import Tensor, nn

from neuromamba.config import NeuroMamba, Tablet, Tokens, Volumes
from neuromamba.models import build_model
from neuromamba.new_scans import Asked, find_scans
from neuromamba.token_store import TokenStore
from neuromamba.tokens import make_tokens
from neuromamba.volumes import make_volumes

CODES = {"n_tokens": 27, "code_width": 3072}
PATCHES = 1481
SIDES = ("tablet", "neuromamba-small", "neuromamba-base")
WIDTHS = {"neuromamba-small": (128, 32), "neuromamba-base": (192, 48)}
"""Width and state."""


@dataclass(frozen=True)
class Case:
    """What one process runs: a model, with `checkpoint` behind its name, on T volumes."""

    side: str
    volumes: int
    device: str
    precision: str
    repeats: int
    store: str | None


# --- One case, in a process of its own ------------------------------------------------------------


def run_case(case: Case) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, batch = make_model(case).to(case.device).train(), make_batch(case)
    tokens = batch["codes" if "codes" in batch else "tokens"].flatten(0, -2).shape[0]
    learnt = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4)
    kind = torch.device(case.device).type
    half = case.precision == "bfloat16"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(kind, torch.bfloat16, enabled=half):
            loss = model.loss(batch)["loss"]  # type: ignore[operator]
        loss.backward()
        optimizer.step()

    got = measure(step, case.device, case.repeats)
    return got | {
        "tokens": tokens,
        "parameters": sum(one.numel() for one in learnt),
        "flops": 3 * model.flops(batch),  # type: ignore[operator]
    }


def make_model(case: Case) -> nn.Module:
    name, *words = case.side.split()
    again = "checkpoint" in words
    if name == "tablet":
        sizes = Tablet(family="tablet", volumes=case.volumes, checkpoint_blocks=again)
        return build_model(sizes, 0, codes=CODES)
    width, state = WIDTHS[name]
    settings = NeuroMamba(
        family="neuromamba",
        width=width,
        state=state,
        volumes=case.volumes,
        checkpoint_blocks=again,
    )
    model = build_model(settings, Tokens().patch ** 3 * Tokens().time_patch)
    model.pool.requires_grad_(False)  # type: ignore[union-attr, operator]
    return model


def make_batch(case: Case) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    if case.side.startswith("tablet"):
        shape = (1, case.volumes, CODES["n_tokens"], CODES["code_width"])
        batch = {"codes": torch.randn(shape, generator=random)}
        return {name: value.to(case.device) for name, value in batch.items()}
    cut = Tokens()
    n_time, values = case.volumes // cut.time_patch, cut.patch**3 * cut.time_patch
    if case.store is None:
        tokens = torch.randn(PATCHES, n_time, values, generator=random).cumsum(1) / n_time**0.5
        mean, centers = torch.zeros(PATCHES, values), torch.rand(PATCHES, 3, generator=random)
    else:
        store = TokenStore(case.store)
        there = store.normalized(0, store.n_time_patches, "global")
        forth_and_back = np.concatenate([there, there[::-1]])
        order = np.arange(n_time) % len(forth_and_back)
        tokens = torch.from_numpy(np.ascontiguousarray(forth_and_back[order].swapaxes(0, 1)))
        mean = torch.from_numpy(store.mean_normalized("global"))
        centers = torch.from_numpy(np.asarray(store.center))
    batch = {"tokens": tokens, "mean": mean, "centers": centers}
    batch["patches"] = torch.tensor([len(tokens)])
    return {name: value.to(case.device) for name, value in batch.items()}


# --- All cases ------------------------------------------------------------------------------------


def prepare(derivatives: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The token store of the first run of a folder of derivatives, at the published grid."""
    cut, grid = Tokens(), Volumes()
    for space in ("MNI152NLin2009cAsym", "MNI152NLin6Asym", "MNI152NLin2009aSym"):
        scans = [one for one in find_scans([derivatives], space, Asked()) if one.source]
        if scans:
            break
    else:
        raise SystemExit(f"{derivatives}: no preprocessed run in MNI space")
    source = scans[0].source
    assert source is not None
    volumes, tokens = folder / "volumes.zarr", folder / "tokens.zarr"
    made = make_volumes(source, volumes, grid, cut.time_patch)
    facts = make_tokens(volumes, tokens, cut, grid.shard_volumes)
    known = {"n_volumes": int(made["n_volumes"]), "n_patches": int(facts["n_tokens"])}
    return tokens, known


def describe(rows: list[dict[str, Any]], scan: dict[str, Any] | None, case: Case) -> str:
    patches = f"noise on {PATCHES:,} patches"
    if scan is not None:
        patches = f"{scan['n_patches']:,} patches of a real scan of {scan['n_volumes']} volumes"
        longest = max(row["volumes"] for row in rows)
        if longest > scan["n_volumes"]:
            patches += ", in time forth and back again where T is longer"
    lines = [
        f"One window a step, {case.device}, {case.precision}, one thread; NeuroMamba on {patches}; "
        "TABLeT on codes of noise.",
        "",
        "| T | model | parameters | tokens | a step | processor time | FLOPs | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['volumes']} | {row['side']} "
        if "failed" in row:
            lines.append(f"{start}| not run: {row['failed'][:120]} | | | | | |")
            continue
        lines.append(
            f"{start}| {row['parameters'] / 1e6:.2f} M | {row['tokens']:,} | {seconds(row):.2f} s "
            f"| {seconds(row, 'cpu_seconds'):.2f} s | {row['flops'] / 1e12:.2f} T "
            f"| {row['peak_mb'] / 1024:.2f} GiB |"
        )
    measured = {f"{row['side']} {row['volumes']}": row for row in rows if "failed" not in row}
    return "\n".join([*lines, "", f"The machine had a {loads(measured)} meanwhile."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--sides", nargs="+", default=list(SIDES[:2]), help=f"of {SIDES}")
    parser.add_argument("--checkpoint", action="store_true", help="also with recomputed blocks")
    parser.add_argument("--scan", type=Path, help="a folder of derivatives")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=1, help="steps after the first; 0: that one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(Case(**json.loads(options.case)))))
        return
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no NVIDIA GPU here: nothing was measured")
        return
    host = machine("torch", device=options.device)
    how = (options.device, options.precision, options.repeats)
    sides = [f"{side}{word}" for side in options.sides for word in _words(options.checkpoint)]
    with tempfile.TemporaryDirectory() as folder:
        store, scan = prepare(options.scan, Path(folder)) if options.scan else (None, None)
        rows = []
        for volumes, side in product(options.volumes, sides):
            case = Case(side, volumes, *how, store and str(store))
            print(f"{side}, {volumes} volumes", flush=True)
            found = in_process(__file__, "--case", json.dumps(asdict(case)))
            rows.append({"side": side, "volumes": volumes, **found})
    text = f"{head(host, ['torch'])}\n{describe(rows, scan, case)}"
    print(text)
    result = {"machine": host, "scan": scan, "cases": rows}
    write_results(options.results, "window_length", result, text, options.precision)


def _words(checkpoint: bool) -> list[str]:
    return ["", " checkpoint"] if checkpoint else [""]


if __name__ == "__main__":
    main()
