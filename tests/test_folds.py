"""Cross-validation: each fold is evaluated by itself, and all of them are put together."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricate import make_config, make_data, make_model, predict_by_age_and_sex, run_both

from neuromamba import evaluate
from neuromamba.collect import collect_trainings
from neuromamba.config import Config, Splits
from neuromamba.demo import write_demo
from neuromamba.files import InputError, read_json
from neuromamba.layout import Layout
from neuromamba.pool import run_pool
from neuromamba.scores import run_scores
from neuromamba.splits import read_split, run_splits
from neuromamba.stages import Job, all_jobs, jobs_before, output_of
from neuromamba.tables import read_table, write_table

N = 40


def with_folds(config: Config, **splits: object) -> Config:
    return config.model_copy(update={"splits": Splits.model_validate(splits)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, folds, finished models and the evaluation of each fold, of two repeats."""
    folder = tmp_path_factory.mktemp("made")
    config = with_folds(make_data(folder, N), protocol="k-fold", folds=2, repeats=2)
    write_table(Layout.of(config, "toy").excluded, pd.DataFrame(columns=["run", "stage", "reason"]))
    run_splits(config, "toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "predict_subjects", predict_by_age_and_sex())
        for name in config.splits.names:
            fold = config.in_fold(name)
            parts = read_split(Layout.of(fold, "toy").split)
            make_model(fold, parts, "pretrain")
            for target in ("sex", "age"):
                make_model(fold, parts, target)
                run_both(fold, "toy", "small", 0, target)
    return folder


@pytest.fixture
def config(made: Path, tmp_path: Path) -> Config:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return with_folds(make_config(tmp_path), protocol="k-fold", folds=2, repeats=2)


def test_every_subject_is_tested_once_in_each_repeat(config: Config) -> None:
    run_pool(config, "toy", "small", 0, "sex")
    folder = Layout.of(config, "toy").evaluate("small", 0, "sex")
    table = read_table(folder / "predictions.tsv")
    assert list(table.columns[:3]) == ["subject", "fold", "predictor"]
    for name, rows in table.groupby("predictor"):
        counts = rows.groupby("subject")["fold"].agg(["size", "nunique"])
        assert len(counts) == N, name
        assert (counts == 2).all(axis=None)
    for name in config.splits.names:
        tested = set(table.loc[table["fold"] == name, "subject"])
        split = read_split(Layout.of(config.in_fold(name), "toy").split)
        assert tested == set(split["test"])


def test_the_figures_are_means_over_folds(config: Config) -> None:
    for target in ("sex", "age"):
        run_pool(config, "toy", "small", 0, target)
        pooled = read_table(Layout.of(config, "toy").evaluate("small", 0, target) / "metrics.tsv")
        folds = [
            read_table(
                Layout.of(config.in_fold(name), "toy").evaluate("small", 0, target) / "metrics.tsv"
            )
            for name in config.splits.names
        ]
        mean = pd.concat(folds).groupby(["predictor", "metric"])["value"].mean()
        value = pooled.set_index(["predictor", "metric"])["value"]
        assert value.loc[mean.index].to_numpy() == pytest.approx(mean.to_numpy(), nan_ok=True)
        assert (pooled["n"] == N).all()


def test_the_notes_are_of_all_folds(config: Config) -> None:
    run_pool(config, "toy", "small", 0, "sex")
    notes = read_json(Layout.of(config, "toy").evaluate("small", 0, "sex") / "notes.json")
    assert notes["n_test"] == N
    assert notes["n_train"] == N // 2
    assert list(notes["folds"]) == config.splits.names
    assert set(notes["baselines"]) == {"fc", "confounds"}
    assert sum(notes["train_labels"].values()) == pytest.approx(1)


def test_a_fold_that_is_missing_is_named(config: Config) -> None:
    fold = Layout.of(config.in_fold("fold-2"), "toy").evaluate("small", 0, "sex")
    (fold / "metrics.tsv").unlink()
    with pytest.raises(InputError, match="fold-2 has not been evaluated"):
        run_pool(config, "toy", "small", 0, "sex")


def test_a_model_of_another_fold_has_seen_the_subjects(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "predict_subjects", predict_by_age_and_sex())
    first, second = (config.in_fold(name) for name in ("fold-0", "fold-1"))
    wrong = Layout.of(second, "toy").finetune("small", 0, "sex")
    shutil.rmtree(wrong)
    shutil.copytree(Layout.of(first, "toy").finetune("small", 0, "sex"), wrong)
    with pytest.raises(InputError, match="were used to train the model"):
        run_both(second, "toy", "small", 0, "sex")


def test_baselines_of_other_subjects_are_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "predict_subjects", predict_by_age_and_sex())
    first, second = (config.in_fold(name) for name in ("fold-0", "fold-1"))
    folders = [Layout.of(fold, "toy").baselines("sex") for fold in (first, second)]
    shutil.copy(folders[0] / "predictions.tsv", folders[1] / "predictions.tsv")
    with pytest.raises(InputError, match="is of other test subjects"):
        evaluate.run_evaluate(second, "toy", "small", 0, "sex")
    (folders[1] / "notes.json").unlink()
    with pytest.raises(InputError, match="baselines have not been predicted"):
        evaluate.run_evaluate(second, "toy", "small", 0, "sex")


