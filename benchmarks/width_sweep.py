"""Does the best learning rate stay where it is when the model gets wider?

    python benchmarks/width_sweep.py                             # half an hour on one core
    python benchmarks/width_sweep.py --widths 32 64 --steps 20   # to see that it runs

Trains models that differ in width alone, each from the same data and seed, at several learning
rates, under `parametrization: standard` (one rate for all weights) and `mup` (rate and
initialisation follow the width; `base_width` is the smallest one), and gives the loss on held-out
windows after the last step. The data are synthetic scans of the demo (4 mm grid). Every width has
d_state = width / 4, as the published sizes do.

The rate to compare is the one with the lowest loss, to the factor of two that the grid resolves.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import head, machine, write_results
from torch import nn

from neuromamba.batches import Windows, group_runs, list_runs, make_readers
from neuromamba.bids import run_index
from neuromamba.config import Config, Optimiser
from neuromamba.demo import write_demo
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.optimiser import learning_rate, make_optimizer, set_learning_rate
from neuromamba.tables import read_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

PACKAGES = ("neuromamba", "torch")
VALIDATION_SUBJECTS = 4


def make_config(folder: Path, width: int, base: int, depth: int, kind: str) -> Config:
    """The demo's grid, and one model."""
    model = {
        "family": "neuromamba",
        "width": width,
        "depth": depth,
        "state": width // 4,
        "head_dim": 32,
        "parametrization": kind,
        "base_width": base,
    }
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {"demo": {"derivatives": str(folder / "demo")}},
            "models": {"m": model},
            "volumes": {"shape": (48, 48, 48), "voxel_size": 4.0},
        }
    )


def make_data(config: Config, folder: Path, subjects: int) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        write_demo(folder / "demo", subjects=subjects, volumes=60, seed=0)
        run_index(config, "demo")
        run_volumes(config, "demo", 0)
        run_tokens(config, "demo", 0)


def open_windows(config: Config, network: nn.Module) -> tuple[Windows, Windows]:
    layout = Layout(Path(config.results), "demo")
    readers = make_readers(network, layout, config.models["m"], config.tokens)
    of_subject = group_runs(
        list_runs(config, "demo", read_table(layout.index)["subject"], ["tokens"])
    )
    names = sorted(of_subject)
    parts = names[VALIDATION_SUBJECTS:], names[:VALIDATION_SUBJECTS]
    training, validation = (Windows({n: of_subject[n] for n in part}, readers) for part in parts)
    return training, validation


def final_loss(config: Config, rate: float, steps: int, batch_size: int) -> dict[str, float]:
    """Train from seed 0; the held-out loss after the last step, infinite where it diverged."""
    torch.manual_seed(0)
    network = build_model(config.models["m"], 432)
    network.pool.requires_grad_(False)
    training, validation = open_windows(config, network)
    settings = Optimiser(steps=steps, learning_rate=rate, warmup_steps=steps // 10)
    optimizer = make_optimizer(network, settings)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate(settings, step))
        batch = training.training_batch(0, step * batch_size, batch_size)
        optimizer.zero_grad()
        loss = network.loss(batch)["loss"]
        if not math.isfinite(loss.item()):
            return {"loss": math.inf, "skill_mean": -math.inf}
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimizer.step()
    with torch.no_grad():
        scalars = network.loss(validation.batch(validation.spaced(2)))
    return {name: scalars[name].item() for name in ("loss", "skill_mean")}


def table(kind: str, options: argparse.Namespace, losses: dict[str, dict[str, float]]) -> str:
    """Losses by width and rate, with the best of each width in bold."""
    rates = [f"{rate:g}" for rate in options.rates]
    lines = [
        f"| {kind}: width | {' | '.join(rates)} | best rate |",
        "|---" * (len(rates) + 2) + "|",
    ]
    for width in options.widths:
        row = losses[str(width)]
        best = min(row, key=row.get)  # type: ignore[arg-type]
        cells = [f"**{row[r]:.4f}**" if r == best else f"{row[r]:.4f}" for r in rates]
        lines.append(f"| {width} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    told = {name: value for name, value in vars(options).items() if name != "output"}
    result: dict[str, Any] = {"machine": machine(*PACKAGES), "options": told}
    losses: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), min(options.widths)
        make_data(make_config(folder, base, base, 1, "mup"), folder, options.subjects)
        for kind in ("standard", "mup"):
            for width in options.widths:
                config = make_config(folder, width, base, options.depth, kind)
                for rate in options.rates:
                    found = final_loss(config, rate, options.steps, options.batch_size)
                    losses.setdefault(kind, {}).setdefault(str(width), {})[f"{rate:g}"] = found[
                        "loss"
                    ]
                    print(kind, width, rate, found, file=sys.stderr, flush=True)
    return {**result, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    rates = [2.0**power for power in range(-9, -1)]
    parser.add_argument("--rates", type=float, nargs="+", default=rates)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--subjects", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    result = run(options)
    what = (
        f"Held-out loss after {options.steps} steps of {options.batch_size} window(s), depth "
        f"{options.depth}, base width {min(options.widths)}; columns are learning rates."
    )
    tables = [table(kind, options, losses) for kind, losses in result["losses"].items()]
    text = "\n\n".join([head(result["machine"], PACKAGES), what, *tables])
    write_results(options.output, "width_sweep", result, text)
    print(text)


if __name__ == "__main__":
    main()
