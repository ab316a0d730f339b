"""The scaling study: nested shares of the subjects, its settings, and the workflow."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from neuromamba.config import Dataset, build_config, load_config, save_config
from neuromamba.demo import write_demo
from neuromamba.files import InputError
from neuromamba.shares import nested_share
from neuromamba.tables import read_table

# --- Shares ---------------------------------------------------------------------------------------

SEX = {"kind": "classification", "column": "s", "classes": {"female": "F", "male": "M"}}
DATASET = Dataset.model_validate({"derivatives": "x", "targets": {"sex": SEX}})


def people(n: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    index = pd.Index([f"sub-{i:04}" for i in range(n)], name="subject")
    sex = rng.choice(["female", "male"], p=[0.3, 0.7], size=n)
    return pd.DataFrame({"site": rng.choice(["a", "b"], size=n), "sex": sex}, index=index)


def share(table: pd.DataFrame, fraction: float, seed: int = 0) -> list[str]:
    return nested_share(list(table.index), table, DATASET, fraction, seed)


def test_smaller_shares_lie_in_larger_ones():
    table = people()
    shares = [set(share(table, fraction)) for fraction in (0.001, 0.01, 0.07, 0.3, 0.5, 1.0)]
    assert [len(names) for names in shares] == [1, 2, 14, 60, 100, 200]
    for small, large in pairwise(shares):
        assert small < large


def test_a_share_depends_on_the_seed_and_not_on_the_order_of_the_subjects():
    table = people()
    shuffled = table.sample(frac=1, random_state=3)
    assert share(table, 0.3) == share(shuffled, 0.3)
    assert share(table, 0.3) != share(table, 0.3, seed=1)


def test_a_share_has_its_part_of_every_stratum():
    table = people()
    for fraction in (0.1, 0.3, 0.5):
        names = share(table, fraction)
        for _, stratum in table.groupby(["sex", "site"]):
            assert abs(stratum.index.isin(names).sum() - fraction * len(stratum)) <= 1


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(fraction):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        share(people(), fraction)


# --- Config ---------------------------------------------------------------------------------------


def test_models_of_the_study_are_named_or_written_out(root: Path, tmp_path: Path):
    base = root / "config" / "config.yaml"
    names = "scaling.models=[neuromamba-base, neuromamba-5m]"
    config = load_config([base], [names, "pretrain.weight_decay=0.5"])
    study = config.study()
    assert [model.width for model in study.models.values()] == [192, 256]
    assert {model.pretrain.weight_decay for model in study.models.values()} == {0.5}
    assert list(config.models) == ["neuromamba-small"]
    save_config(tmp_path / "config.yaml", config)
    assert load_config([tmp_path / "config.yaml"]) == config
    assert list(load_config([base]).study().models) == ["neuromamba-small"]


@pytest.mark.parametrize("files", [["scaling.yaml"], ["demo.yaml", "scaling-demo.yaml"]])
def test_the_shipped_studies_are_valid(root: Path, files: list[str]):
    config = load_config([root / "config" / name for name in ["config.yaml", *files]])
    assert len(config.study().models) >= 3
    assert config.scaling.fractions[-1] == 1.0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("scaling.models=[neuromamba-huge]", "scaling.models: 'neuromamba-huge' has no file"),
        ("scaling.fractions=[0.1, 0.1000000001]", "fractions must differ"),
        ("scaling.fractions=[0]", "greater than 0"),
        ("scaling.seeds=[1, 1]", "seeds must differ"),
        ("scaling.models.a.width=36", "scaling.models.a.family"),
    ],
)
def test_a_wrong_study_is_explained(root: Path, setting: str, words: str):
    with pytest.raises(InputError) as caught:
        load_config([root / "config" / "config.yaml"], [setting])
    assert words in str(caught.value)


def test_losses_of_different_things_are_not_compared():
    models = {
        "one": {"family": "neuromamba"},
        "other": {"family": "neuromamba", "normalization": "voxel"},
    }
    raw = {"datasets": {"d": {"derivatives": "x"}}, "models": models}
    config = build_config(raw, "config", "test")
    with pytest.raises(InputError, match=r"'normalization' cannot be compared \(one: global"):
        config.study()


# --- The workflow ---------------------------------------------------------------------------------


def snakemake(folder: Path, root: Path, *options: str) -> str:
    pytest.importorskip("snakemake", reason="the workflow extra is not installed")
    command = [sys.executable, "-m", "snakemake", "scaling", "--cores", "2", "--directory"]
    command += [str(folder), "--snakefile", str(root / "Snakefile"), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned_jobs(text: str) -> dict[str, int]:
    table = text.split("Job stats:")[1].split("total")[0]
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


@pytest.mark.slow
def test_the_shipped_study_has_a_job_for_every_cell(root: Path, tmp_path: Path):
    shutil.copytree(root / "config", tmp_path / "config")
    jobs = planned_jobs(
        snakemake(tmp_path, root, "--dry-run", "--configfile", "config/scaling.yaml")
    )
    assert jobs["pretrain_cell"] == 6 * 5 * 3
    assert jobs["fit_scaling"] == 1
    assert "pretrain_model" not in jobs


@pytest.mark.slow
def test_the_workflow_runs_a_study(root: Path, tmp_path: Path):
    shutil.copytree(root / "config", tmp_path / "config")
    shutil.copy(root / "tests" / "tiny-model.yaml", tmp_path / "config" / "models" / "tiny.yaml")
    shutil.copy(root / "tests" / "tiny.yaml", tmp_path)
    write_demo(tmp_path / "data" / "tiny", subjects=8, volumes=24, voxel_size=8.0, seed=0)
    options = ["--configfile", "tiny.yaml", "--set-threads", "pretrain_cell=1", "--config"]
    options += ["compute={batches: 1}", "scaling={models: [tiny], fractions: [0.5, 1.0]}"]
    snakemake(tmp_path, root, *options)
    results = tmp_path / "results" / "tiny"
    cells = read_table(results / "scaling" / "scaling.tsv")
    assert cells["fraction"].tolist() == [0.5, 1.0]
    assert cells["steps"].tolist() == [4, 4]
    split = read_table(results / "splits" / "holdout.tsv")["part"]
    assert cells["subjects"].tolist() == [
        -(-(split == "train").sum() // 2),
        (split == "train").sum(),
    ]
    assert (results / "scaling" / "scaling.svg").exists()
    assert not (results / "tiny").exists()
    text = snakemake(tmp_path, root, "--dry-run", *options)
    assert "Nothing to be done" in text