def test_scores_and_the_report_find_the_trainings_of_all_folds(config: Config) -> None:
    for target in ("sex", "age"):
        run_pool(config, "toy", "small", 0, target)
    run_scores(config, "toy", "small", 0)
    folder = Layout.of(config, "toy").scores("small", 0)
    names = {path.stem for path in (folder / "loss").iterdir()}
    assert names == {
        f"{stage}-{fold}"
        for stage in ("pretrain", "finetune-sex", "finetune-age")
        for fold in config.splits.names
    }
    assert set(read_json(folder / "metrics.json")) == {"data", "target sex", "target age"}
    found = list(collect_trainings(config, "toy", "sex"))
    assert [training.fold for training in found] == config.splits.names


def test_each_fold_is_a_job_of_its_own(config: Config) -> None:
    jobs = all_jobs(config)
    pooled = Job("evaluate", "toy", model="small", target="sex")
    folds = [job for job in jobs_before(config, pooled) if job.stage == "evaluate"]
    assert [job.fold for job in folds] == config.splits.names
    assert len([job for job in jobs if job.stage == "pretrain"]) == 4
    assert len([job for job in jobs if job.stage == "baselines"]) == 8
    assert len({output_of(config, job) for job in jobs}) == len(jobs)
    assert output_of(config, folds[1]).parent.name == "fold-1"


@pytest.mark.slow
def test_the_workflow_runs_all_folds_and_models_share_a_pretraining(
    root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("snakemake", reason="the workflow extra is not installed")
    shutil.copytree(root / "config", tmp_path / "config")
    shutil.copy(root / "tests" / "tiny.yaml", tmp_path / "tiny.yaml")
    models = tmp_path / "config" / "models"
    shutil.copy(root / "tests" / "tiny-model.yaml", models / "tiny.yaml")
    (models / "probe.yaml").write_text("base: tiny\nfinetune: {mode: probe}\n")
    (tmp_path / "folds.yaml").write_text(
        "models: [tiny, probe]\nsplits: {protocol: leave-site-out, folds: 2, validation: 0.2}\n"
    )
    write_demo(tmp_path / "data" / "tiny", subjects=16, volumes=24, voxel_size=8.0, seed=0)
    wanted = [f"results/tiny/{name}/seed-0/evaluate/sex/metrics.tsv" for name in ("tiny", "probe")]
    command = [sys.executable, "-m", "snakemake", *wanted, "--snakefile", str(root / "Snakefile")]
    command += ["--directory", str(tmp_path), "--cores", "2"]
    command += ["--configfile", "tiny.yaml", "folds.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tiny = tmp_path / "results" / "tiny"
    assert not (tiny / "probe" / "seed-0" / "pretrain").exists()
    for model in ("tiny", "probe"):
        table = read_table(tiny / model / "seed-0" / "evaluate" / "sex" / "predictions.tsv")
        rows = table[table["predictor"] == model]
        assert rows["subject"].is_unique
        assert len(rows) == 16
        people = read_table(tmp_path / "data" / "tiny" / "participants.tsv")
        site = rows["subject"].map(people.set_index("participant_id")["site"])
        assert (rows["fold"].groupby(site).nunique() == 1).all()  # each site is left out once
        assert rows["fold"].nunique() == 2
        assert np.isfinite(rows["prob_male"]).all()
    again = subprocess.run(
        [*command, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "Nothing to be done" in again.stdout + again.stderr
    assert json.loads((tiny / "tiny" / "seed-0" / "pretrain" / "fold-1" / "model.json").read_text())
