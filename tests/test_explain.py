"""Explanation of a tiny model of synthetic scans that went through the real data stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest

from neuromamba.bids import run_index
from neuromamba.config import Config
from neuromamba.demo import write_demo
from neuromamba.explain import CHECK_SUBJECTS, run_explain
from neuromamba.files import InputError, read_json, write_json
from neuromamba.finetune import run_finetune
from neuromamba.layout import Layout
from neuromamba.pretrain import run_pretrain
from neuromamba.resample import target_affine
from neuromamba.tables import read_table, write_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

N_SUBJECTS = 12
TRAINING = {"batch_size": 2, "validate_every": 4, "checkpoint_every": 4, "log_every": 4}
FILES = ["attribution.png", "checks.json", "group_attribution.json", "group_attribution.nii.gz"]


def make_config(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> Config:
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "seeds": seeds,
            "datasets": {
                "toy": {
                    "derivatives": str(folder / "demo"),
                    "participants": {"file": str(folder / "demo" / "participants.tsv")},
                    "targets": {"sex": sex, "age": {"kind": "regression", "column": "age"}},
                    "atlas": "packaged:20",
                }
            },
            "models": {
                "tiny": {
                    "family": "neuromamba",
                    **{"width": 8, "depth": 1, "state": 4, "head_dim": 8, "volumes": 4},
                    "normalization": "voxel",
                    "pretrain": {"steps": 4, **TRAINING},
                    "finetune": {"steps": 8, "learning_rate": 0.01, **TRAINING},
                }
            },
            "volumes": {"shape": [16, 20, 16], "voxel_size": 12.0, "min_volumes": 6},
            "tokens": {"patch": 4},
            "compute": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of sex with two seeds and of age with one; the last four subjects are for testing."""
    folder = tmp_path_factory.mktemp("trained")
    write_demo(folder / "demo", subjects=N_SUBJECTS, volumes=10, voxel_size=12.0)
    config = make_config(folder)
    run_index(config, "toy")
    run_volumes(config, "toy", 0)
    run_tokens(config, "toy", 0)
    parts = ["train"] * 5 + ["validation"] * 3 + ["test"] * 4
    rows = [(f"sub-{k + 1:02d}", part) for k, part in enumerate(parts)]
    write_table(Layout.of(config, "toy").split, pd.DataFrame(rows, columns=["subject", "part"]))
    for seed, targets in ((0, ("sex", "age")), (1, ("sex",))):
        run_pretrain(config, "toy", "tiny", seed)
        for target in targets:
            run_finetune(config, "toy", "tiny", seed, target)
    return folder


def explain(folder: Path, output: Path, target: str = "sex", **options: Any) -> dict[str, Any]:
    run_explain(make_config(folder), "toy", "tiny", 0, target, output, **{"steps": 4, **options})
    return read_json(output / "checks.json")


