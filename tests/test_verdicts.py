"""Words follow from p: after correction, and against the confound model as against FC."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reports

from neuromamba.baseline_notes import describe_baselines, join
from neuromamba.collect import Evaluation
from neuromamba.correction import corrected
from neuromamba.metrics import compare, compute_metrics
from neuromamba.verdicts import p_value, result_rows, verdict

FC = reports.NOTES["baselines"]["fc"] | {"confounds_regressed": ["site", "mean_fd"]}
CONFOUNDS = {"inverse_penalty": 0.1, "folds": 5, "columns": ["age", "site", "mean_fd"]}
NOTES: dict[str, Any] = reports.NOTES | {"baselines": {"fc": FC, "confounds": CONFOUNDS}}


def evaluation(target: str = "t", seed: int = 0, **errors: float) -> Evaluation:
    """A regression where each predictor errs by so much."""
    rng = np.random.default_rng(seed)
    true = rng.normal(50, 10, size=60)
    columns: dict[str, Any] = {"subject": [f"sub-{i:03}" for i in range(60)], "y_true": true}
    predicted = {name: true + error * rng.normal(size=60) for name, error in errors.items()}
    tables = [
        pd.DataFrame({**columns, "predictor": name, "y_pred": values})
        for name, values in (predicted | {"mean": np.full(60, 50.0)}).items()
    ]
    table = pd.concat(tables, ignore_index=True)
    others = [name for name in [*errors, "mean"] if name != "m"]
    compared = pd.concat([compare(table, "m", other, 200, 0.95, 0, 999) for other in others])
    metrics = compute_metrics(table, 200, 0.95, 0, 999)
    return Evaluation("d", "m", seed, target, metrics, compared, table, NOTES)


def with_p(found: Evaluation, **p: float) -> Evaluation:
    """The same with other p of the first metric, by what the model is compared with."""
    table = found.comparison.copy()
    for versus, value in p.items():
        table.loc[(table["versus"] == versus) & (table["metric"] == "mae"), "p"] = value
    return replace(found, comparison=table)


def holm(found: Evaluation, versus: str, metric: str = "mae") -> float:
    table = found.comparison.set_index(["versus", "metric"])
    return float(table.loc[(versus, metric), "p_holm"])


# --- Correction ---------------------------------------------------------------------------------


def test_what_is_compared_with_the_same_baseline_is_corrected_together() -> None:
    p = [0.01, 0.04, 0.03]
    found = [
        with_p(evaluation(target, k, m=2, fc=10, confounds=10), fc=p[k], confounds=0.02)
        for k, target in enumerate(("age", "iq", "age"))
    ]
    after = corrected(found)
    assert [holm(e, "fc") for e in after] == pytest.approx([0.03, 0.06, 0.06])
    assert [holm(e, "confounds") for e in after] == pytest.approx([0.06] * 3)
    better = [e.comparison.set_index(["versus", "metric"])["better"]["fc", "mae"] for e in after]
    assert better[0] == "m"
    assert pd.isna(better[1:]).all()
    r2 = [holm(e, "fc", "r2") for e in after]
    assert r2 == pytest.approx([0.003] * 3)  # a family of its own
    assert corrected([]) == []


def test_p_against_chance_is_corrected_for_models_alone() -> None:
    found = [evaluation(seed=k, m=2, fc=3) for k in range(4)]
    after = corrected(found)[1].metrics.set_index(["predictor", "metric"])
    assert after.loc[("m", "mae"), "p"] == 0.001
    assert after.loc[("m", "mae"), "p_holm"] == pytest.approx(0.004)
    assert np.isnan(after.loc[("fc", "mae"), "p_holm"])


def test_a_lead_that_correction_takes_away_is_no_longer_one() -> None:
    found = with_p(evaluation(m=2, fc=10), fc=0.04)
    alone, many = corrected([found])[0], corrected([found] * 3)[0]
    assert "m (seed 0) is better than the FC baseline" in verdict(alone)
    assert "p 0.040, corrected for the number of comparisons" in verdict(alone)
    assert "does not beat the FC baseline: it is ahead, by a difference" in verdict(many)
    assert "the tests of it cannot tell from none" in verdict(many)
    assert "p 0.120" in verdict(many)
    assert result_rows([alone])[0].cells["mae"].best
    assert not result_rows([many])[0].cells["mae"].best


# --- Words --------------------------------------------------------------------------------------


def test_a_model_that_beats_fc_but_not_the_confounds_is_told_so() -> None:
    text = verdict(evaluation(m=5, fc=20, confounds=2))
    assert "m (seed 0) is better than the FC baseline" in text
    assert "is worse than the confound model, what age, site and head motion alone predict" in text
    level = verdict(evaluation(m=5, fc=20, confounds=5))
    assert "It does not beat the confound model" in level
    better = verdict(evaluation(m=2, fc=2, confounds=20))
    assert "It is better than what age, site and head motion alone predict (difference in" in better
    assert "confound" not in verdict(evaluation(m=2, fc=2))


def test_the_table_has_p_against_chance_fc_and_confounds() -> None:
    rows = result_rows(corrected([evaluation(m=2, fc=10, confounds=10)]))
    assert rows[0].p == {"chance": "0.001", "fc": "0.001", "confounds": "0.001"}
    assert rows[1].p == {"chance": "0.001"}
    assert [row.label for row in rows[1:]] == [
        "FC baseline",
        "confound model",
        "mean of training labels",
    ]
    assert [p_value(p) for p in (0.00019, 0.0123, 1.0, np.nan)] == [
        "<0.001",
        "0.012",
        "1.000",
        "n/a",
    ]


def test_how_each_baseline_was_made_is_told() -> None:
    fc, confounds = describe_baselines(NOTES, True)
    assert fc.startswith(
        "FC baseline: logistic regression on the Fisher z of 4,005 pairs of 90 ROI"
    )
    assert "with site and head motion regressed out of them, trained on the 80 labelled" in fc
    assert (
        "ridge regression on age, site and head motion and nothing else"
        in (describe_baselines(NOTES, False)[1])
    )
    assert confounds.startswith("confound model: logistic regression on age, site and")
    assert "inverse penalty 10, chosen by cross-validation within them" in fc
    rare = {**NOTES, "baselines": {"fc": {**NOTES["baselines"]["fc"], "folds": 1}}}
    (unchosen,) = describe_baselines(rare, True)
    assert "not chosen, because the rarest class has one subject" in unchosen
    assert [join(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]


def test_why_a_baseline_is_left_out_is_told() -> None:
    notes = {**NOTES, "baselines": {}, "baselines_left_out": ["fc-combat"]}
    assert describe_baselines(notes, True) == [
        "FC, sites harmonised: left out, because it would take the target, which is the site, out "
        "of the features"
    ]
    (of_states,) = describe_baselines(notes | {"samples": {"train": 9, "test": 3}}, True)
    assert of_states.endswith("is known to differ between a subject's states")


def test_the_p_that_is_told_is_the_one_that_was_corrected() -> None:
    one = reports.of_subjects(folds=4, error=2.0)
    table = one.comparison.copy()
    first = (table["versus"] == "fc") & (table["metric"] == "mae")
    table.loc[first, ["p", "p_resampled"]] = [0.002, 0.017]
    alone = replace(one, comparison=table)
    assert "p 0.002, and by the corrected t-test over folds p 0.017)" in verdict(alone)
    assert (
        "p 0.034, the larger of that by swaps and that by the corrected t-test over folds "
        "(0.017), corrected for the number of comparisons)"
    ) in verdict(corrected([alone, alone])[0])
    table.loc[first, "p_resampled"] = np.nan
    missing = corrected([replace(one, comparison=table)])[0]
    assert "p n/a, corrected for the number of comparisons)" in verdict(missing)
    assert result_rows([missing])[0].p["fc"] == "n/a"


def of_classes(better: str | None, p: float, folds: bool) -> Evaluation:
    """A model of two classes, with p against chance, and whether it beats the majority."""
    rng = np.random.default_rng(0)
    true = np.array(["a", "b"] * 30)
    shares = {"m": rng.random(60), "fc": rng.random(60), "majority": np.full(60, 0.5)}
    tables = [
        pd.DataFrame(
            {
                "subject": [f"sub-{i:03}" for i in range(60)],
                "predictor": name,
                "y_true": true,
                "y_pred": np.where(share > 0.5, "b", "a"),
                "prob_a": 1 - share,
                "prob_b": share,
            }
        )
        for name, share in shares.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    metrics = compute_metrics(table, 100, 0.95, 0, 99)
    metrics.loc[metrics["predictor"] == "m", "p"] = p
    compared = pd.concat(
        [compare(table, "m", name, 100, 0.95, 0, 99) for name in ("fc", "majority")]
    )
    compared["better"] = np.where(compared["versus"] == "majority", better, None)
    notes = NOTES | ({"folds": {"fold-0": {}, "fold-1": {}}} if folds else {})
    return Evaluation("d", "m", 0, "t", metrics, compared, table, notes)


def test_over_folds_chance_is_beaten_only_by_beating_the_majority() -> None:
    assert "It is better than chance." in verdict(of_classes(None, 0.001, folds=False))
    assert "not shown to be better than chance" in verdict(of_classes(None, 0.001, folds=True))
    assert "It is better than chance." in verdict(of_classes("m", 0.001, folds=True))
