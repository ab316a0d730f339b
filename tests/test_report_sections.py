"""What only some runs have: maps, studies, benchmark files, seeds, folds; and the table beside."""

from __future__ import annotations

import base64
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fabricate import GRID, ball, make_config, write_volumes
from pages import Page
from PIL import Image
from reports import (
    NOTES,
    add_benchmarks,
    add_maps,
    add_overview,
    add_retrieval,
    add_studies,
    add_tokens,
    of_subjects,
)

from neuromamba.collect import Evaluation, Training, collect_data, example_run
from neuromamba.config import Config
from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.report import report_path, run_report
from neuromamba.report_brain import describe_brain, verdicts
from neuromamba.report_compute import describe_jobs, duration, memory, read_benchmarks
from neuromamba.report_compute import describe_trainings as describe_efforts
from neuromamba.report_metrics import COLUMNS, tabulate_metrics, write_report_metrics
from neuromamba.report_results import count_folds, describe_target, draw_results
from neuromamba.report_seeds import Means, mean_verdict, seed_means, with_means
from neuromamba.report_training import describe_trainings, draw_curves
from neuromamba.report_viewer import PatchMap, brain_box, build_viewer, patch_sums
from neuromamba.statistics import correct
from neuromamba.tables import read_table, write_table
from neuromamba.templates import environment
from neuromamba.verdicts import p_value, result_rows

