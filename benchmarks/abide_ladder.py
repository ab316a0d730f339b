"""What each step from functional connectivity to the features of `lmae` costs on real ROI series.

Input: the results of `snakemake baselines --configfile benchmarks/abide_series.yaml` in the current
folder: ROI stores and folds. Every step takes a little away from the one above, and the same
logistic or ridge regression (that of the baselines) reads all of them, so a difference is lost
information and nothing else:

- run: correlations of the whole run, Fisher's z, as the `fc` baseline has them;
- windows: the mean of those of the model's evaluation windows; window: of the one in the middle;
- positive: without negative ones, and without Fisher's z; neighbors: the strongest of each region;
- step: these as probabilities of a step; signed: with those of the negative ones beside them;
  steps: of 1, 2, ... steps;
- MxD: one step, read by M random weightings of the regions and D-wide random embeddings of them
  (the model's `maps` and `region_width`, as they are before any training).

No step is trained, so nothing here is tuned to the tested subjects.

    python benchmarks/abide_ladder.py --targets sex asd age
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from common import RESULTS, head, machine, write_results
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from neuromamba.config import Config, Lmae, Target, load_config
from neuromamba.excerpts import read_series, standardise
from neuromamba.layout import Layout
from neuromamba.linear_models import predict_class, predict_number
from neuromamba.models.random_walk import correlation, transitions, walk
from neuromamba.models.roi_layers import projection
from neuromamba.roi_windows import RoiWindows
from neuromamba.spacing import spaced
from neuromamba.splits import read_split
from neuromamba.tables import read_table

PACKAGES = ("neuromamba", "torch", "numpy", "scikit-learn")
STEPS = ("run", "windows", "window", "positive", "neighbors", "step", "signed", "steps")
DATASET = "abide-series"
Floats = npt.NDArray[np.float32]
Features = dict[str, Floats]
Splits = list[tuple[list[str], list[str]]]


def correlations(series: npt.NDArray[np.floating]) -> torch.Tensor:
    """(1, region, region) of series (time, region), in which 0 is a region that is missing."""
    rows = torch.tensor(series.T[None], dtype=torch.float32)
    return correlation(rows, torch.ones_like(rows, dtype=torch.bool))


def upper(matrix: torch.Tensor) -> Floats:
    """The values above the diagonal."""
    row, column = torch.triu_indices(*matrix.shape[-2:], offset=1)
    return matrix[0, row, column].numpy()


def fisher_z(matrix: torch.Tensor) -> Floats:
    return upper(matrix.clamp(-0.9999, 0.9999).atanh())


def features_of(path: Path, reader: RoiWindows, run: str, model: Lmae) -> Features:
    """What each step leaves of a run; means over the windows, but for `run` and `window`."""
    found: dict[str, list[Floats]] = {name: [] for name in STEPS}
    found["run"].append(fisher_z(correlations(np.nan_to_num(standardise(read_series(path))))))
    starts = spaced(reader.positions(run) - 1, model.finetune.evaluation_windows)
    for place, start in enumerate(starts):
        window = reader.read(run, int(start))
        matrix, present = correlations(window["rois"]), torch.from_numpy(window["present"])[None]
        found["windows"].append(fisher_z(matrix))
        if place == len(starts) // 2:
            found["window"].append(fisher_z(matrix))
        found["positive"].append(upper(matrix.clamp(min=0)))
        alone = torch.zeros(matrix.shape[1:])
        graphs = transitions(matrix, present, alone, model.neighbors, signed=True)
        found["neighbors"].append(torch.where(graphs[0] > 0, matrix, 0.0).flatten().numpy())
        found["step"].append(graphs[0].flatten().numpy())
        reached = walk(graphs[:1], torch.eye(matrix.shape[-1])[None], model.walk_steps)
        found["steps"].append(torch.cat([one.flatten() for one in reached]).numpy())
        both = torch.cat([graph.flatten() for graph in graphs])
        found["signed"].append(both.numpy())
    return {name: np.mean(values, axis=0, dtype=np.float32) for name, values in found.items()}


def forms_of(step: Floats, size: str, n_rois: int) -> Floats:
    """u' P e of all pairs of weightings u and columns e of embeddings, flattened."""
    left, right = (projection(n_rois, int(columns)).numpy() for columns in size.split("x"))
    return (left.T @ step.reshape(n_rois, n_rois) @ right).flatten()


def score(
    x: dict[str, Floats], labels: pd.Series, target: Target, splits: Splits, config: Config
) -> list[float]:
    """AUROC, or Pearson's r, of each fold."""
    inner, scores = (config.evaluate.inner_folds, config.seeds[0]), []
    for train, test in splits:
        a, b = (np.stack([x[name] for name in part]) for part in (train, test))
        if target.kind == "regression":
            told, _ = predict_number(a, labels[train].to_numpy(np.float64), b, *inner)
            scores.append(np.corrcoef(told, labels[test].to_numpy(np.float64))[0, 1])
        else:
            second = labels == list(target.classes.values())[1]
            share, _ = predict_class(a, second[train].to_numpy(np.int64), b, *inner)
            scores.append(roc_auc_score(second[test], share[:, 1]))
    return [float(one) for one in scores]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["sex", "asd", "age"])
    parser.add_argument("--model", default="lmae")
    sizes = ["32x32", "64x64", "128x128", "256x256"]
    parser.add_argument("--sizes", nargs="+", default=sizes, metavar="MxD")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = load_config(["config/config.yaml", "benchmarks/abide_series.yaml"])
    layout, model = Layout.of(config, DATASET), config.models[options.model]
    index = read_table(layout.index).set_index("subject")["run"]
    path_of = partial(layout.array, "rois")
    n_rois = read_series(path_of(index.iloc[0])).shape[1]
    reader = RoiWindows(path_of, model, config.tokens.time_patch, n_rois)
    features: dict[str, dict[str, Floats]] = {name: {} for name in STEPS}
    for subject, run in tqdm(list(index.items()), desc="features", unit="subject"):
        for name, x in features_of(path_of(run), reader, run, model).items():
            features[name][subject] = x
    for size in options.sizes:
        features[size] = {}
        for subject, step in features["step"].items():
            torch.manual_seed(config.seeds[0])
            features[size][subject] = forms_of(step, size, n_rois)
    parts = [read_split(path) for path in sorted(layout.split.parent.glob("fold-*.tsv"))]
    splits = [(part["train"] + part["validation"], part["test"]) for part in parts]
    settings = config.datasets[DATASET]
    people = read_table(settings.participants.file).set_index("participant_id")
    host, rows = machine(*PACKAGES), []
    text = [
        head(host, PACKAGES),
        "",
        f"{len(index)} subjects of ABIDE, CC400, {len(splits)} folds; AUROC of classes and Pearson "
        "r of age, SD over folds in brackets.",
        "",
        "| features | number | " + " | ".join(options.targets) + " |",
        "|---" * (2 + len(options.targets)) + "|",
    ]
    for name in (*STEPS, *options.sizes):
        cells = []
        for target in options.targets:
            found = settings.targets[target]
            scores = score(features[name], people[found.column], found, splits, config)
            rows.append({"features": name, "target": target, "scores": scores})
            cells.append(f"{np.mean(scores):.3f} ({np.std(scores):.3f})")
        count = len(next(iter(features.pop(name).values())))
        text.append(f"| {name} | {count:,} | {' | '.join(cells)} |")
        print(text[-1], flush=True)
    print("\n".join(text))
    write_results(
        options.results, "abide_ladder", {"machine": host, "scores": rows}, "\n".join(text)
    )


if __name__ == "__main__":
    main()
