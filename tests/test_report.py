"""The report: one page that holds all it needs, says what is so, and bears what is missing."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fabricate import make_config
from pages import Page
from reports import make_results

from neuromamba.collect import Evaluation, collect_data, collect_evaluations
from neuromamba.config import Config
from neuromamba.files import read_json, write_json
from neuromamba.layout import Layout
from neuromamba.metrics import compare, compute_metrics
from neuromamba.report import report_path, run_report, summary
from neuromamba.scoring import write_metrics
from neuromamba.tables import read_table, write_table
from neuromamba.verdicts import interval, number, result_rows, verdict, where_chance_is

N = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of 40 subjects, one model, one seed and two targets, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    make_results(folder, N, test=16)
    return folder


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Config:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return make_config(tmp_path)


def write_page(config: Config) -> Page:
    run_report(config)
    return Page(report_path(config).read_text(encoding="utf-8"))


# --- The page -----------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_asks_nothing_of_the_network(config: Config) -> None:
    page = write_page(config)
    assert page.open == []
    html = report_path(config).read_text(encoding="utf-8")
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe"}
        assert tag != "script" or "src" not in attributes
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [a["href"] for tag, a in page.tags if tag == "a" and a["href"]]
    folder = report_path(config).parent
    for link in links:
        assert link.removeprefix("#") in ids if link[0] == "#" else (folder / link).is_file()


def test_every_picture_can_be_decoded_and_is_described(config: Config) -> None:
    images = [attributes for tag, attributes in write_page(config).tags if tag == "img"]
    # tSNR, FC, brain, 2 of pretraining; sex: loss, ROC, calibration, confusion; age: loss, points.
    assert len(images) == 11
    for attributes in images:
        assert attributes["alt"]
        kind, _, data = (attributes["src"] or "").partition(";base64,")
        begin = base64.b64decode(data)[:100]
        assert begin.startswith(b"\x89PNG" if kind == "data:image/png" else b"<?xml")


def test_the_page_tells_what_was_run(config: Config) -> None:
    text = write_page(config).text
    for expected in (
        "toy 40 / 40 40 / 40 2 21 3 16",
        "small neuromamba 1,420,000 0 10000 steps of 4 windows",
        "tSNR",
        "26 male, 14 female",
        "No run was left out",
        "skill over persistence",
        "FC baseline",
        "majority class",
        "mean of training labels",
        "naming the commonest class (male) for everyone gives an accuracy of",
        "snakemake --cores 2 all --configfile",
        "python",
    ):
        assert expected in text


def test_the_numbers_on_the_page_are_those_of_the_tables(config: Config) -> None:
    text = write_page(config).text
    folder = Layout(Path(config.results), "toy").evaluate("small", 0, "sex")
    for row in read_table(folder / "metrics.tsv").itertuples():
        assert f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" in text
    row = next(read_table(folder / "comparison.tsv").itertuples())
    assert f"AUROC {row.difference:.3f} [{row.low:.3f}, {row.high:.3f}]" in text


def test_what_the_user_wrote_is_shown_as_text(config: Config) -> None:
    layout = Layout(Path(config.results), "toy")
    rows = [("sub-077_task-rest", "volumes", "<script>alert(1)</script> & more")]
    write_table(layout.excluded, pd.DataFrame(rows, columns=["run", "stage", "reason"]))
    page = write_page(config)
    html = report_path(config).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<script>alert(1)</script> & more" in page.text
    assert "Runs left out: 1 of 40 (1 at volumes)." in page.text


def test_it_says_when_test_subjects_were_seen(config: Config) -> None:
    assert "not those of unseen subjects" not in write_page(config).text
    path = Layout(Path(config.results), "toy").evaluate("small", 0, "sex") / "notes.json"
    write_json(path, read_json(path) | {"seen_subjects": ["sub-030", "sub-031"]})
    text = write_page(config).text
    assert "not those of unseen subjects" in text
    assert "2 of 16 test subjects were used to train a model" in text
    assert "sub-030, sub-031" in text


def test_motion_is_read_from_the_confounds(config: Config, tmp_path: Path) -> None:
    layout = Layout(Path(config.results), "toy")
    index = read_table(layout.index)
    files = []
    for k in range(len(index)):
        values = pd.DataFrame({"csf": 1.0, "framewise_displacement": [None, 0.1 * k, 0.3 * k]})
        write_table(tmp_path / f"{k}.tsv", values)
        files.append(str(tmp_path / f"{k}.tsv"))
    files[3] = str(tmp_path / "gone.tsv")
    write_table(layout.index, index.assign(confounds=files))
    motion = collect_data(config, "toy").runs["mean_fd"]
    assert motion[2] == pytest.approx(0.4)
    assert np.isnan(motion[3])
    assert "mean FD (mm)" in write_page(config).text


def test_what_validation_subjects_are_for_is_told_of_probes(config: Config, tmp_path: Path) -> None:
    kept = "weights with the lowest validation loss are kept"
    text = write_page(config).text
    assert kept in text
    assert "probe" not in text
    models = {"small": {"family": "neuromamba", "finetune": {"mode": "probe"}}}
    config = make_config(tmp_path, models=models)
    for target in ("sex", "age"):
        path = Layout(Path(config.results), "toy").finetune("small", 0, target) / "model.json"
        fitted = {"step": 0, "probe": {"inverse_penalty": 1.0, "folds": 3, "score": 0.7}}
        write_json(path, read_json(path) | fitted)
    text = write_page(config).text
    assert kept not in text
    assert "of a linear probe they choose nothing: inner folds of the training subjects" in text
    assert "A linear probe takes no steps" in text
    methods = (report_path(config).parent / "methods.md").read_text()
    assert "but nothing of linear probes, whose penalty inner folds" in methods


# --- What is missing ----------------------------------------------------------------------------


def test_a_run_that_has_not_begun_gives_a_page(tmp_path: Path) -> None:
    text = write_page(make_config(tmp_path)).text
    assert "No target has been evaluated" in text
    assert "No pretraining of this dataset has finished" in text
    assert "report:" in summary(make_config(tmp_path))


@pytest.mark.parametrize("gone", ["evaluate", "finetune", "pretrain"])
def test_a_stage_that_has_not_run_is_left_out(config: Config, gone: str) -> None:
    shutil.rmtree(Path(config.results) / "toy" / "small" / "seed-0" / gone)
    text = write_page(config).text
    assert ("Not evaluated yet" in text) == (gone == "evaluate")
    assert ("No pretraining of this dataset" in text) == (gone == "pretrain")
    assert summary(config)


def test_a_dataset_without_targets_shows_its_pretraining(config: Config, tmp_path: Path) -> None:
    bare = make_config(tmp_path, dataset={"targets": {}, "participants": None})
    text = write_page(bare).text
    assert "names no targets" in text
    assert "skill over persistence" in text
    assert "next-patch skill" in summary(bare)


# --- Words --------------------------------------------------------------------------------------


def evaluation(model: float, fc: float, n: int = 60, seed: int = 0) -> Evaluation:
    """A regression where `model` and `fc` err by so much, as `run_evaluate` would have left it."""
    rng = np.random.default_rng(seed)
    true = rng.normal(50, 10, size=n)
    errors = {"m": model, "fc": fc}
    columns: dict[str, Any] = {"subject": [f"sub-{i:03}" for i in range(n)], "y_true": true}
    tables = [
        pd.DataFrame({**columns, "predictor": name, "y_pred": true + error * rng.normal(size=n)})
        for name, error in errors.items()
    ]
    tables.append(pd.DataFrame({**columns, "predictor": "mean", "y_pred": 50.0}))
    table = pd.concat(tables, ignore_index=True)
    compared = [compare(table, "m", other, 300, 0.95, 0, 300) for other in ("fc", "mean")]
    metrics = compute_metrics(table, 300, 0.95, 0, 300)
    return Evaluation("d", "m", 0, "age", metrics, pd.concat(compared), table, {"n_test": n})


def bold(found: list[Evaluation]) -> dict[str, bool]:
    return {row.label: row.cells["mae"].best for row in result_rows(found)}


def test_a_clear_winner_is_called_better_and_is_bold() -> None:
    found = evaluation(model=2, fc=10)
    assert "m (seed 0) is better than the FC baseline" in verdict(found)
    assert "It is better than always naming the training mean." in verdict(found)
    assert bold([found]) == {
        "m, seed 0": True,
        "FC baseline": False,
        "mean of training labels": False,
    }


def test_a_clear_loser_is_called_worse_and_the_baseline_is_bold() -> None:
    found = evaluation(model=20, fc=5)
    assert "does not beat the FC baseline; it is worse" in verdict(found)
    assert "It is worse than always naming the training mean." in verdict(found)
    assert bold([found])["FC baseline"]
    assert not bold([found])["m, seed 0"]


def test_what_cannot_be_told_apart_is_said_so_and_nothing_is_bold() -> None:
    found = evaluation(model=5, fc=5)
    assert "cannot tell from none" in verdict(found)
    assert re.search(r"it is (ahead|behind),", verdict(found))
    assert not any(bold([found]).values())


def test_the_baseline_is_bold_only_when_it_beats_every_model() -> None:
    worse, equal = evaluation(model=20, fc=5), evaluation(model=5, fc=5)
    assert bold([worse, worse])["FC baseline"]
    assert not bold([worse, equal])["FC baseline"]


def test_an_undefined_metric_is_not_compared(config: Config) -> None:
    folder = Layout(Path(config.results), "toy").evaluate("small", 0, "sex")
    predictions = read_table(folder / "predictions.tsv").assign(y_true="male")
    write_table(folder / "predictions.tsv", predictions)
    write_metrics(folder, "small", config)
    (found,) = collect_evaluations(config, "toy", "sex")
    assert "cannot be compared" in verdict(found)
    assert "n/a" in write_page(config).text
    assert "accuracy of 1.000" in where_chance_is(found)


def test_the_summary_has_the_main_figures_and_the_path(config: Config) -> None:
    run_report(config)
    text = summary(config)
    assert "toy, small, seed 0: next-patch skill" in text
    assert "toy: sex (16 test subjects" in text
    assert re.search(r"small, seed 0 +AUROC \d\.\d+ \[\d\.\d+, \d\.\d+\]", text)
    assert re.search(r"FC baseline +MAE", text)
    assert text.endswith(f"report: {report_path(config)}")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (12.345, "12.35"), (123.4, "123.4"), (29469, "29,469"), (None, "n/a")],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_intervals_have_one_number_of_digits() -> None:
    assert interval(8.067, 5.7001, 10.58) == "8.07 [5.70, 10.58]"
    assert interval(-0.02, -0.3551, -0.0001) == "-0.020 [-0.355, 0.000]"
    assert interval(float("nan"), 0, 1) == "n/a"
