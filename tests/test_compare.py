"""The leaderboard: what is put in one table, who is called better, and what is left out."""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pages import Page

from neuromamba.compare import run_compare
from neuromamba.compared_runs import name_runs, read_entries
from neuromamba.files import InputError, read_json, write_json
from neuromamba.metrics import compare, compute_metrics
from neuromamba.statistics import correct
from neuromamba.tables import read_table, write_table

N = 60
SUBJECTS = [f"sub-{k:03}" for k in range(N)]
SETTINGS = {"bootstrap": 200, "permutations": 200}
ORDERED = (200, 0.95, 0, 200)


def numbers(error: float, seed: int, truth: np.ndarray) -> pd.DataFrame:
    noise = np.random.default_rng(seed).standard_normal(len(truth))
    return pd.DataFrame({"y_pred": truth + error * noise})


def classes(error: float, seed: int, truth: np.ndarray) -> pd.DataFrame:
    noise = np.random.default_rng(seed).standard_normal(len(truth))
    share = 1 / (1 + np.exp(-2 * (truth - 0.5 + error * noise)))
    names = np.where(share > 0.5, "male", "female")
    return pd.DataFrame({"y_pred": names, "prob_female": 1 - share, "prob_male": share})


def write(
    results: Path,
    model: str = "tiny",
    error: float = 10.0,
    fc: float = 10.0,
    target: str = "age",
    seed: int = 0,
    dataset: str = "demo",
    subjects: list[str] = SUBJECTS,
    folds: int = 1,
    fc_seed: int = 1,
    notes: dict[str, Any] | None = None,
    relabelled: str = "",
) -> Path:
    """An evaluation in which model and FC err by so much; returns its folder."""
    ages = np.array([20.0 + int(name[4:]) for name in subjects])
    sexes = np.array([int(name[4:]) % 2 for name in subjects])
    truth = sexes if target == "sex" else ages
    make = classes if target == "sex" else numbers
    labels = np.where(sexes == 1, "male", "female") if target == "sex" else ages.copy()
    if relabelled:
        labels[subjects.index(relabelled)] += 1
    constant = make(0, 0, np.full(len(truth), truth.mean()))
    predicted = {
        model: make(error, 100 + sum(map(ord, model)) + seed, truth),
        "fc": make(fc, fc_seed, truth),
        "confounds": make(30, 2, truth),
        "majority" if target == "sex" else "mean": constant,
    }
    tables = [
        t.assign(subject=subjects, predictor=name, y_true=labels) for name, t in predicted.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    if folds > 1:
        table["fold"] = [f"fold-{int(name[4:]) % folds}" for name in table["subject"]]
    folder = results / dataset / model / f"seed-{seed}" / "evaluate" / target
    write_table(folder / "predictions.tsv", table)
    write_json(folder / "notes.json", {"n_train": 120, "seen_subjects": [], **(notes or {})})
    return folder


def board(*runs: Path, output: Path) -> pd.DataFrame:
    run_compare(runs, output, **SETTINGS)
    return read_table(output / "leaderboard.tsv")


def words(table: pd.DataFrame) -> dict[str, str]:
    models = table[table["kind"] == "model"]
    return dict(zip(models["predictor"], models["versus_fc"], strict=True))


# --- Scores -------------------------------------------------------------------------------------


def test_models_of_several_runs_are_ranked_beside_the_baselines_once(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "good", error=2)
    write(tmp_path / "b/results", "bad", error=25)
    write(tmp_path / "b/results", "equal", error=10.5)
    table = board(tmp_path / "a/results", tmp_path / "b/results", output=tmp_path / "out")
    assert table["predictor"].tolist()[0] == "good, seed 0"
    assert {*table["predictor"]} == {
        *("good, seed 0", "bad, seed 0", "equal, seed 0"),
        *("FC baseline", "confound model", "mean of training labels"),
    }
    assert table["rank"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["mae"].is_monotonic_increasing
    assert words(table) == {
        "good, seed 0": "better than FC",
        "bad, seed 0": "worse than FC",
        "equal, seed 0": "not shown to be better than FC",
    }
    fc = table.set_index("predictor").loc["FC baseline"]
    assert fc["run"] == "a, b"
    assert np.isnan(fc["fc_difference"])


def test_a_table_in_a_folder_near_the_root_is_no_evaluation() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # unlike `tmp_path`
        (Path(folder) / "predictions.tsv").touch()
        with pytest.raises(InputError, match="has no evaluations; name a results folder"):
            read_entries([Path(folder)])


@pytest.mark.parametrize("target", ["age", "sex"])
def test_the_figures_are_those_of_the_metrics(tmp_path: Path, target: str) -> None:
    folder = write(tmp_path / "results", error=1, fc=2, target=target)
    table = board(tmp_path / "results", output=tmp_path / "out").set_index("predictor")
    predictions = read_table(folder / "predictions.tsv")
    expected = compute_metrics(predictions, *ORDERED).set_index(["predictor", "metric"])
    for name, label in (("tiny", "tiny, seed 0"), ("fc", "FC baseline")):
        for metric, row in expected.loc[name].iterrows():
            for key, end in (("value", ""), ("low", "_low"), ("high", "_high")):
                assert table.loc[label, f"{metric}{end}"] == pytest.approx(row[key], nan_ok=True)
    against = compare(predictions, "tiny", "fc", *ORDERED).iloc[0]
    row = table.loc["tiny, seed 0"]
    for key in ("difference", "low", "high"):
        assert row[f"fc_{key}"] == pytest.approx(against[key])


def test_every_two_models_are_compared_and_p_is_corrected_over_all_tables(tmp_path: Path) -> None:
    for target in ("age", "sex"):
        for name, error in (("one", 1.0), ("two", 1.5), ("three", 0.8)):
            write(tmp_path / "results", name, error=error, fc=1, target=target)
    board(tmp_path / "results", output=tmp_path / "out")
    found = read_table(tmp_path / "out" / "comparisons.tsv")
    models = found[found["versus"].str.endswith("seed 0")]
    first = models[models["metric"].isin(["mae", "auroc"])]
    assert len(first) == 2 * 3
    assert first["p_holm"].to_numpy() == pytest.approx(correct(first["p"].to_numpy()))
    brier = models[models["metric"] == "brier"]
    assert brier["p_holm"].to_numpy() == pytest.approx(correct(brier["p"].to_numpy()))
    fc = found[(found["versus"] == "fc") & found["metric"].isin(["mae", "auroc"])]
    assert fc["p_holm"].to_numpy() == pytest.approx(correct(fc["p"].to_numpy()))
    shown = found[found["better"].notna()]
    assert (shown["p_holm"] <= 0.05).all()
    assert len(shown), "some differences are large enough"


def test_a_pair_is_compared_on_the_same_subjects(tmp_path: Path) -> None:
    """As `metrics.compare` compares two predictors of one table."""
    folders = [write(tmp_path / "results", name, error=e) for name, e in (("one", 3), ("two", 8))]
    board(tmp_path / "results", output=tmp_path / "out")
    found = read_table(tmp_path / "out" / "comparisons.tsv")
    row = found[(found["versus"] == "two, seed 0") & (found["metric"] == "mae")].iloc[0]
    both = pd.concat(read_table(folder / "predictions.tsv") for folder in folders)
    both = both[both["predictor"].isin(["one", "two"])]
    expected = compare(both, "one", "two", *ORDERED).iloc[0]
    assert row["predictor"] == "one, seed 0"
    for key in ("difference", "low", "high", "p"):
        assert row[key] == pytest.approx(expected[key])
    assert row["better"] == "one, seed 0"


def test_folds_of_a_cross_validation_are_heeded(tmp_path: Path) -> None:
    folder = write(tmp_path / "results", error=2, folds=5)
    table = board(tmp_path / "results", output=tmp_path / "out").set_index("predictor")
    predictions = read_table(folder / "predictions.tsv")
    own = predictions[predictions["predictor"] == "tiny"]
    errors = (own["y_pred"] - own["y_true"]).abs().groupby(own["fold"]).mean()
    assert table.loc["tiny, seed 0", "mae"] == pytest.approx(errors.mean())
    html = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "means over 5 folds of a cross-validation." in html
    found = read_table(tmp_path / "out" / "comparisons.tsv")
    assert found["p_resampled"].notna().any()
    again = predictions.assign(fold="again-" + predictions["fold"])
    write_table(folder / "predictions.tsv", pd.concat([predictions, again]))
    board(tmp_path / "results", output=tmp_path / "out")
    html = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "means over 10 folds of a cross-validation in 2 repeats." in html


# --- What stands in one table -------------------------------------------------------------------


def tables(output: Path) -> list[dict[str, Any]]:
    return read_json(output / "leaderboard.json")["tables"]


def test_other_test_subjects_are_another_table(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "one")
    write(tmp_path / "a/results", "two")
    write(tmp_path / "b/results", "three", subjects=[*SUBJECTS[5:], "sub-900"])
    table = board(tmp_path / "b/results", tmp_path / "a/results", output=tmp_path / "out")
    assert table.groupby("table")["predictor"].apply(lambda p: {*p} & {*words(table)}).tolist() == [
        {"one, seed 0", "two, seed 0"},
        {"three, seed 0"},
    ]
    first, second = tables(tmp_path / "out")
    assert first["differs"] == ""
    assert second["differs"] == (
        "56 test subjects, not 60: 1 are others (sub-900), 5 are missing (sub-000, sub-001, "
        "sub-002, ...)"
    )
    html = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "Not to be compared with the first table of this target" in html


def test_other_labels_and_other_folds_are_told(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "one", folds=4)
    write(tmp_path / "a/results", "two", folds=4)
    write(tmp_path / "b/results", "relabelled", folds=4, relabelled="sub-007")
    write(tmp_path / "c/results", "holdout")
    write(tmp_path / "d/results", "fewer", folds=3)
    moved = write(tmp_path / "e/results", "moved", folds=4) / "predictions.tsv"
    table = read_table(moved)
    write_table(moved, table.replace({"fold": {"fold-0": "fold-1", "fold-1": "fold-0"}}))
    runs = [tmp_path / f"{name}/results" for name in "abcde"]
    board(*runs, output=tmp_path / "out")
    assert [one["differs"] for one in tables(tmp_path / "out")] == [
        "",
        "1 subjects have another label (sub-007)",
        "they were tested in a holdout, not 4 folds",
        "they were tested in 3 folds, not 4 folds",
        "the subjects were put in other folds",
    ]


def test_other_classes_are_another_table(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "one", error=1, target="sex")
    path = write(tmp_path / "b/results", "two", error=1, target="sex") / "predictions.tsv"
    table = read_table(path).rename(columns={"prob_male": "prob_m", "prob_female": "prob_f"})
    write_table(path, table.replace({"male": "m", "female": "f"}))
    board(tmp_path / "a/results", tmp_path / "b/results", output=tmp_path / "out")
    assert tables(tmp_path / "out")[1]["differs"] == "the target is f, m, not female, male"


def test_numbers_that_are_written_otherwise_are_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "one")
    path = write(tmp_path / "b/results", "two") / "predictions.tsv"
    path.write_text(re.sub(r"(\d\d)\.0(?=\n)", r"\1", path.read_text()))
    board(tmp_path / "a/results", tmp_path / "b/results", output=tmp_path / "out")
    assert len(tables(tmp_path / "out")) == 1


def test_models_of_one_name_are_called_by_their_run(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "same", error=3)
    write(tmp_path / "b/results", "same", error=20)
    write(tmp_path / "b/results", "own", error=5)
    write(tmp_path / "b/results", "own", error=5, seed=3)
    table = board(tmp_path / "a/results", tmp_path / "b/results", output=tmp_path / "out")
    assert {*words(table)} == {
        *("same (a), seed 0", "same (b), seed 0", "own, seed 0", "own, seed 3")
    }
    html = (tmp_path / "out" / "leaderboard.html").read_text()
    assert "same (a) (seed 0) is better than the FC baseline" in html


def test_two_preparations_of_the_same_people_are_called_by_their_dataset(tmp_path: Path) -> None:
    for dataset in ("raw", "scrubbed"):
        write(tmp_path / "results", dataset=dataset)
    table = board(tmp_path / "results", output=tmp_path / "out")
    assert {*words(table)} == {"tiny (raw), seed 0", "tiny (scrubbed), seed 0"}
    assert (table["table"] == 1).all()


def test_runs_are_named_by_what_tells_them_apart() -> None:
    def names(*paths: str) -> list[str]:
        return list(name_runs([Path(path) for path in paths]).values())

    assert names("/x/results") == ["results"]
    assert names("/x/a/results", "/x/b/results") == ["a", "b"]
    assert names("/x/results-1", "/x/results-2") == ["results-1", "results-2"]
    assert names("/x/a/1/results", "/x/b/1/results", "/x/b/2/results") == ["a/1", "b/1", "b/2"]


def test_a_folder_at_any_depth_will_do_and_twice_is_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "results", folds=2)
    # The evaluation of one fold lies below that of all of them.
    fold = read_table(folder / "predictions.tsv").drop(columns="fold")
    write_table(folder / "fold-0" / "predictions.tsv", fold)
    whole = board(tmp_path / "results", output=tmp_path / "out")
    assert len(words(whole)) == 1
    for parent in (folder, *list(folder.parents)[:4]):
        table = board(parent, tmp_path / "results", output=tmp_path / "out")
        pd.testing.assert_frame_equal(table, whole)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "results") / "predictions.tsv"
    (tmp_path / "cache").mkdir()
    path.rename(tmp_path / "cache" / "0123")
    path.symlink_to(tmp_path / "cache" / "0123")
    assert len(words(board(tmp_path / "results", output=tmp_path / "out"))) == 1


