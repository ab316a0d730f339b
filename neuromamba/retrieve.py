"""What a model that brings two kinds of data together has learnt of them: retrieval and prompts.

Design choices
--------------
- A subject has one embedding of either kind: the mean over its runs, brought to length 1.
  They are written first, and everything after is computed from them.
- Retrieval is among the test subjects that have both kinds, in both directions.
- Network prompting (`retrieve.share`, `retrieve.groups`) predicts test subjects by the first kind
  alone. Its references are the second kind of some subjects of the training part, whose labels are
  all that it takes; the pretraining has seen none.
- The linear probe is a support vector machine on embeddings of labelled training and validation
  subjects, as the baselines have them, with its penalty chosen within: of the first kind
  (`svm-<kind>`), and, as what the other knows, of the second.
- A model that has seen a test subject is refused, as in the evaluation.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from scipy.special import softmax
from tqdm import tqdm

from neuromamba.baseline_predictions import choose_subjects
from neuromamba.baselines import Subjects, no_features
from neuromamba.batches import Windows, group_runs, list_runs, make_readers
from neuromamba.config import Classification, Config
from neuromamba.evaluate import find_seen, tabulate
from neuromamba.files import InputError, atomic_path, write_json
from neuromamba.layout import Layout
from neuromamba.linear_models import predict_class
from neuromamba.metrics import compute_metrics
from neuromamba.models.contrastive import Pairs
from neuromamba.pretrained import open_pretrained
from neuromamba.record import provenance
from neuromamba.retrieval import Floats, draw_references, prompt, ranks_of, summarize_ranks
from neuromamba.retrieve_figure import draw_retrieval
from neuromamba.runtime import choose_device
from neuromamba.scalars import to_device
from neuromamba.splits import read_split
from neuromamba.tables import write_table

BATCH_SIZE = 4
"""Runs a forward pass."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of subjects, float64, of length 1; NaN where a subject lacks a kind.

    Attributes
    ----------
    subjects
        (subject,), sorted.
    first, second
        (subject, channel).
    """

    subjects: list[str]
    first: Floats
    second: Floats

    def of(self, names: list[str], kind: str) -> Floats:
        """The rows of some subjects, `kind` being `first` or `second`."""
        place = {name: i for i, name in enumerate(self.subjects)}
        return np.asarray(getattr(self, kind)[[place[name] for name in names]])

    def having(self, *kinds: str) -> set[str]:
        """The subjects who have all of these kinds."""
        has = np.all([np.isfinite(getattr(self, kind)).all(axis=1) for kind in kinds], axis=0)
        return {name for name, there in zip(self.subjects, has, strict=True) if there}


def run_retrieve(config: Config, dataset: str, model: str, seed: int) -> None:
    """Write what is found, and last `retrieve.json`.

    `embeddings.npz` has `subject` and (subject, channel) float32 of either kind, NaN where there is
    none; `ranks.tsv` a row for each test subject and direction; `retrieve.tsv` one for each
    direction (see `retrieval.summarize_ranks`), drawn in `retrieve.svg`; `predictions.tsv` and
    `metrics.tsv` are those of an evaluation, with a column `target`, of prompting and probes.

    Raises
    ------
    InputError
        When the model brings no two kinds together, has not been pretrained under these settings,
        or has seen a test subject; when fewer than two test subjects have both kinds.
    """
    kinds = config.models[model].pairs
    if not kinds:
        raise InputError(
            f"models.{model} (family {config.models[model].family}) brings no two kinds of data "
            "together, so that none could find the other: take a model of family cinp"
        )
    layout = Layout.of(config, dataset)
    folder, split = layout.retrieve(model, seed), read_split(layout.split)
    network, info = open_pretrained(config, dataset, model, seed)
    seen = find_seen(config, dataset, info, split["test"])
    everybody = [name for part in split.values() for name in part]
    runs = list_runs(config, dataset, everybody, config.models[model].needs)
    readers = make_readers(network, layout, config.models[model], config.tokens)
    windows = Windows(group_runs(runs), readers, config.compute.max_excluded)
    embedded = embed_subjects(network.to(choose_device(config.compute.device)), windows)
    save_embeddings(folder / "embeddings.npz", embedded, kinds)
    test = sorted(embedded.having("first", "second") & set(split["test"]))
    if len(test) < 2:
        raise InputError(
            f"{layout.split}: {len(test)} test subjects have {' and '.join(kinds)}, and retrieval "
            "takes two at least; see the manifests of anat and rois for the reasons"
        )
    write_retrieval(folder, embedded, test, config, kinds, model)
    scale = float(cast(torch.Tensor, network.similarity_scale))
    references = write_predictions(folder, embedded, config, dataset, kinds, scale)
    facts = {
        "dataset": dataset,
        "model": model,
        "seed": seed,
        "weights": info["files"]["model.safetensors"],
        "settings": config.retrieve.model_dump(mode="json"),
        "kinds": list(kinds),
        "n_test_subjects": len(split["test"]),
        "n_pairs": len(test),
        "references": references,
        "left_out": windows.left_out,
        "seen_subjects": seen,
        **provenance(),
    }
    write_json(folder / "retrieve.json", facts)
    told = f"{len(test)} test subjects found each other's {kinds[0]} and {kinds[1]}"
    tqdm.write(f"{dataset}, {model}: {told}", file=sys.stderr)


@torch.no_grad()
def embed_subjects(network: torch.nn.Module, windows: Windows) -> Embedded:
    """Embed all runs of all subjects, in evaluation mode, where the model is."""
    network.eval()
    device = next(network.parameters()).device
    first: list[Floats] = []
    second: list[Floats] = []
    for subject in tqdm(windows.subjects, "embed", unit="subject", mininterval=1.0):
        of_runs: list[Pairs] = []
        for batch in windows.batches(windows.spaced(1, [subject]), BATCH_SIZE):
            of_runs.append(network.embed_pairs(to_device(batch, device)))  # type: ignore[operator]
        for kind, found in (("first", first), ("second", second)):
            rows = torch.cat([getattr(one, kind) for one in of_runs]).double().cpu().numpy()
            there = torch.cat([getattr(one, f"has_{kind}") for one in of_runs]).cpu().numpy()
            mean = rows[there].mean(axis=0) if there.any() else np.full(rows.shape[1], np.nan)
            found.append(mean / np.linalg.norm(mean))
    return Embedded(windows.subjects, np.stack(first), np.stack(second))


def save_embeddings(path: Path, embedded: Embedded, kinds: tuple[str, ...]) -> None:
    """Write `subject` and the two kinds by their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {kinds[0]: embedded.first, kinds[1]: embedded.second}
    arrays: dict[str, Any] = {name: one.astype(np.float32) for name, one in values.items()}
    with atomic_path(path) as temporary:
        # Text and numbers need no pickle.
        np.savez(temporary, subject=np.array(embedded.subjects), **arrays)


