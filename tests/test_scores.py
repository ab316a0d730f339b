"""The figures of a model for experiment trackers are those of its tables."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from neuromamba.files import InputError
from neuromamba.scores import loss_curve, nest_metrics


def test_metrics_are_nested_with_their_intervals():
    table = pd.DataFrame(
        {
            "predictor": ["m", "m", "fc"],
            "metric": ["auroc", "brier", "auroc"],
            "value": [0.7, 0.2, 0.8],
            "low": [0.6, float("nan"), 0.75],
            "high": [0.8, float("nan"), 0.9],
        }
    )
    nested = nest_metrics(table)
    assert nested["m"]["auroc_low"] == 0.6
    assert nested["fc"] == {"auroc": 0.8, "auroc_low": 0.75, "auroc_high": 0.9}
    assert nested["m"]["brier_low"] is None
    json.dumps(nested, allow_nan=False)


def test_a_curve_has_each_validation_with_the_training_loss_before_it(tmp_path: Path):
    rows = [
        {"step": 1, "split": "train", "loss": 3.0},
        {"step": 2, "split": "train", "loss": 2.0},
        {"step": 2, "split": "validation", "loss": 2.5},
        {"step": 2, "event": "spike"},
        {"step": 4, "split": "train", "loss": 1.0},
        {"step": 5, "split": "validation", "loss": 1.5},
    ]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "metrics.jsonl").write_text(text)
    curve = loss_curve(tmp_path)
    assert list(curve.columns) == ["step", "train", "validation"]
    assert curve.to_numpy().tolist() == [[2, 2.0, 2.5], [5, 1.0, 1.5]]


def test_a_training_without_a_log_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"metrics\.jsonl does not exist"):
        loss_curve(tmp_path)
