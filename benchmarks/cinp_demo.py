"""Does bringing images and networks together pay, on data in which there is something to find?

    python benchmarks/cinp_demo.py --folder FOLDER             # about 15 minutes a seed on one core
    python benchmarks/cinp_demo.py --folder FOLDER --seeds 0 --steps 20

Synthetic subjects (`neuromamba demo-data`), the variance of whose anatomy is explained by
connectivity to a known share. A small Cinp is pretrained without labels, by INC and INM (without
MIM, which takes as long again). Then, by test subjects:

- retrieval of networks by images and the other way, beside chance;
- sex by network prompting, and by a support vector machine on embeddings of images, beside the same
  image encoder trained from random weights (`scratch`) on the labels of the same subjects, of whom
  there are few: `--labels` of the training part. Prompts take their networks, all of them.

The seeds are those of the weights and of the trainings; the data and the split are the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import RESULTS, head, machine, write_results

from neuromamba.anat import run_anat
from neuromamba.baseline_predictions import run_baselines
from neuromamba.bids import run_index
from neuromamba.config import Config
from neuromamba.demo import write_demo
from neuromamba.demo_anatomy import SHARE
from neuromamba.evaluate import run_evaluate
from neuromamba.excluded import run_excluded
from neuromamba.finetune import run_finetune
from neuromamba.layout import Layout
from neuromamba.pretrain import run_pretrain
from neuromamba.retrieve import run_retrieve
from neuromamba.rois import run_rois
from neuromamba.splits import read_split, run_splits
from neuromamba.tables import read_table, write_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

SIZES = {"width": 64, "feature_size": 12, "window": 2, "network_depth": 1, "network_hidden": 64}
PACKAGES = ("torch", "monai")
METRICS = ("auroc", "balanced_accuracy")


def make_config(folder: Path, steps: int) -> Config:
    data = folder / "data"
    classes = {"female": "F", "male": "M"}
    few = {"kind": "classification", "column": "sex", "classes": classes}
    demo = {
        "derivatives": str(data),
        "participants": {"file": str(folder / "participants.tsv"), "site_column": "site"},
        "targets": {"sex": few},
    }
    pretrain = {"steps": steps, "batch_size": 32, "learning_rate": 5e-4, "warmup_steps": 10}
    pretrain |= {"validate_every": 20, "checkpoint_every": 1000}
    tuned = {"start": "fresh", "mode": "full", "steps": steps, "batch_size": 8}
    tuned |= {"learning_rate": 5e-4, "warmup_steps": 10, "validate_every": 20}
    model = {"family": "cinp", "mim": 0.0, "clusters": 10, "pretrain": pretrain, **SIZES}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {"demo": demo},
            "models": {
                "cinp": model,
                "scratch": {
                    **model,
                    "base": "cinp",
                    "finetune": {**tuned, "evaluation_windows": 1},
                },
            },
            "volumes": {"shape": [24, 24, 24], "voxel_size": 8.0, "shard_volumes": 20},
            "rois": {"cube": 32.0},
            "splits": {"test": 0.4, "validation": 0.15},
            "retrieve": {"share": 1.0, "groups": 5},
            "evaluate": {"baselines": ["fc"]},
            "compute": {"device": "cpu"},
        }
    )


def prepare(config: Config, folder: Path, subjects: int, labels: int) -> None:
    """Data and split, and then a table with the labels of all test, and some other, subjects."""
    if not (folder / "data").exists():
        write_demo(folder / "data", subjects, volumes=120, voxel_size=8.0)
        write_table(folder / "participants.tsv", read_table(folder / "data" / "participants.tsv"))
        run_index(config, "demo")
        for stage in (run_volumes, run_tokens, run_rois, run_anat):
            stage(config, "demo", 0)
        run_excluded(config, "demo")
        run_splits(config, "demo")
    split = read_split(Layout.of(config, "demo").split)
    table = read_table(folder / "data" / "participants.tsv", dtype=str)
    of_part = {name: part for part, names in split.items() for name in names}
    part = table["participant_id"].map(of_part)
    # As many of each sex as possible, and a third as many to choose the weights by.
    kept = part == "test"
    for name, count in (("train", labels), ("validation", max(4, labels // 3))):
        for sex in ("F", "M"):
            who = table.index[(part == name) & (table["sex"] == sex)]
            kept.loc[who[: count // 2]] = True
    write_table(folder / "participants.tsv", table.assign(sex=table["sex"].where(kept)))


def run_seed(config: Config, seed: int) -> dict[str, Any]:
    """What one seed gives: retrieval, and metrics by predictor."""
    started = time.perf_counter()
    run_pretrain(config, "demo", "cinp", seed)
    run_retrieve(config, "demo", "cinp", seed)
    run_finetune(config, "demo", "scratch", seed, "sex")
    run_evaluate(config, "demo", "scratch", seed, "sex")
    layout = Layout.of(config, "demo")
    found = read_table(layout.retrieve("cinp", seed) / "retrieve.tsv")
    tables = [
        read_table(layout.retrieve("cinp", seed) / "metrics.tsv"),
        read_table(layout.evaluate("scratch", seed, "sex") / "metrics.tsv"),
    ]
    metrics = pd.concat(tables).query("metric in @METRICS")
    values = metrics.groupby(["predictor", "metric"])["value"].first().unstack()
    return {
        "seed": seed,
        "retrieval": found.to_dict("records"),
        "metrics": values.to_dict("index"),
        "n_test": int(metrics["n"].max()),
        "seconds": time.perf_counter() - started,
    }


def describe(results: list[dict[str, Any]], about: str) -> str:
    lines = [about, "", "| direction | seed | recall@1 | recall@5 | mean rank | chance |"]
    lines.append("|---|---|---|---|---|---|")
    for one in results:
        for row in one["retrieval"]:
            cells = [row["direction"], str(one["seed"])]
            for name in ("recall_1", "recall_5"):
                low, high = row[f"{name}_low"], row[f"{name}_high"]
                cells.append(f"{row[name]:.2f} [{low:.2f}, {high:.2f}]")
            cells.append(f"{row['mean_rank']:.1f} of {row['choices']}")
            chance = [row[f"{name}_chance"] for name in ("recall_1", "recall_5", "mean_rank")]
            cells.append(f"{chance[0]:.3f}, {chance[1]:.2f}, {chance[2]:.1f}")
            lines.append(f"| {' | '.join(cells)} |")
    seeds = [str(one["seed"]) for one in results]
    lines += ["", f"| sex, AUROC | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |"]
    lines.append("|---" * (len(seeds) + 2) + "|")
    for name in ("network-prompting", "svm-image", "scratch", "svm-network", "fc", "majority"):
        values = [one["metrics"].get(name, {}).get("auroc", np.nan) for one in results]
        cells = [f"{value:.2f}" for value in [*values, np.mean(values)]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for data and results")
    parser.add_argument("--subjects", type=int, default=300)
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    host = machine(*PACKAGES)
    config = make_config(options.folder, options.steps)
    prepare(config, options.folder, options.subjects, options.labels)
    run_baselines(config, "demo", "sex")
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        # Written after each, since a seed takes minutes.
        results.append(run_seed(config, seed))
        minutes = np.mean([one["seconds"] for one in results]) / 60
        about = (
            f"{head(host, PACKAGES)}\n{options.subjects} synthetic subjects, "
            f"{results[0]['n_test']} of them for tests; {SHARE:.0%} of the variance of anatomy, by "
            f"network, is connectivity's. {options.steps} steps of pretraining; sex is learnt from "
            f"{options.labels} training subjects. {minutes:.0f} minutes a seed."
        )
        result = {"machine": host, "settings": vars(options) | {"folder": ""}, "results": results}
        write_results(RESULTS, "cinp_demo", result, describe(results, about) + "\n")


if __name__ == "__main__":
    main()