def write_retrieval(
    folder: Path,
    embedded: Embedded,
    test: list[str],
    config: Config,
    kinds: tuple[str, ...],
    title: str,
) -> None:
    """Write `ranks.tsv`, `retrieve.tsv` and `retrieve.svg` of the test subjects."""
    similar = embedded.of(test, "first") @ embedded.of(test, "second").T
    directions = {f"{kinds[0]} to {kinds[1]}": similar, f"{kinds[1]} to {kinds[0]}": similar.T}
    evaluate, at = config.evaluate, config.retrieve.recall_at
    rows, summaries, found = [], [], {}
    for name, matrix in directions.items():
        found[name] = ranks_of(matrix)
        ranks = pd.DataFrame({"subject": test, "direction": name, "rank": found[name]})
        rows.append(ranks)
        how = (evaluate.bootstrap, evaluate.confidence, config.splits.seed)
        summary = summarize_ranks(found[name], len(test), at, *how)
        summaries.append({"direction": name, **summary})
    write_table(folder / "ranks.tsv", pd.concat(rows, ignore_index=True))
    write_table(folder / "retrieve.tsv", pd.DataFrame(summaries))
    draw_retrieval(folder / "retrieve.svg", found, title)


def write_predictions(
    folder: Path,
    embedded: Embedded,
    config: Config,
    dataset: str,
    kinds: tuple[str, ...],
    scale: float,
) -> dict[str, dict[str, int]]:
    """Write `predictions.tsv` and `metrics.tsv`; returns how many references each class has."""
    evaluate, tables, metrics, counts = config.evaluate, [], [], {}
    for target, spec in config.datasets[dataset].subject_targets.items():
        if not isinstance(spec, Classification):
            continue  # only classes can be prompted
        subjects = choose_subjects(config, dataset, target)
        # Who has no image cannot be predicted by one.
        with_image = subjects.test[subjects.test.index.isin(embedded.having("first"))]
        predicted, drawn = predict_target(embedded, config, dataset, subjects, kinds, scale)
        counts[target] = drawn
        tested = Subjects(subjects.classes, subjects.train, with_image, subjects.unlabelled)
        table = pd.concat(
            [tabulate(name, one, tested) for name, one in predicted.items()], ignore_index=True
        )
        tables.append(table.assign(target=target))
        how = (evaluate.bootstrap, evaluate.confidence, config.splits.seed, evaluate.permutations)
        metrics.append(compute_metrics(table, *how).assign(target=target))
    if tables:
        write_table(folder / "predictions.tsv", pd.concat(tables, ignore_index=True))
        write_table(folder / "metrics.tsv", pd.concat(metrics, ignore_index=True))
    return counts


