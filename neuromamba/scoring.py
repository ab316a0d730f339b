"""Metrics and comparisons of a table of predictions, written beside it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from neuromamba.config import Config
from neuromamba.metrics import compare, compute_metrics, read_predictions
from neuromamba.tables import write_table


def write_metrics(folder: Path, model: str, config: Config) -> None:
    """Compute `comparison.tsv` and `metrics.tsv` from the `predictions.tsv` in `folder`."""
    predictions = read_predictions(folder / "predictions.tsv")
    evaluate = config.evaluate
    settings = (evaluate.bootstrap, evaluate.confidence, config.splits.seed, evaluate.permutations)
    others = [name for name in predictions["predictor"].unique() if name != model]
    compared = [compare(predictions, model, other, *settings) for other in others]
    write_table(folder / "comparison.tsv", pd.concat(compared, ignore_index=True))
    write_table(folder / "metrics.tsv", compute_metrics(predictions, *settings))