# --- Baselines ----------------------------------------------------------------------------------


def test_baselines_that_disagree_are_told_and_stand_for_their_own(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "one", error=5, fc=30)
    write(tmp_path / "b/results", "two", error=5, fc=1)
    runs = [tmp_path / "a/results", tmp_path / "b/results"]
    with pytest.warns(UserWarning, match="the FC baseline is not the same in a and b"):
        table = board(*runs, output=tmp_path / "out")
    assert words(table) == {"one, seed 0": "better than FC", "two, seed 0": "worse than FC"}
    assert table["predictor"].str.startswith("FC baseline (").sum() == 2
    assert (table["predictor"] == "confound model").sum() == 1
    assert "is not the same in a and b" in (tmp_path / "out" / "leaderboard.html").read_text()


def test_rounding_is_no_disagreement(tmp_path: Path) -> None:
    write(tmp_path / "a/results", "one")
    path = write(tmp_path / "b/results", "two") / "predictions.tsv"
    table = read_table(path)
    write_table(path, table.assign(y_pred=table["y_pred"] + 1e-5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = board(tmp_path / "a/results", tmp_path / "b/results", output=tmp_path / "out")
    assert (found["predictor"] == "FC baseline").sum() == 1


def test_a_run_that_disagrees_with_itself_is_told_by_its_models(tmp_path: Path) -> None:
    write(tmp_path / "results", "one")
    write(tmp_path / "results", "two", fc_seed=9)
    with pytest.warns(UserWarning, match=r"in results/demo/one/seed-0/age and results/demo/two"):
        board(tmp_path / "results", output=tmp_path / "out")


def test_a_model_that_has_seen_test_subjects_is_told(tmp_path: Path) -> None:
    write(tmp_path / "results", error=1, notes={"seen_subjects": ["sub-001", "sub-002"]})
    with pytest.warns(UserWarning, match="tiny, seed 0 was trained on 2 of the test subjects"):
        table = board(tmp_path / "results", output=tmp_path / "out")
    assert table.set_index("predictor").loc["tiny, seed 0", "n_seen"] == 2
    assert "not those of unseen subjects" in (tmp_path / "out" / "leaderboard.html").read_text()


# --- The page -----------------------------------------------------------------------------------


def test_the_page_is_whole_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    write(tmp_path / "a<b/results", "same", error=3, fc=12)
    write(tmp_path / "c/results", "same", error=1, target="sex")
    write(tmp_path / "c/results", "same", error=20, fc=12)
    board(tmp_path / "a<b/results", tmp_path / "c/results", output=tmp_path / "out")
    html = (tmp_path / "out" / "leaderboard.html").read_text()
    page = Page(html)
    assert page.open == []
    kinds = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "img"} & {*kinds}
    assert not re.search(r"url\(|@import", html)
    assert kinds.count("svg") == 2
    assert kinds.count("circle") == 3
    assert kinds.count("rect") == 6
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len({*ids})
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert {link[1:] for link in links if link[0] == "#"} <= {*ids}
    assert {link for link in links if link[0] != "#"} == {
        *("leaderboard.tsv", "comparisons.tsv", "leaderboard.json")
    }
    assert "same (a<b), seed 0" in page.text
    assert "better than FC" in page.text


def test_the_plot_has_every_value_at_its_place(tmp_path: Path) -> None:
    write(tmp_path / "results", "one", error=3)
    write(tmp_path / "results", "two", error=20)
    table = board(tmp_path / "results", output=tmp_path / "out")
    page = Page((tmp_path / "out" / "leaderboard.html").read_text())
    x = [float(a["cx"] or 0) for tag, a in page.tags if tag == "circle"]
    x += [float(a["x"] or 0) + 4 for tag, a in page.tags if tag == "rect"]
    values = [*table.loc[table["kind"] == "model", "mae"]]
    values += [*table.loc[table["kind"] == "baseline", "mae"]]
    slope, offset = np.polyfit(values, x, 1)
    assert slope > 0
    assert np.polyval([slope, offset], values) == pytest.approx(x, abs=0.2)


def test_it_gives_the_same_tables_each_time(tmp_path: Path) -> None:
    write(tmp_path / "results", "one")
    write(tmp_path / "results", "two", error=8)
    for name in ("first", "second"):
        board(tmp_path / "results", output=tmp_path / name)
    for name in ("leaderboard.tsv", "comparisons.tsv", "leaderboard.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


# --- What is left out, and refused --------------------------------------------------------------


def test_an_evaluation_that_cannot_be_used_is_left_out_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path / "results", "good")
    path = write(tmp_path / "results", "old") / "predictions.tsv"
    table = read_table(path)
    write_table(path, table[table["predictor"] != "fc"])
    (write(tmp_path / "results", "broken") / "predictions.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is left out: ") as told:
        found = board(tmp_path / "results", output=tmp_path / "out")
    reasons = sorted(str(warning.message) for warning in told)
    assert re.search(r"broken/.* is left out: the file is not a readable table", reasons[0])
    assert re.search(r"old/.* is left out: it has no predictions by fc", reasons[1])
    assert {*words(found)} == {"good, seed 0"}
    facts = read_json(tmp_path / "out" / "leaderboard.json")
    assert len(facts["refused"]) == 2
    assert "no predictions by fc" in (tmp_path / "out" / "leaderboard.html").read_text()


def test_a_folder_without_evaluations_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "results")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no evaluations; name a results folder"):
        run_compare([tmp_path / "results", tmp_path / "empty"], tmp_path / "out", **SETTINGS)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        read_entries([tmp_path / "nowhere"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"bootstrap": 0}, {"permutations": 0}, {"confidence": 1.0}])
def test_settings_without_a_sense_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write(tmp_path / "results")
    with pytest.raises(InputError, match="the first two are at least 1"):
        run_compare([tmp_path / "results"], tmp_path / "out", **{**SETTINGS, **wrong})