def predict_target(
    embedded: Embedded,
    config: Config,
    dataset: str,
    subjects: Subjects,
    kinds: tuple[str, ...],
    scale: float,
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """Probabilities of each class by prompting, by probes and by nothing; and the references."""
    test = [name for name in subjects.test.index if name in embedded.having("first")]
    number = {name: k for k, name in enumerate(subjects.classes)}
    labels = {str(name): number[label] for name, label in subjects.train.items()}
    train_part = read_split(Layout.of(config, dataset).split)["train"]
    may = {n: labels[n] for n in train_part if n in labels and n in embedded.having("second")}
    settings, seed = config.retrieve, config.splits.seed
    chosen = draw_references(may, settings.share, len(subjects.classes), seed)
    drawn = {name: len(one) for name, one in zip(subjects.classes, chosen, strict=True)}
    if not all(chosen):
        raise InputError(
            f"no training subject of class {', '.join(n for n, m in drawn.items() if not m)} has a "
            f"{kinds[1]} to prompt it by; raise splits.train or look at excluded.tsv"
        )
    references = [embedded.of(names, "second") for names in chosen]
    scores = prompt(embedded.of(test, "first"), references, settings.groups)
    found: dict[str, Floats] = {f"{kinds[1]}-prompting": softmax(scale * scores, axis=1)}
    for kind, name in zip(("first", "second"), kinds, strict=True):
        if not set(test) <= embedded.having(kind):
            continue  # the same test subjects for all
        train = [one for one in labels if one in embedded.having(kind)]
        truth = np.array([labels[one] for one in train], dtype=np.int64)
        if len(set(truth)) == len(subjects.classes):
            found[f"svm-{name}"], _ = predict_class(
                embedded.of(train, kind),
                truth,
                embedded.of(test, kind),
                config.evaluate.inner_folds,
                seed,
                "svm",
            )
    share = list(no_features(subjects.train, subjects.classes).values())
    found["majority"] = np.tile(np.asarray(share, dtype=np.float64), (len(test), 1))
    tables = {n: pd.DataFrame(p, test, subjects.columns) for n, p in found.items()}
    return tables, drawn