RUNS = ("sub-000_task-rest", "sub-001_task-rest")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two runs with volumes, and nothing else."""
    config = make_config(tmp_path)
    layout = Layout.of(config, "toy")
    rng = np.random.default_rng(0)
    for run in RUNS:
        bold = 1000 + rng.normal(size=(24, *GRID[::-1]))
        write_volumes(layout.array("volumes", run), run, bold, ball())
    rows = [{"run": run, "subject": run[:7], "reason": None} for run in RUNS]
    write_table(layout.index, pd.DataFrame(rows))
    made = pd.DataFrame({"run": RUNS, "reason": None, "key": "made"})
    for stage in ("volumes", "tokens", "rois"):
        write_table(layout.manifest(stage, 0), made)
    return config


def page_of(config: Config) -> str:
    run_report(config)
    return Page(report_path(config).read_text(encoding="utf-8")).text


def ids_of(config: Config) -> set[str | None]:
    run_report(config)
    page = Page(report_path(config).read_text(encoding="utf-8"))
    return {attributes.get("id") for _, attributes in page.tags}


def decode(source: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The (z, y, x) levels of a picture, cut as the page's script cuts it."""
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    z, y, x = shape
    across = int(np.ceil(np.sqrt(z)))
    cuts = [(k // across * y, k % across * x) for k in range(z)]
    return np.stack([picture[row : row + y, column : column + x] for row, column in cuts])


# --- The brain ----------------------------------------------------------------------------------


def test_the_viewer_holds_the_mean_volume_and_the_tokens(config: Config) -> None:
    add_tokens(config)
    brain = describe_brain(config, collect_data(config, "toy"))
    viewer = brain["volume"]["viewer"]
    assert (viewer["shape"], viewer["edge"], viewer["step"]) == ([12, 12, 12], 6, [8.0] * 3)
    assert viewer["origin"] == [-44.0] * 3
    levels = decode(viewer["anatomy"]["src"], (12, 12, 12))
    assert np.array_equal(levels > 0, ball())
    assert viewer["anatomy"]["top"] == pytest.approx(1000, rel=0.01)
    (kept,) = viewer["maps"]
    assert kept["label"] == "kept tokens"
    assert decode(kept["src"], (2, 2, 2)).tolist() == [[[255] * 2] * 2, [[0] * 2] * 2]


def test_maps_are_sums_over_patches_with_their_sign(config: Config) -> None:
    example = replace(_example(config), tokens=None)
    values = np.zeros((12, 12, 12))
    values[:6, :6, 6:] = 0.5
    values[6:, :6, :6] = -0.25
    sums = patch_sums(values, 6)
    assert sums[0, 0, 1] == 0.5 * 216
    assert sums.sum() == pytest.approx(values.sum())
    shown = build_viewer(example, 6, [PatchMap("m", sums, True, "u")])["maps"][0]
    levels = decode(shown["src"], (2, 2, 2))
    assert levels[0, 0, 1] == 255
    assert levels[1, 0, 0] == 128 - round(127 * 54 / shown["top"])
    assert levels[0, 0, 0] == 128


def test_what_is_shown_is_cut_to_whole_patches_around_the_brain(config: Config) -> None:
    example, mask = _example(config), np.zeros((12, 12, 12), dtype=bool)
    mask[7, 2:5, 5:8] = True
    assert brain_box(replace(example, mask=mask), 3) == (slice(6, 9), slice(0, 6), slice(3, 9))


def _example(config: Config) -> Any:
    example = example_run(config, collect_data(config, "toy"))
    assert example is not None
    return example


def test_maps_stand_beside_what_their_checks_say(config: Config) -> None:
    add_maps(config)
    text = page_of(config)
    assert "sex by small, seed 0: attributions" in text
    assert "logit of male minus that of female , over 16" in text.replace("female,", "female ,")
    assert "Attributions miss 0.10%." in text
    assert "Shuffled weights, head: the strength map <stays>." in text
    assert "R1 216 25.0%" in text
    page = Page(report_path(config).read_text(encoding="utf-8"))
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert sum(str(alt).startswith("Glass brain of sex by small") for alt in alts) == 3


def test_maps_of_another_grid_are_not_laid_over_the_brain(config: Config) -> None:
    add_maps(config, size=18)
    brain = describe_brain(config, collect_data(config, "toy"))
    assert brain["volume"]["viewer"]["maps"] == []
    assert "on another grid than the volumes of now" in page_of(config)


def test_experts_stand_beside_the_maps_and_both_without_a_volume(config: Config) -> None:
    folder = add_maps(config)
    rows = [("R1", 1, 5, 0.7, 0.6, 0.8, 0.2, 0.01), ("R1", 2, 5, 0.3, 0.2, 0.4, -0.2, 0.01)]
    columns = ["region", "expert", "n", "weight", "weight_low", "weight_high", "excess"]
    table = pd.DataFrame(rows, columns=[*columns, "over_time"])
    write_table(folder / "experts.tsv", table)
    assert "1 R1 0.700 [0.600, 0.800] 0.200 0.010" in page_of(config)
    layout = Layout(Path(config.results), "toy")
    shutil.rmtree(layout.root / "volumes")
    text = page_of(config)
    assert "There are no volumes of this dataset." in text
    assert "the regions that set each apart" in text


def test_a_broken_map_is_named(config: Config) -> None:
    folder = add_maps(config)
    (folder / "group_attribution.nii.gz").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"group_attribution\.nii\.gz is not a readable image"):
        run_report(config)


def test_a_check_is_told_with_what_it_compares() -> None:
    checks = {"baseline": {"verdict": "b"}, "other_seeds": {"1": {"signed": {"verdict": "s"}}}}
    assert list(verdicts(checks | {"space": "MNI"})) == ["B.", "Other seeds, 1: s."]


# --- Studies ------------------------------------------------------------------------------------


def test_studies_are_shown_where_there_are_any(config: Config) -> None:
    sections = {"scaling", "forecasts", "identification"}
    assert not sections & ids_of(config)
    add_studies(config)
    assert sections <= ids_of(config)
    text = page_of(config)
    assert "toy: loss against compute No power law is claimed." in text
    assert "time ahead skill over run mean test subjects" in text
    assert "4.0 s 0.400 [0.300, 0.500] 16 8.0 s 0.200 [0.150, 0.250] 16" in text
    assert "10 volumes are known, 4 are forecast" in text
    assert "the model the halves of one run of each 0.750 [0.500, 0.900]" in text
    assert "0.062 0.004 97.0 [90.0, 100.0] 16" in text


def test_an_identification_of_seen_subjects_says_so(config: Config) -> None:
    add_studies(config)
    assert "were used to train the model" not in page_of(config)
    add_studies(config, seen_subjects=["sub-000", "sub-001"])
    assert "2 of these subjects were used to train the model." in page_of(config)
    # It has not ended where its last file is not there.
    (Layout.of(config, "toy").identify("small", 0) / "identify.json").unlink()
    assert "identification" not in ids_of(config)


def test_a_retrieval_is_shown_beside_chance_with_what_prompts_tell(config: Config) -> None:
    assert "retrieval" not in ids_of(config)
    add_retrieval(config)
    assert "retrieval" in ids_of(config)
    text = page_of(config)
    assert "recall at 1 chance at 1 recall at 5 chance at 5 mean rank" in text
    assert "image to network 0.250 [0.125, 0.500] 0.062 0.750 [0.500, 0.875] 0.312 3.50" in text
    assert "sex network prompting AUROC 0.800 [0.600, 0.900] 0.002 16" in text
    assert "sex SVM on embeddings: image AUROC" in text
    assert "brier" not in text.lower().split("retrieval by")[-1]
    assert "1 of these subjects were used to train the model." in text


def test_models_that_share_a_pretraining_have_its_studies_once(tmp_path: Path) -> None:
    models = {"small": {"family": "neuromamba"}}
    models["shared"] = {**models["small"], "base": "small"}
    config = make_config(tmp_path, models=models)
    for model in models:
        add_studies(config, model)
    text = page_of(config)
    for study in ("forecasts", "identification"):
        assert f"toy, small, seed 0: {study}" in text
        assert f"toy, shared, seed 0: {study}" not in text


def test_flagged_runs_are_counted_and_linked(config: Config) -> None:
    assert "has not been made" in page_of(config)
    add_overview(config)
    assert "1 of the 2 runs that are used is flagged" in page_of(config)
    page = Page(report_path(config).read_text(encoding="utf-8"))
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert {"../toy/overview.html", f"../toy/qc/{RUNS[0]}.html"} <= links
    assert f"{RUNS[0]} : tsnr, mean_fd" in page.text


# --- Compute ------------------------------------------------------------------------------------


def test_benchmark_files_are_added_by_stage(config: Config, tmp_path: Path) -> None:
    assert describe_jobs(read_benchmarks(config, tmp_path / "logs")) == []
    add_benchmarks(tmp_path / "logs", config)
    rows = describe_jobs(read_benchmarks(config, tmp_path / "logs"))
    assert [list(row.values()) for row in rows] == [
        ["tokens", "2", "30.0 s", "8.0 s", "300 MiB"],
        ["pretrain", "1", "2.0 h", "2.5 h", "2.0 GiB"],
        ["all", "3", "2.0 h", "2.5 h", "2.0 GiB"],
    ]


def test_durations_and_memory_are_short() -> None:
    assert [duration(s) for s in (3.21, 130, 7200, np.nan)] == ["3.2 s", "2.2 min", "2.0 h", "n/a"]
    assert [memory(m) for m in (12.3, 1536, np.nan)] == ["12 MiB", "1.5 GiB", "n/a"]


# --- Folds --------------------------------------------------------------------------------------


def training(fold: str, loss: float, seed: int = 0, model: str = "m") -> Training:
    """A training that ended with that loss."""
    rows = [
        {"step": step, "split": split, "loss": loss, "skill_mean": 0.1, "seconds": 60.0}
        for step in (1, 2)
        for split in ("train", "validation")
    ]
    info = {
        "step": 2,
        "best": {"step": 2, "loss": loss, "skill_mean": loss},
        "parameters": 1000,
        "subjects": {"train": ["a"], "validation": ["b"]},
    }
    return Training("toy", model, seed, "pretrain", info, pd.DataFrame(rows), fold)


def test_folds_of_a_training_are_a_row_and_thin_lines() -> None:
    folds = [training(f"fold-{k}", loss) for k, loss in enumerate((0.2, 0.4))]
    (row,) = describe_trainings(folds)
    assert (row["label"], row["folds"], row["loss"]) == ("m, seed 0", 2, "0.300")
    assert row["skills"] == {"mean": "+0.300"}
    assert row["minutes"] == "2.0"
    (effort,) = describe_efforts(folds)
    assert (effort["trainings"], effort["time"], effort["parameters"]) == ("2", "2.0 min", "1,000")
    drawn = [base64.b64decode(str(draw_curves(of)["loss"])[26:]) for of in (folds, folds[:1])]
    # A line for each fold, and the one in the legend.
    assert [picture.count(b"stroke-width: 0.7") for picture in drawn] == [3, 0]
    assert [picture.count(b"validation") for picture in drawn] == [1, 1]


def test_the_table_of_trainings_has_the_skills_of_every_family() -> None:
    one, other = training("", 0.2, model="m"), training("", 0.4, model="n")
    other.info["best"] = {"step": 2, "loss": 0.4, "skill_static": 0.5}
    macros = environment().get_template("report.macros.j2").module
    text = Page(macros.training_table(describe_trainings([one, other]), "trainings")).text
    assert "skill over mean skill over static" in text
    assert "0.200 +0.200 n/a" in text
    assert "0.400 n/a +0.500" in text


def test_predictions_of_folds_are_drawn_as_means_over_folds() -> None:
    whole, folds = (of_subjects(classes=True, folds=k) for k in (1, 3))
    assert [count_folds(one.predictions) for one in (whole, folds)] == [1, 3]
    roc, calibration, confusion = draw_results([folds])
    assert "means over the folds" in roc["caption"]
    assert "means over" not in draw_results([whole])[0]["caption"]
    assert calibration["alt"].startswith("Calibration curves of m, seed 0")
    right = (folds.predictions["y_true"] == folds.predictions["y_pred"])[:60].sum()
    assert f"m, seed 0 has {right} of 60 right" in confusion["alt"]


def test_the_page_says_how_many_folds_there_are(config: Config, tmp_path: Path) -> None:
    crossed = make_config(tmp_path, splits={"protocol": "k-fold", "folds": 3})
    folder = Layout.of(crossed, "toy").evaluate("small", 0, "age")
    one = of_subjects(folds=3)
    rename = {"m": "small"}
    write_table(folder / "metrics.tsv", one.metrics.replace({"predictor": rename}))
    compared = one.comparison.replace({"predictor": rename, "better": rename})
    write_table(folder / "comparison.tsv", compared)
    write_table(folder / "predictions.tsv", one.predictions.replace({"predictor": rename}))
    write_json(folder / "notes.json", NOTES)
    text = page_of(crossed)
    assert "means over 3 folds" in text
    assert "corrected resampled t-test over the folds" in text
    assert "the larger of that by swaps and that by the corrected t-test over folds (" in text
    methods = (report_path(crossed).parent / "methods.md").read_text()
    assert "3-fold cross-validation" in methods
    assert "[@nadeau2003inference]" in methods


# --- Seeds --------------------------------------------------------------------------------------


def of_seeds(count: int = 2, error: float = 2.0) -> list[Evaluation]:
    """Evaluations of a model's seeds, on the same subjects and beside the same baselines."""
    seeds = [of_subjects(seed=k, error=error) for k in range(count)]
    same = seeds[0].predictions
    baselines = same[same["predictor"] != "m"]
    return [
        replace(e, predictions=pd.concat([e.predictions.query("predictor == 'm'"), baselines]))
        for e in seeds
    ]


def test_several_seeds_have_a_row_of_their_mean_and_a_sentence(config: Config) -> None:
    seeds = of_seeds()
    summaries = seed_means(config, {"t": seeds})["t"].summaries
    rows = with_means(result_rows(seeds), seeds, summaries)
    assert [row.label for row in rows[:4]] == [
        "m, seed 0",
        "m, seed 1",
        "m, mean of 2 seeds (SD)",
        "FC baseline",
    ]
    assert [row.is_mean for row in rows[:4]] == [False, False, True, False]
    first = summaries["m"].iloc[0]
    assert rows[2].cells["mae"].text.startswith(f"{first['value']:.3f} ({first['sd']:.3f}) [")
    text = mean_verdict("m", summaries["m"])
    assert text.startswith("The mean of the 2 seeds of m is better than the FC baseline (")
    assert "SD over seeds" in text
    assert seed_means(config, {"t": seeds[:1], "u": []}) == {name: Means({}, {}) for name in "tu"}


def test_p_of_means_are_corrected_over_the_models_and_targets_of_a_dataset(config: Config) -> None:
    # So much ahead that one comparison shows it, and three do not.
    targets = {name: [replace(e, target=name) for e in of_seeds(3, error=4.6)] for name in "tuv"}
    alone = seed_means(config, {"t": targets["t"]})["t"].summaries["m"]
    assert alone["p_holm"][0] == alone["p"][0] < 0.05 < 3 * alone["p"][0]
    assert alone["p_chance_holm"][0] == alone["p_chance"][0]
    assert "is better than the FC baseline" in mean_verdict("m", alone)
    means = seed_means(config, targets)
    together = [means[name].summaries["m"].iloc[0] for name in targets]
    assert [row["p_holm"] for row in together] == pytest.approx(correct([alone["p"][0]] * 3))
    chance = correct([alone["p_chance"][0]] * 3)
    assert [row["p_chance_holm"] for row in together] == pytest.approx(chance)
    text = mean_verdict("m", means["t"].summaries["m"])
    assert "is not shown to differ from the FC baseline" in text
    assert f"p {p_value(together[0]['p_holm'])}, corrected for the number of comparisons" in text
    rows = with_means(result_rows(targets["t"]), targets["t"], means["t"].summaries)
    (row,) = (row for row in rows if row.is_mean)
    assert row.p["fc"] == p_value(together[0]["p_holm"])


def test_seeds_that_tested_unlike_subjects_have_no_mean_and_it_is_said(config: Config) -> None:
    first, second = of_seeds()
    fewer = second.predictions.query("subject != 'sub-007'")
    seeds = [first, replace(second, predictions=fewer)]
    means = seed_means(config, {"age": seeds})["age"]
    assert means.summaries == {}
    shown = describe_target(config, collect_data(config, "toy"), "age", seeds, means)
    assert not any(row.is_mean for row in shown["rows"])
    told, *each = shown["answers"]
    assert told.startswith("There is no mean of the seeds of m: ")
    assert "of other subjects, labels or folds" in told
    assert [text[:10] for text in each] == ["m (seed 0)", "m (seed 1)"]


# --- The table ----------------------------------------------------------------------------------


def test_the_table_of_metrics_explains_each_of_its_columns(config: Config, tmp_path: Path) -> None:
    found = [of_subjects(seed=k) for k in (0, 1)]
    write_report_metrics(tmp_path / "out", config, found)
    table = read_table(tmp_path / "out" / "metrics.tsv")
    sidecar = read_json(tmp_path / "out" / "metrics.json")
    assert list(table.columns) == COLUMNS == list(sidecar)
    assert all(column["Description"] for column in sidecar.values())
    assert set(table["predictor"]) <= set(sidecar["predictor"]["Levels"])
    assert set(table["metric"]) <= set(sidecar["metric"]["Levels"])
    own = table[(table["seed"] == 1) & (table["predictor"] == "m")].set_index("metric")["value"]
    expected = found[1].metrics.set_index(["predictor", "metric"])["value"]
    assert own["mae"] == pytest.approx(expected["m", "mae"])
    assert tabulate_metrics([]).empty


def test_the_page_is_written_again_over_an_older_one(config: Config) -> None:
    page_of(config)
    shutil.rmtree(Layout.of(config, "toy").array("volumes", "x").parent)
    assert "There are no volumes of this dataset" in page_of(config)
