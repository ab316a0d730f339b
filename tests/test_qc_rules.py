"""Which runs the rules of quality leave out, and which are flagged as unlike the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fabricate import make_config

from neuromamba.config import Config, Qc
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.qc_rules import broken_rules, has_rules, left_out
from neuromamba.qc_table import METRICS, deviations, find_outliers, robust_z
from neuromamba.tables import write_table

GOOD = {
    "mean_fd": 0.1,
    "high_motion": 0.05,
    "minutes_low_motion": 6.0,
    "coverage": 0.97,
    "correlation": 0.5,
    "tsnr": 60.0,
}
RULES = {
    "max_mean_fd": 0.3,
    "max_high_motion": 0.2,
    "min_minutes": 4.0,
    "min_coverage": 0.9,
    "min_correlation": 0.3,
    "min_tsnr": 40.0,
}


def write_quality(config: Config, rows: list[dict[str, Any]]) -> None:
    write_table(Layout.of(config, "toy").manifest("qc", 0), pd.DataFrame(rows))


def config_with(folder: Path, **rules: Any) -> Config:
    return make_config(folder, qc=rules)


# --- Rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "metric", "value", "words"),
    [
        ("max_mean_fd", "mean_fd", 0.42, "mean FD is 0.42 mm, over qc.max_mean_fd = 0.3"),
        ("max_high_motion", "high_motion", 0.25, "0.25, over qc.max_high_motion = 0.2"),
        ("min_minutes", "minutes_low_motion", 3.5, "3.5 min, under qc.min_minutes = 4"),
        ("min_coverage", "coverage", 0.7, "0.7, under qc.min_coverage = 0.9"),
        ("min_correlation", "correlation", 0.1, "0.1, under qc.min_correlation = 0.3"),
        ("min_tsnr", "tsnr", 20, "20, under qc.min_tsnr = 40"),
    ],
)
def test_each_rule_leaves_out_what_it_says(
    tmp_path: Path, rule: str, metric: str, value: float, words: str
) -> None:
    config = config_with(tmp_path, **RULES)
    write_quality(
        config,
        [
            {"run": "good", "reason": None, **GOOD},
            {"run": "bad", "reason": None, **GOOD, metric: value},
        ],
    )
    found = left_out(config, "toy")
    assert list(found) == ["bad"]
    assert words in found["bad"]
    assert list(broken_rules({**GOOD, metric: value}, config.qc)) == [rule]


def test_the_limit_itself_is_good_enough() -> None:
    at_limit = dict(zip(GOOD, RULES.values(), strict=True))
    assert broken_rules(at_limit, Qc(**RULES)) == {}


def test_unknown_motion_is_left_out_only_where_a_rule_asks_for_it(tmp_path: Path) -> None:
    unknown = {**GOOD, "mean_fd": None, "high_motion": None, "minutes_low_motion": None}
    row = {"run": "still", "reason": None, **unknown, "motion_note": "the run has no confounds"}
    asking = config_with(tmp_path, max_mean_fd=0.3)
    write_quality(asking, [row])
    reason = left_out(asking, "toy")["still"]
    assert "qc.max_mean_fd" in reason
    assert "unknown: the run has no confounds" in reason
    assert left_out(config_with(tmp_path, min_tsnr=40), "toy") == {}


def test_a_run_that_was_not_measured_is_left_out_as_long_as_there_are_rules(tmp_path: Path) -> None:
    rows = [
        {"run": "a", "reason": None, **GOOD},
        {"run": "b", "reason": "the volumes are damaged"},
    ]
    config = config_with(tmp_path, min_tsnr=1)
    write_quality(config, rows)
    assert left_out(config, "toy") == {
        "b": "its quality could not be measured: the volumes are damaged"
    }


def test_without_rules_nothing_is_read(tmp_path: Path) -> None:
    config = config_with(tmp_path, fd_threshold=0.2, outlier=2)
    assert not has_rules(config)
    assert left_out(config, "toy") == {}


def test_rules_without_a_table_are_an_error(tmp_path: Path) -> None:
    config = config_with(tmp_path, min_tsnr=40)
    assert has_rules(config)
    with pytest.raises(InputError, match=r"batch-0\.tsv"):
        left_out(config, "toy")


def test_planning_loads_no_heavy_library() -> None:
    code = (
        "import sys, neuromamba.qc_rules;"
        "print([n for n in ('torch', 'zarr', 'nilearn', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- Runs that are unlike the others ------------------------------------------------------------


def spread(n: int = 40) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({name: rng.normal(10, 1, n) for name in METRICS})


def test_planted_outliers_are_found_on_the_bad_side_only() -> None:
    table = spread()
    table.loc[3, "mean_fd"], table.loc[4, "mean_fd"] = 30.0, -10.0
    table.loc[5, "tsnr"], table.loc[6, "tsnr"] = -10.0, 30.0
    table.loc[7, "n_tokens"], table.loc[8, "n_tokens"] = -10.0, 30.0
    assert find_outliers(deviations(table), 5) == {
        3: {"mean_fd": "high"},
        5: {"tsnr": "low"},
        7: {"n_tokens": "low"},
        8: {"n_tokens": "high"},
    }


def test_z_is_that_of_a_normal_distribution() -> None:
    values = pd.Series(np.random.default_rng(0).normal(5, 2, 20000))
    assert robust_z(values).std() == pytest.approx(1, abs=0.03)


def test_one_that_differs_from_many_that_are_the_same_is_found() -> None:
    assert robust_z(pd.Series([2.0] * 30 + [2.5])).iloc[-1] > 10
    assert (robust_z(pd.Series([2.0] * 30)) == 0).all()
    assert (robust_z(pd.Series([2.0] * 29 + [2.0 + 1e-9])) == 0).all()


def test_few_runs_have_no_outliers() -> None:
    assert robust_z(pd.Series([1.0, 1.0, 1.1, 99.0])).isna().all()
    assert find_outliers(deviations(spread(3)), 0.1) == {}