@pytest.fixture(scope="module")
def explained(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of sex, with the other seed's in the place of one of permuted labels."""
    output = tmp_path_factory.mktemp("explained") / "sex"
    permuted = Layout(trained / "results", "toy").finetune("tiny", 1, "sex")
    explain(trained, output, steps=32, permuted=permuted, subject_maps=True)
    return output


@pytest.fixture(autouse=True)
def undrawn(explained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure takes seconds: that of `explained`, which is made before, has to do."""
    monkeypatch.setattr("neuromamba.explain.draw_maps", lambda *arguments: None)


def test_everything_is_written(explained: Path, trained: Path):
    assert sorted(path.name for path in explained.iterdir()) == [
        *FILES,
        "regions.tsv",
        "subjects",
    ]
    image = nibabel.load(explained / "group_attribution.nii.gz")
    volumes = make_config(trained).volumes
    np.testing.assert_allclose(image.affine, target_affine(volumes))
    about = read_json(explained / "group_attribution.json")
    assert image.shape == (*volumes.shape, len(about["volumes"]))
    assert about["explains"] == "logit of male minus that of female"
    assert (about["space"], about["resolution_mm"]) == ("MNI152NLin2009cAsym", 48.0)
    assert (explained / "attribution.png").read_bytes().startswith(b"\x89PNG")


def test_the_group_is_the_mean_of_its_subjects_and_complete(explained: Path):
    names = sorted(path.name for path in (explained / "subjects").glob("*.nii.gz"))
    assert names == [f"sub-{k:02d}.nii.gz" for k in range(9, 13)]
    each = np.stack([nibabel.load(explained / "subjects" / name).get_fdata() for name in names])
    group = nibabel.load(explained / "group_attribution.nii.gz").get_fdata()
    named = read_json(explained / "group_attribution.json")["volumes"]
    for k, kind in enumerate(("strength", "signed")):
        np.testing.assert_allclose(group[..., named.index(kind)], each[..., k].mean(0), atol=1e-7)
    assert (each[..., 0] >= np.abs(each[..., 1]) - 1e-7).all()
    np.testing.assert_allclose(group[..., named.index("between")].sum(), 1, atol=1e-4)
    checks = read_json(explained / "checks.json")
    assert each[..., 1].sum((1, 2, 3)).mean() == pytest.approx(checks["baseline"]["mean"], rel=0.01)
    assert checks["completeness"]["windows"] == 4 * 2
    assert checks["completeness"]["gap"] < 0.01


def test_regions_tell_most_of_the_map(explained: Path):
    table, checks = read_table(explained / "regions.tsv"), read_json(explained / "checks.json")
    assert table["strength"].is_monotonic_decreasing
    # Regions without a voxel of the common brain are left out, as is what lies in none.
    assert 0.5 < table["share"].sum() <= 1 - checks["share_in_no_region"] + 1e-6
    assert "20 k-means parcels" in checks["atlas"]


def test_checks_compare_other_networks(explained: Path):
    checks = read_json(explained / "checks.json")
    assert len(checks["compared_on"]) == 4 <= CHECK_SUBJECTS
    assert set(checks["shuffled_weights"]) == {"head", "all"}
    assert set(checks["other_seeds"]) == {"1"}
    # The same network was given as one of permuted labels.
    same, labels = checks["other_seeds"]["1"], checks["permuted_labels"]["given"]
    for kind in ("strength", "signed"):
        assert -1 <= same[kind]["spearman"] <= 1
        assert labels[kind]["spearman"] == same[kind]["spearman"]
        assert "labels" in labels[kind]["verdict"]
        assert "seed" in same[kind]["verdict"]
    assert checks["seen_in_training"] == 0


def test_the_truth_of_synthetic_data_is_looked_for(explained: Path):
    truth = read_json(explained / "checks.json")["truth"]
    for kind in ("strength", "between"):
        found = truth[kind]
        assert found["networks"] == ["A", "B", "D"]
        assert 0 < found["auroc"] < 1
        assert f"AUROC {found['parcel_auroc']:.2f} of parcels" in found["verdict"]
        assert round(20 * found["p"]) == pytest.approx(20 * found["p"])


def test_the_map_is_the_same_each_time_and_of_each_subset(
    trained: Path, explained: Path, tmp_path: Path, capsys
):
    explain(trained, tmp_path / "one", steps=32, subjects=["sub-10"], subject_maps=True)
    one, among = (
        nibabel.load(folder / "subjects" / "sub-10.nii.gz").get_fdata()
        for folder in (tmp_path / "one", explained)
    )
    np.testing.assert_array_equal(one, among)
    assert read_json(tmp_path / "one" / "group_attribution.json")["volumes"] == [
        "strength",
        "signed",
    ]
    assert read_table(tmp_path / "one" / "regions.tsv")["strength_low"].isna().all()
    assert "shuffled_weights.all.strength: the strength map" in capsys.readouterr().out


def test_numbers_and_other_classes_are_explained(trained: Path, explained: Path, tmp_path: Path):
    checks = explain(trained, tmp_path / "age", "age", subjects=["sub-10", "sub-01"])
    assert checks["explains"] == "predicted age"
    assert checks["truth"]["between"]["networks"] == ["C", "E"]
    assert checks["seen_in_training"] == 1
    assert checks["other_seeds"] == {}
    explain(trained, tmp_path / "female", steps=32, of_class="female")
    own, other = (
        nibabel.load(folder / "group_attribution.nii.gz").get_fdata()
        for folder in (explained, tmp_path / "female")
    )
    np.testing.assert_allclose(own[..., 0], other[..., 0], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(own[..., 1], -other[..., 1], rtol=1e-3, atol=1e-7)


def test_what_does_not_serve_is_refused_before_anything_is_written(trained: Path, tmp_path: Path):
    there = tmp_path / "there"
    there.mkdir()
    cases = [
        ({"output": there}, "exists already"),
        ({"windows": 0}, "--windows 0"),
        ({"of_class": "child"}, "--class child: the classes are female, male"),
        ({"subjects": ["sub-99"]}, "sub-99 has no tokens"),
        ({"permuted": tmp_path / "nowhere"}, "is not a folder"),
    ]
    for options, message in cases:
        output = options.pop("output", tmp_path / "out")
        with pytest.raises(InputError, match=message):
            explain(trained, output, **options)
    with pytest.raises(InputError, match="the target is a number"):
        explain(trained, tmp_path / "out", "age", of_class="male")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_models_of_other_settings_are_not_compared(trained: Path, tmp_path: Path, capsys):
    shutil.copytree(trained / "results", tmp_path / "results")
    (tmp_path / "demo").symlink_to(trained / "demo")
    folder = Layout(tmp_path / "results", "toy").finetune("tiny", 1, "sex")
    info = read_json(folder / "model.json")
    info["settings"]["model"]["normalization"] = "global"
    write_json(folder / "model.json", info)
    checks = explain(tmp_path, tmp_path / "out", subjects=["sub-10"])
    assert checks["other_seeds"] == {}
    assert "under another model than the explained model" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--permuted: .*another model"):
        explain(tmp_path, tmp_path / "other", subjects=["sub-10"], permuted=folder)
    assert not (tmp_path / "other").exists()


def test_a_failure_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: Any) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("neuromamba.explain.draw_maps", fail)
    with pytest.raises(OSError, match="no space"):
        explain(trained, tmp_path / "out", subjects=["sub-10"])
    assert list(tmp_path.iterdir()) == []


def test_checks_are_valid_json(explained: Path):
    text = (explained / "checks.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
