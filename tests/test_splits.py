"""Splits: by subject, proportional in every stratum, the same each time, and checked when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fabricate import make_config, make_participants

from neuromamba.config import Config, Dataset, Splits
from neuromamba.excluded import run_excluded
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.splits import fold_subjects, folds_of, read_split, run_splits, split_subjects
from neuromamba.tables import read_table, write_table


def dataset(**targets: Any) -> Dataset:
    known = {
        "sex": {"kind": "classification", "column": "s", "classes": {"female": "F", "male": "M"}},
        "age": {"kind": "regression", "column": "a"},
    }
    return Dataset.model_validate({"derivatives": "x", "targets": {k: known[k] for k in targets}})


BOTH = dataset(age=1, sex=1)


def people(n: int = 200, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    index = pd.Index([f"sub-{i:04}" for i in range(n)], name="subject")
    columns = {
        "site": rng.choice(["a", "b", "rare"], p=[0.6, 0.35, 0.05], size=n),
        "sex": rng.choice(["female", "male"], p=[0.2, 0.8], size=n),
        "age": rng.exponential(40, size=n),
    }
    return pd.DataFrame(columns, index=index)


def split(table: pd.DataFrame, settings: Dataset = BOTH, **splits: Any) -> pd.DataFrame:
    found = split_subjects(list(table.index), table, settings, Splits(**splits))
    return found.set_index("subject").join(table)


def test_every_subject_is_in_one_part_of_the_right_size() -> None:
    found = split(people())
    assert found.index.is_unique
    assert found["part"].value_counts().to_dict() == {"train": 140, "test": 40, "validation": 20}


def test_labels_and_sites_have_their_shares_in_the_test_part() -> None:
    for seed in range(5):
        found = split(people(seed=seed), seed=seed)
        test = found["part"] == "test"
        for _, stratum in found.groupby(["sex", "site"]):
            assert abs(test[stratum.index].sum() - 0.2 * len(stratum)) <= 2
        for _, stratum in found.groupby("sex"):
            assert abs(test[stratum.index].sum() - 0.2 * len(stratum)) <= 1


def test_numbers_are_spread_over_the_parts() -> None:
    found = split(people(), dataset(age=1))
    fifth = pd.qcut(found["age"], 5, labels=False)
    assert fifth[found["part"] == "test"].value_counts().between(7, 9).all()


def test_the_split_depends_on_subjects_and_seed_not_on_their_order() -> None:
    table = people()
    first = split(table)["part"]
    pd.testing.assert_series_equal(first, split(table.sample(frac=1, random_state=1))["part"])
    assert (split(table, seed=1)["part"] != first).any()


def test_unlabelled_subjects_only_train() -> None:
    table = people()
    table.loc[table.index[:50], ["sex", "age"]] = None
    found = split(table)
    assert (found["part"].iloc[:50] == "train").all()
    assert (found["part"] == "test").sum() == 30


def test_without_labels_everyone_can_be_tested() -> None:
    table = people()
    found = split(table.assign(sex=None, age=np.nan))
    assert (found["part"] == "test").sum() == 40
    assert (split(table[["site"]], dataset())["part"] == "test").sum() == 40


def test_three_subjects_are_enough_and_two_are_not() -> None:
    assert sorted(split(people(3))["part"]) == ["test", "train", "validation"]
    assert sorted(split(people(3), test=0.8, validation=0.1)["part"])[0] == "test"
    with pytest.raises(InputError, match=r"2 subject\(s\).*at least 3"):
        split(people(2))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (["sub-1\ttrain", "sub-1\ttest", "sub-2\tvalidation"], "sub-1 listed more than once"),
        (["sub-1\ttrain", "sub-2\tholdout"], "unknown part 'holdout'"),
        (["sub-1\ttrain", "sub-2\ttest"], "no subject in part validation"),
        (["sub-1\ttrain", "n/a\ttest", "sub-2\tvalidation"], "no subject or no part"),
    ],
)
def test_a_split_that_cannot_be_right_is_refused(
    tmp_path: Path, rows: list[str], problem: str
) -> None:
    path = tmp_path / "holdout.tsv"
    path.write_text("\n".join(["subject\tpart", *rows]) + "\n")
    with pytest.raises(InputError, match=problem) as caught:
        read_split(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holdout.tsv").write_text("subject\tfold\nsub-1\t0\n")
    with pytest.raises(InputError, match="column part is missing"):
        read_split(tmp_path / "holdout.tsv")
    with pytest.raises(InputError, match="does not exist"):
        read_split(tmp_path / "none.tsv")


# --- The stage ----------------------------------------------------------------------------------


def manifests(folder: Path, config: Config, bad: dict[str, dict[str, str]]) -> Layout:
    """Index and manifests of ten subjects with two runs each; `bad` is {stage: {run: reason}}."""
    layout = Layout(Path(config.results), "toy")
    make_participants(folder, 10)
    rows = [(f"sub-{i:03}_run-{r}", f"sub-{i:03}") for i in range(10) for r in (1, 2)]
    index = pd.DataFrame(rows, columns=["run", "subject"])
    left = index.assign(reason=index["run"].map(bad.get("index", {})))
    write_table(layout.index, left)
    for stage in ("volumes", "tokens", "rois"):
        if stage != "rois":
            left = left[left["reason"].isna()]
        table = left[["run"]].assign(reason=left["run"].map(bad.get(stage, {})))
        for batch in range(config.compute.batches):
            write_table(layout.manifest(stage, batch), table.iloc[batch :: config.compute.batches])
        left = table if stage == "volumes" else left
    return layout


def test_the_stage_lists_what_was_left_out_and_who_remains(tmp_path: Path) -> None:
    config = make_config(tmp_path, compute={"batches": 2, "max_excluded": 0.5})
    layout = manifests(
        tmp_path,
        config,
        {
            "index": {"sub-000_run-1": "no mask"},
            "volumes": {"sub-000_run-2": "NaN in the brain", "sub-001_run-1": "truncated"},
            "tokens": {"sub-002_run-1": "no patch"},
            "rois": {"sub-002_run-2": "no region"},
        },
    )
    run_excluded(config, "toy")
    run_splits(config, "toy")
    excluded = read_table(layout.excluded)
    assert list(excluded.columns) == ["run", "stage", "reason"]
    assert excluded.apply(tuple, axis=1).tolist() == [
        ("sub-000_run-1", "index", "no mask"),
        ("sub-000_run-2", "volumes", "NaN in the brain"),
        ("sub-001_run-1", "volumes", "truncated"),
        ("sub-002_run-1", "tokens", "no patch"),
        ("sub-002_run-2", "rois", "no region"),
    ]
    parts = read_split(layout.split)
    # Subject 0 has no run left; subject 2 has no run with both tokens and ROI series.
    found = sorted(subject for part in parts.values() for subject in part)
    assert found == [f"sub-{i:03}" for i in (1, 3, 4, 5, 6, 7, 8, 9)]


def test_stages_that_each_lose_few_runs_can_together_lose_too_many(tmp_path: Path) -> None:
    config = make_config(tmp_path, compute={"max_excluded": 0.2})
    bad = {
        stage: {f"sub-{3 * k + i:03}_run-1": "bad" for i in range(3)}
        for k, stage in enumerate(("index", "volumes", "tokens"))
    }
    layout = manifests(tmp_path, config, bad)
    with pytest.raises(InputError, match="all stages: 9 of 20"):
        run_excluded(config, "toy")
    assert len(read_table(layout.excluded)) == 9


def test_a_batch_that_has_not_run_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    layout = manifests(tmp_path, config, {})
    layout.manifest("tokens", 0).unlink()
    with pytest.raises(InputError, match=r"tokens/batch-0\.tsv does not exist"):
        run_splits(config, "toy")


def test_running_again_gives_the_same_split(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    layout = manifests(tmp_path, config, {})
    run_splits(config, "toy")
    first = layout.split.read_bytes()
    run_splits(config, "toy")
    assert layout.split.read_bytes() == first


def folds(table: pd.DataFrame, settings: Dataset = BOTH, **splits: Any) -> dict[str, pd.DataFrame]:
    found = fold_subjects(list(table.index), table, settings, Splits(**splits))
    return {name: fold.set_index("subject").join(table) for name, fold in found.items()}


def test_every_subject_is_tested_once_in_each_repeat() -> None:
    found = folds(people(203), protocol="k-fold", folds=4, repeats=3)
    assert list(found) == [f"fold-{k}" for k in range(12)]
    tested = pd.DataFrame({name: fold["part"] == "test" for name, fold in found.items()})
    for repeat in range(3):
        of_repeat = tested.iloc[:, 4 * repeat : 4 * repeat + 4]
        assert (of_repeat.sum(axis=1) == 1).all()
        assert of_repeat.sum().between(50, 51).all()
    assert not tested["fold-0"].equals(tested["fold-4"])
    for fold in found.values():
        assert fold["part"].value_counts()["validation"] == 20


def test_folds_have_their_shares_of_labels_and_sites() -> None:
    for fold in folds(people(), protocol="k-fold").values():
        test = fold["part"] == "test"
        for _, stratum in fold.groupby(["sex", "site"]):
            assert abs(test[stratum.index].sum() - len(stratum) / 5) <= 2


def test_more_repeats_leave_the_first_folds_as_they_are() -> None:
    table = people()
    one = fold_subjects(list(table.index), table, BOTH, Splits(protocol="k-fold"))
    two = fold_subjects(list(table.index[::-1]), table, BOTH, Splits(protocol="k-fold", repeats=2))
    for name, fold in one.items():
        pd.testing.assert_frame_equal(fold, two[name])


def test_repeats_are_added_to_those_that_there_are(tmp_path: Path) -> None:
    config = make_config(tmp_path, splits={"protocol": "k-fold", "folds": 3})
    layout = manifests(tmp_path, config, {})
    run_splits(config, "toy")
    folder = layout.folds.parent
    first = {path.name: path.read_bytes() for path in folder.glob("fold-*.tsv")}
    one = read_table(layout.folds)
    participants = Path(config.datasets["toy"].participants.file)
    table = read_table(participants)
    write_table(participants, table.assign(sex=table["sex"].sample(frac=1, random_state=0).values))
    came = {"run": ["sub-new_run-1"], "subject": ["sub-new"]}
    files = [layout.manifest(stage, 0) for stage in ("volumes", "tokens", "rois")]
    for file in (layout.index, *files):
        rows = read_table(file)
        added = pd.DataFrame(came)[list(rows.columns.intersection(list(came)))]
        write_table(file, pd.concat([rows, added]))
    splits = config.splits.model_copy(update={"repeats": 2})
    more = config.model_copy(update={"splits": splits})
    run_splits(more, "toy", kept=1)
    assert {name: (folder / name).read_bytes() for name in first} == first
    both = read_table(layout.folds)
    pd.testing.assert_frame_equal(both[list(one)], one)
    assert set(both["repeat-1"]) == {"fold-3", "fold-4", "fold-5"}
    for name in ("fold-0", "fold-3"):
        parts = read_split(folder / f"{name}.tsv")
        assert {subject for part in parts.values() for subject in part} == set(one["subject"])
    run_splits(more, "toy")  # as other labels and somebody who came later would have it
    assert "sub-new" in set(read_table(layout.folds)["subject"])
    assert (folder / "fold-0.tsv").read_bytes() != first["fold-0.tsv"]


def test_whole_sites_are_left_out() -> None:
    found = folds(people(), protocol="leave-site-out", folds=3)
    sites = [set(fold.loc[fold["part"] == "test", "site"]) for fold in found.values()]
    assert sorted(map(sorted, sites)) == [["a"], ["b"], ["rare"]]
    for fold, site in zip(found.values(), sites, strict=True):
        assert site.isdisjoint(fold.loc[fold["part"] != "test", "site"])
        assert set(fold["part"]) == {"train", "validation", "test"}
    two = folds(people(), protocol="leave-site-out", folds=2)
    assert [set(f.loc[f["part"] == "test", "site"]) for f in two.values()] == [
        {"a"},
        {"b", "rare"},
    ]


def test_sites_that_cannot_make_the_folds_are_named() -> None:
    with pytest.raises(InputError, match=r"3 site\(s\) \(a, b, rare\) cannot make 4 folds"):
        folds(people(), protocol="leave-site-out", folds=4)
    table = people()
    table.loc["sub-0007", "site"] = pd.NA
    with pytest.raises(InputError, match="no site is known of sub-0007"):
        folds(table, protocol="leave-site-out", folds=2)
    few = people(20).assign(site=["a"] * 19 + ["b"])
    with pytest.raises(InputError, match="fewer than 2 to train and select on"):
        folds(few, protocol="leave-site-out", folds=2)
    with pytest.raises(InputError, match="cannot be tested in 50 folds"):
        folds(people(40), protocol="k-fold", folds=50)


def test_who_has_no_label_trains_in_every_fold() -> None:
    table = people()
    table.loc[table.index[:20], ["sex", "age"]] = pd.NA
    for fold in folds(table, protocol="k-fold").values():
        assert (fold["part"].iloc[:20] == "train").all()


def test_the_table_of_folds_tells_where_each_subject_is_tested() -> None:
    table, splits = people(), Splits(protocol="k-fold", folds=3, repeats=2)
    made = fold_subjects(list(table.index), table, BOTH, splits)
    tested = folds_of(made, splits).set_index("subject")
    assert list(tested) == ["repeat-0", "repeat-1"]
    for column, names in (("repeat-0", ("fold-0", "fold-2")), ("repeat-1", ("fold-3", "fold-5"))):
        for name in names:
            part = made[name].set_index("subject")["part"]
            assert set(tested.index[tested[column] == name]) == set(part.index[part == "test"])
