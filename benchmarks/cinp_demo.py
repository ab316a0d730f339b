"""Does bringing images and networks together pay, on data in which there is something to find?

    python benchmarks/cinp_demo.py --folder FOLDER
    python benchmarks/cinp_demo.py --folder FOLDER --seeds 0 --steps 20

Synthetic subjects (`neuromamba demo-data`), the variance of whose anatomy is explained by
connectivity to a known share. A small Cinp is pretrained without labels, by all three losses. Then,
by test subjects:

- retrieval of networks by images and the other way, beside chance, and beside canonical correlation
  of principal components (`cca`), whose number validation subjects choose;
- sex by network prompting, and by a support vector machine on embeddings of images, beside the same
  image encoder trained from random weights (`scratch`) on the labels of the same subjects, of whom
  there are few: `--labels` of the training part. Prompts take their networks, all of them. Beside
  these stand a support vector machine on voxels (`svm-voxels`) and FC.

The seeds are those of the weights and of the trainings; the data and the split are the same. Data
that are in the folder already are used again.
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
from sklearn.metrics import roc_auc_score

from neuromamba.anat import run_anat
from neuromamba.baseline_predictions import choose_subjects, run_baselines
from neuromamba.bids import run_index
from neuromamba.config import Config
from neuromamba.connectivity import read_z
from neuromamba.demo import write_demo
from neuromamba.demo_anatomy import SHARE
from neuromamba.evaluate import run_evaluate
from neuromamba.excluded import run_excluded
from neuromamba.finetune import run_finetune
from neuromamba.layout import Layout
from neuromamba.linear_models import predict_class
from neuromamba.paired_windows import ImageWindows
from neuromamba.pretrain import run_pretrain
from neuromamba.retrieval import Floats, ranks_of, summarize_ranks
from neuromamba.retrieve import run_retrieve
from neuromamba.rois import run_rois
from neuromamba.splits import read_split, run_splits
from neuromamba.tables import read_table, write_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

SIZES = {"width": 64, "feature_size": 12, "patch": 4, "window": 3, "mask_patch": 8}
SIZES |= {"network_depth": 1, "network_hidden": 64}
CHANGES = {"scale": 0.05, "shift": 0.05, "noise": 0.05}
RATE = 1e-3
COMPONENTS = (10, 20, 40, 80)
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
    pretrain = {"steps": steps, "batch_size": 32, "learning_rate": RATE, "warmup_steps": 10}
    pretrain |= {"validate_every": 20, "checkpoint_every": 1000}
    tuned = {"start": "fresh", "mode": "full", "steps": steps, "batch_size": 8}
    tuned |= {"learning_rate": RATE, "warmup_steps": 10, "validate_every": 20}
    model = {"family": "cinp", "changes": CHANGES, "pretrain": pretrain, **SIZES}
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
            "splits": {"test": 0.25, "validation": 0.1},
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


def compare(config: Config) -> dict[str, Any]:
    """What linear models make of the same subjects: retrieval by `cca`, and sex by voxels."""
    layout = Layout.of(config, "demo")
    split = {part: sorted(names) for part, names in read_split(layout.split).items()}
    everybody = [name for part in ("train", "validation", "test") for name in split[part]]
    images = ImageWindows(lambda name: layout.array("anat", name))
    voxels = np.stack([images.read(name, 0)["anat"].ravel() for name in everybody]).astype(float)
    voxels = voxels[:, voxels.any(axis=0)]
    pearson = [read_z(layout.array("rois", f"{n}_task-rest"), "pearson")[1] for n in everybody]
    upper = np.triu_indices(len(pearson[0]), 1)
    networks = np.nan_to_num(np.tanh(np.stack(pearson))[:, upper[0], upper[1]])

    n_train, n_test = len(split["train"]), len(split["test"])
    similar = {count: correlate(voxels, networks, n_train, count) for count in COMPONENTS}
    others = slice(n_train, -n_test)
    ranks = {k: ranks_of(one[others, others]).mean() for k, one in similar.items()}
    best = min(COMPONENTS, key=ranks.__getitem__)
    found = similar[best][-n_test:, -n_test:]
    how = (config.retrieve.recall_at, config.evaluate.bootstrap, config.evaluate.confidence, 0)
    rows = [
        {"direction": f"cca, {name}", **summarize_ranks(ranks_of(one), n_test, *how)}
        for name, one in (("image to network", found), ("network to image", found.T))
    ]

    subjects = choose_subjects(config, "demo", "sex")
    place = {name: i for i, name in enumerate(everybody)}
    number = {name: k for k, name in enumerate(subjects.classes)}
    learnt, tested = (
        voxels[[place[str(name)] for name in one.index]] for one in (subjects.train, subjects.test)
    )
    labels, truth = (one.map(number).to_numpy() for one in (subjects.train, subjects.test))
    inner = config.evaluate.inner_folds
    predicted, _ = predict_class(learnt, labels, tested, inner, config.splits.seed, "svm")
    auroc = float(roc_auc_score(truth, predicted[:, 1]))
    return {"components": best, "retrieval": rows, "svm-voxels": {"auroc": auroc}}


def correlate(first: Floats, second: Floats, n_train: int, count: int) -> Floats:
    """Similarities (subject, subject) by canonical correlation of `count` principal components.

    All is fitted on the first `n_train` subjects. A pair of variates counts by its correlation.
    """
    whitened = []
    for values in (first, second):
        centred = values - values[:n_train].mean(axis=0)
        axes = np.linalg.svd(centred[:n_train], full_matrices=False)[2][:count]
        scores = centred @ axes.T
        whitened.append(scores / scores[:n_train].std(axis=0))
    left, strength, right = np.linalg.svd(whitened[0][:n_train].T @ whitened[1][:n_train] / n_train)
    variates = [whitened[0] @ left * strength, whitened[1] @ right.T]
    one, other = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in variates)
    return np.asarray(one @ other.T)


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


def describe(results: list[dict[str, Any]], linear: dict[str, Any], about: str) -> str:
    lines = [about, "", "| direction | seed | recall@1 | recall@5 | mean rank | chance |"]
    lines.append("|---|---|---|---|---|---|")
    for one in [*results, {"seed": "", **linear}]:
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
    names = ("network-prompting", "svm-image", "scratch", "svm-voxels", "svm-network", "fc")
    for name in (*names, "majority"):
        of_seeds = ({**one["metrics"], **linear}.get(name, {}) for one in results)
        values = [one.get("auroc", np.nan) for one in of_seeds]
        cells = [f"{value:.2f}" for value in [*values, np.mean(values)]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for data and results")
    parser.add_argument("--subjects", type=int, default=800)
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    host = machine(*PACKAGES)
    config = make_config(options.folder, options.steps)
    prepare(config, options.folder, options.subjects, options.labels)
    run_baselines(config, "demo", "sex")
    linear = compare(config)
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
        settings = vars(options) | {"folder": ""}
        result = {"machine": host, "settings": settings, "results": results, "linear": linear}
        write_results(RESULTS, "cinp_demo", result, describe(results, linear, about) + "\n")


if __name__ == "__main__":
    main()
