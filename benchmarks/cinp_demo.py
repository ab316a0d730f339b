"""Does bringing images and networks together pay, on data in which there is something to find?

    python benchmarks/cinp_demo.py --folder FOLDER
    python benchmarks/cinp_demo.py --folder FOLDER --seeds 0 --steps 20

Synthetic subjects (`neuromamba demo-data`), the variance of whose anatomy is explained by
connectivity to a known share. A small Cinp is pretrained without labels, by INC and INM: MIM takes
as long again, and made no difference in trials. Then, by test subjects:

- retrieval of networks by images and the other way, beside chance, and beside canonical correlation
  of principal components (`cca`), whose number validation subjects choose;
- sex by network prompting, and by a support vector machine on embeddings of images, beside the same
  image encoder trained from random weights (`scratch`) on the labels of the same subjects, of whom
  there are few: `--labels` of the training part. Prompts take their networks, all of them. Beside
  these stand a support vector machine on voxels (`svm-voxels`) and FC.

A seed is that of the weights, of the trainings, and of who of the training subjects has a label;
the data and the split are the same. Data that are in the folder already are used again.
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
SIZES |= {"network_depth": 1, "network_hidden": 64, "mim": 0.0}
CHANGES = {"scale": 0.05, "shift": 0.05, "noise": 0.05}
RATE = 1e-3
COMPONENTS = (10, 20, 40, 80)
PARTS = ("train", "validation", "test")
ATLAS = "tpl-MNI152NLin2009cAsym/anat/tpl-MNI152NLin2009cAsym_atlas-demo_dseg.nii.gz"
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
        "atlas": str(data / ATLAS),
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
            "splits": {"test": 0.25, "validation": 0.1},
            "retrieve": {"share": 1.0, "groups": 5},
            "evaluate": {"baselines": ["fc"]},
            "compute": {"device": "cpu"},
        }
    )


def prepare(config: Config, folder: Path, subjects: int) -> None:
    """Data and split."""
    if not (folder / "data").exists():
        write_demo(folder / "data", subjects, volumes=120, voxel_size=8.0)
    write_table(folder / "participants.tsv", read_table(folder / "data" / "participants.tsv"))
    run_index(config, "demo")
    for stage in (run_volumes, run_tokens, run_rois, run_anat):
        stage(config, "demo", 0)
    run_excluded(config, "demo")
    if not Layout.of(config, "demo").split.exists():
        run_splits(config, "demo")


def draw_labels(config: Config, folder: Path, labels: int, seed: int) -> None:
    """A table with the labels of all test subjects, and of some others that a seed draws."""
    split = read_split(Layout.of(config, "demo").split)
    table = read_table(folder / "data" / "participants.tsv", dtype=str)
    of_part = {name: part for part, names in split.items() for name in names}
    part = table["participant_id"].map(of_part)
    kept = part == "test"
    rng = np.random.default_rng(seed)
    # As many of each sex, and a third as many to choose the weights by.
    for name, count in (("train", labels), ("validation", max(4, labels // 3))):
        for sex in ("F", "M"):
            who = table.index[(part == name) & (table["sex"] == sex)]
            kept.loc[rng.permutation(who)[: count // 2]] = True
    write_table(folder / "participants.tsv", table.assign(sex=table["sex"].where(kept)))


def read_both(config: Config) -> tuple[dict[str, list[str]], Floats, Floats]:
    """The subjects of each part, and of all in that order the voxels and connections."""
    layout = Layout.of(config, "demo")
    split = {part: sorted(names) for part, names in read_split(layout.split).items()}
    everybody = [name for part in PARTS for name in split[part]]
    images = ImageWindows(lambda name: layout.array("anat", name))
    voxels = np.stack([images.read(name, 0)["anat"].ravel() for name in everybody]).astype(float)
    pearson = [read_z(layout.array("rois", f"{n}_task-rest"), "pearson")[1] for n in everybody]
    upper = np.triu_indices(len(pearson[0]), 1)
    networks = np.nan_to_num(np.tanh(np.stack(pearson))[:, upper[0], upper[1]])
    return split, voxels[:, voxels.any(axis=0)], networks


def retrieve_linearly(config: Config) -> dict[str, Any]:
    """Retrieval by canonical correlation of the same subjects."""
    split, voxels, networks = read_both(config)
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
    return {"components": best, "retrieval": rows}


def probe_voxels(config: Config) -> dict[str, float]:
    """Sex by a support vector machine on the voxels of the subjects with a label."""
    split, voxels, _ = read_both(config)
    subjects = choose_subjects(config, "demo", "sex")
    everybody = [name for part in PARTS for name in split[part]]
    place = {name: i for i, name in enumerate(everybody)}
    number = {name: k for k, name in enumerate(subjects.classes)}
    learnt, tested = (
        voxels[[place[str(name)] for name in one.index]] for one in (subjects.train, subjects.test)
    )
    labels, truth = (one.map(number).to_numpy() for one in (subjects.train, subjects.test))
    inner = config.evaluate.inner_folds
    predicted, _ = predict_class(learnt, labels, tested, inner, config.splits.seed, "svm")
    return {"auroc": float(roc_auc_score(truth, predicted[:, 1]))}


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


def run_seed(config: Config, folder: Path, labels: int, seed: int) -> dict[str, Any]:
    """What one seed gives: retrieval, and metrics by predictor."""
    started = time.perf_counter()
    draw_labels(config, folder, labels, seed)
    run_baselines(config, "demo", "sex")
    run_pretrain(config, "demo", "cinp", seed)
    run_retrieve(config, "demo", "cinp", seed)
    run_finetune(config, "demo", "scratch", seed, "sex", "restart")
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
        "metrics": values.to_dict("index") | {"svm-voxels": probe_voxels(config)},
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
        values = [one["metrics"].get(name, {}).get("auroc", np.nan) for one in results]
        cells = [f"{value:.2f}" for value in [*values, np.mean(values)]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append("")
    for name in ("network-prompting", "svm-image"):
        gains = [
            one["metrics"][name]["auroc"] - one["metrics"]["scratch"]["auroc"] for one in results
        ]
        spread = np.std(gains, ddof=1) if len(gains) > 1 else np.nan
        lines.append(
            f"{name} minus scratch: {np.mean(gains):+.3f} (SD over seeds {spread:.3f}; more with "
            f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds)."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for data and results")
    parser.add_argument("--subjects", type=int, default=800)
    parser.add_argument("--labels", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    host = machine(*PACKAGES)
    config = make_config(options.folder, options.steps)
    prepare(config, options.folder, options.subjects)
    linear = retrieve_linearly(config)
    results: list[dict[str, Any]] = []
    for seed in options.seeds:
        # Written after each, since a seed takes minutes.
        results.append(run_seed(config, options.folder, options.labels, seed))
        minutes = np.mean([one["seconds"] for one in results]) / 60
        about = (
            f"{head(host, PACKAGES)}\n{options.subjects} synthetic subjects, "
            f"{results[0]['n_test']} of them for tests; {SHARE:.0%} of the variance of anatomy, by "
            f"network, is connectivity's. {options.steps} steps of pretraining; sex is learnt from "
            f"{options.labels} training subjects, drawn anew for each seed. {minutes:.0f} minutes "
            "a seed."
        )
        settings = vars(options) | {"folder": ""}
        result = {"machine": host, "settings": settings, "results": results, "linear": linear}
        write_results(RESULTS, "cinp_demo", result, describe(results, linear, about) + "\n")


if __name__ == "__main__":
    main()
