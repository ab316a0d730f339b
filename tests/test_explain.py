"""Explanation of a tiny model of synthetic scans that went through the real data stages."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from fake_models import Reader
from nilearn.image import resample_to_img
from sklearn.metrics import roc_auc_score

from neuromamba.bids import run_index
from neuromamba.config import Config, Explain
from neuromamba.demo import write_demo
from neuromamba.demo_brain import NETWORKS, PARCELS, parcellation
from neuromamba.explain import CHECK_SUBJECTS, run_explain
from neuromamba.explain_networks import networks_to_compare, refit_head
from neuromamba.explainer import LEAST_GAP, STEPS, WINDOWS, subjects_to_explain
from neuromamba.files import InputError, read_json, write_json
from neuromamba.finetune import run_finetune
from neuromamba.heads import ClassHead, HeadedModel
from neuromamba.layout import Layout
from neuromamba.predictor import open_predictor
from neuromamba.pretrain import run_pretrain
from neuromamba.resample import target_affine
from neuromamba.tables import read_table, write_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

N_SUBJECTS = 12
TRAINING = {"batch_size": 2, "validate_every": 4, "checkpoint_every": 4, "log_every": 4}
FILES = [
    "attribution.png",
    "explain.json",
    "group_attribution.json",
    "group_attribution.nii.gz",
    "regions.svg",
    "regions.tsv",
]
ATLAS = "tpl-MNI152NLin2009cAsym/anat/tpl-MNI152NLin2009cAsym_atlas-demo_dseg"


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
    return read_json(output / "explain.json")


@pytest.fixture(scope="module")
def explained(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of sex, with the other seed's in the place of one of permuted labels."""
    output = tmp_path_factory.mktemp("explained") / "sex"
    permuted = Layout(trained / "results", "toy").finetune("tiny", 1, "sex")
    explain(trained, output, steps=32, permuted=permuted, subject_maps=True)
    return output


def read_maps(folder: Path) -> dict[str, np.ndarray]:
    """The group's maps (x, y, z), by name."""
    values = nibabel.load(folder / "group_attribution.nii.gz").get_fdata()
    names = read_json(folder / "group_attribution.json")["volumes"]
    return dict(zip(names, np.moveaxis(values, -1, 0), strict=True))


@pytest.fixture(autouse=True)
def undrawn(explained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take seconds: those of `explained`, which are made before, have to do."""
    for name in ("draw_maps", "draw_regions"):
        monkeypatch.setattr(f"neuromamba.explain.{name}", lambda *arguments: None)


def test_everything_is_written(explained: Path, trained: Path):
    assert sorted(path.name for path in explained.iterdir()) == [*FILES, "subjects"]
    image = nibabel.load(explained / "group_attribution.nii.gz")
    volumes = make_config(trained).volumes
    np.testing.assert_allclose(image.affine, target_affine(volumes))
    about = read_json(explained / "group_attribution.json")
    assert image.shape == (*volumes.shape, len(about["volumes"]))
    assert set(about["meaning"]) == set(about["volumes"])
    assert about["explains"] == "logit of male minus that of female"
    assert (about["space"], about["resolution_mm"]) == ("MNI152NLin2009cAsym", 48.0)
    assert (explained / "attribution.png").read_bytes().startswith(b"\x89PNG")
    drawn = (explained / "regions.svg").read_text()
    assert f">{read_table(explained / 'regions.tsv')['region'][0]}<" in drawn


def test_the_group_is_the_mean_of_its_subjects_and_complete(explained: Path):
    names = sorted(path.name for path in (explained / "subjects").glob("*.nii.gz"))
    ending = "space-MNI152NLin2009cAsym_desc-attribution_statmap.nii.gz"
    assert names == [f"sub-{k:02d}_{ending}" for k in range(9, 13)]
    each = np.stack([nibabel.load(explained / "subjects" / name).get_fdata() for name in names])
    group = nibabel.load(explained / "group_attribution.nii.gz").get_fdata()
    named = read_json(explained / "group_attribution.json")["volumes"]
    for k, kind in enumerate(("strength", "signed")):
        np.testing.assert_allclose(group[..., named.index(kind)], each[..., k].mean(0), atol=1e-7)
    assert (each[..., 0] >= np.abs(each[..., 1]) - 1e-7).all()
    np.testing.assert_allclose(group[..., named.index("between")].sum(), 1, atol=1e-4)
    alike = (np.sign(each[..., 1]) == np.sign(each[..., 1].mean(0))).mean(0)
    alike[each[..., 1].mean(0) == 0] = 0
    np.testing.assert_allclose(group[..., named.index("signed_agreement")], alike)
    checks = read_json(explained / "explain.json")
    assert each[..., 1].sum((1, 2, 3)).mean() == pytest.approx(checks["baseline"]["mean"], rel=0.01)
    assert checks["completeness"]["windows"] == 4 * 2
    assert checks["completeness"]["gap"] < 0.01


def test_regions_tell_most_of_the_map(explained: Path):
    table, checks = read_table(explained / "regions.tsv"), read_json(explained / "explain.json")
    assert table["strength"].is_monotonic_decreasing
    # Regions without a voxel of the common brain are left out, as is what lies in none.
    assert 0.5 < table["share"].sum() <= 1 - checks["share_in_no_region"] + 1e-6
    assert "20 k-means parcels" in checks["atlas"]


def compare_nothing(patch: pytest.MonkeyPatch) -> None:
    """Other networks take most of the time."""
    patch.setattr("neuromamba.explain.networks_to_compare", lambda *arguments: [])


def test_checks_compare_other_networks(
    explained: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checks = read_json(explained / "explain.json")
    assert len(checks["compared_on"]) == 4 <= CHECK_SUBJECTS
    assert set(checks["shuffled_weights"]) == {"head", "all"}
    assert set(checks["other_seeds"]) == {"1"}
    assert set(checks["refitted_head"]) == {"labels"}
    assert set(checks["permuted_labels"]) == {"head", "given"}
    # The map of the other seed, made by itself.
    compare_nothing(monkeypatch)
    run_explain(make_config(trained), "toy", "tiny", 1, "sex", tmp_path / "one", steps=32)
    own, other = read_maps(explained), read_maps(tmp_path / "one")
    each = [nibabel.load(p).get_fdata() for p in sorted((explained / "subjects").glob("*.nii.gz"))]
    brain = 2 * sum(of[..., 0] > 0 for of in each) >= len(each)
    # The same network was given as one of permuted labels.
    same, labels = checks["other_seeds"]["1"], checks["permuted_labels"]["given"]
    for kind in ("strength", "signed", "between"):
        rho = scipy.stats.spearmanr(own[kind][brain], other[kind][brain]).statistic
        assert same[kind]["spearman"] == pytest.approx(rho, abs=1e-3)
        assert labels[kind]["spearman"] == same[kind]["spearman"]
        assert "labels" in labels[kind]["verdict"]
        assert "seed" in same[kind]["verdict"]
        assert abs(checks["shuffled_weights"]["all"][kind]["spearman"]) < 0.9
    assert checks["seen_in_training"] == 0


def test_the_truth_of_synthetic_data_is_looked_for(explained: Path, trained: Path):
    truth, maps = read_json(explained / "explain.json")["truth"], read_maps(explained)
    # The same by the atlas that the dataset brings, on the grid of the map.
    stem = trained / "demo" / ATLAS
    image = nibabel.load(explained / "group_attribution.nii.gz").slicer[..., 0]
    label = resample_to_img(f"{stem}.nii.gz", image, interpolation="nearest")
    label = label.get_fdata().astype(int)
    network = read_table(Path(f"{stem}.tsv")).set_index("index")["network"]
    numbers = [n for n in network.index if ((label == n) & (maps["strength"] > 0)).any()]
    for kind in ("strength", "between"):
        found = truth[kind]
        assert found["networks"] == ["A", "B", "D"]
        each = [maps[kind][(label == n) & (maps["strength"] > 0)].mean() for n in numbers]
        every = {
            choice: roc_auc_score(network[numbers].isin(choice), each)
            for choice in itertools.combinations(NETWORKS, 3)
        }
        auroc = every["A", "B", "D"]
        assert found["parcel_auroc"] == pytest.approx(auroc, abs=0.05)
        assert f"AUROC {found['parcel_auroc']:.2f} of parcels" in found["verdict"]
        higher = sum(other > auroc + 0.1 for other in every.values())
        as_high = sum(other > auroc - 0.1 for other in every.values())
        assert (1 + higher) / 20 <= found["p"] <= as_high / 20


def test_the_map_is_the_same_each_time_and_of_each_subset(
    trained: Path, explained: Path, tmp_path: Path, capsys
):
    explain(trained, tmp_path / "one", steps=32, subjects=["sub-10"], subject_maps=True)
    one, among = (
        nibabel.load(next((folder / "subjects").glob("sub-10_*.nii.gz"))).get_fdata()
        for folder in (tmp_path / "one", explained)
    )
    np.testing.assert_array_equal(one, among)
    assert read_json(tmp_path / "one" / "group_attribution.json")["volumes"] == [
        "strength",
        "signed",
    ]
    assert read_table(tmp_path / "one" / "regions.tsv")["strength_low"].isna().all()
    assert "shuffled_weights.all.strength: the strength map" in capsys.readouterr().out


def test_numbers_and_other_classes_are_explained(
    trained: Path, explained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checks = explain(trained, tmp_path / "age", "age", subjects=["sub-10", "sub-01"])
    assert checks["explains"] == "predicted age"
    assert checks["truth"]["between"]["networks"] == ["C", "E"]
    assert checks["seen_in_training"] == 1
    assert checks["other_seeds"] == {}
    compare_nothing(monkeypatch)
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

    compare_nothing(monkeypatch)
    monkeypatch.setattr("neuromamba.explain.draw_maps", fail)
    with pytest.raises(OSError, match="no space"):
        explain(trained, tmp_path / "out", subjects=["sub-10"])
    assert list(tmp_path.iterdir()) == []


def test_the_stage_replaces_its_own_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compare_nothing(monkeypatch)
    shutil.copytree(trained / "results", tmp_path / "results")
    (tmp_path / "demo").symlink_to(trained / "demo")
    config = make_config(tmp_path, seeds=(0,))
    folder = Layout.of(config, "toy").explain("tiny", 0, "sex")
    folder.mkdir(parents=True)
    (folder / "of an earlier version").touch()
    run_explain(config, "toy", "tiny", 0, "sex")
    drawn = {"attribution.png", "regions.svg"}
    assert {path.name for path in folder.iterdir()} == set(FILES) - drawn
    about = read_json(folder / "explain.json")
    assert about["windows_per_run"] == WINDOWS
    # As few steps as make it complete.
    assert about["steps"] in STEPS[1:-1]
    assert about["completeness"]["gap"] < 2 * LEAST_GAP
    assert about["subjects"] == 4
    assert about["other_seeds"] == {}


def test_at_most_so_many_subjects_are_explained(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compare_nothing(monkeypatch)
    config = make_config(trained).model_copy(update={"explain": Explain(subjects=2, steps=4)})
    run_explain(config, "toy", "tiny", 0, "sex", tmp_path / "two")
    assert read_json(tmp_path / "two" / "explain.json")["compared_on"] == ["sub-09", "sub-12"]


def test_only_subjects_with_usable_tokens_are_taken(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "results", tmp_path / "results")
    (tmp_path / "demo").symlink_to(trained / "demo")
    config = make_config(tmp_path)
    path = Layout.of(config, "toy").manifest("tokens", 0)

    def leave_out(*subjects: str) -> None:
        table = read_table(path, dtype={"reason": str})
        lost = table["run"].str.split("_").str[0].isin(subjects)
        write_table(path, table.assign(reason=table["reason"].mask(lost, "no brain")))

    assert subjects_to_explain(config, "toy", ["tokens"], 9) == [
        "sub-09",
        "sub-10",
        "sub-11",
        "sub-12",
    ]
    leave_out("sub-10", "sub-12")
    assert subjects_to_explain(config, "toy", ["tokens"], 9) == ["sub-09", "sub-11"]
    assert subjects_to_explain(config, "toy", ["tokens"], 1) == ["sub-09"]
    leave_out("sub-09", "sub-11")
    with pytest.raises(InputError, match="no subject of the part 'test' has tokens of good"):
        subjects_to_explain(config, "toy", ["tokens"], 9)


def test_a_head_is_fitted_to_the_labels_of_its_subjects_in_whatever_order(
    trained: Path, tmp_path: Path
):
    shutil.copytree(trained / "results", tmp_path / "results")
    (tmp_path / "demo").symlink_to(trained / "demo")
    heads = []
    for folder in (trained, tmp_path):
        config = make_config(folder, seeds=(0,))
        layout = Layout.of(config, "toy")
        if folder == tmp_path:
            write_table(layout.split, read_table(layout.split)[::-1])
        predictor = open_predictor(layout.finetune("tiny", 0, "sex"), "cpu")
        every = list(networks_to_compare(config, "toy", "tiny", 0, predictor, None))
        heads += [one.network.head[-1] for one in every if one.against == "refit"]
    first, second = heads
    torch.testing.assert_close(first.weight, second.weight)
    torch.testing.assert_close(first.bias, second.bias)


def test_a_head_is_fitted_anew_to_true_and_to_permuted_labels(trained: Path):
    config = make_config(trained)
    layout = Layout.of(config, "toy")
    for target, measure in (("sex", "accuracy"), ("age", "mae")):
        predictor = open_predictor(layout.finetune("tiny", 0, target), "cpu")
        network, task = predictor.network, predictor.network.task
        rng = np.random.default_rng(0)
        features = rng.standard_normal((40, network.backbone.width)) * 0.01 + 3
        side = features[:, 0] > 3
        labels = side.astype(int) if target == "sex" else np.where(side, 70.0, 30.0)
        fitted = refit_head(network, features, labels, 5, 0)
        x, y = torch.tensor(features).float(), torch.tensor(labels)
        scalars = task.loss(fitted.head(x), y)
        of_permuted = refit_head(network, features, rng.permutation(labels), 5, 0)
        other = task.loss(of_permuted.head(x), y)
        if target == "sex":
            assert scalars[measure] > 0.9 > 0.8 > other[measure]
        else:
            assert scalars[measure] < 14 < 16 < other[measure]
        assert fitted.backbone is network.backbone
        assert not torch.equal(fitted.head[-1].weight, network.head[-1].weight)


# --- A model that reads regions -------------------------------------------------------------------


class RegionWindows:
    """Reader of made-up series (time, region) of a run: noise, as strong as its name says."""

    def positions(self, run: str) -> int:
        return 3

    def read(self, run: str, start: int) -> dict[str, np.ndarray]:
        number = int(run[4:6])
        noise = np.random.default_rng([number, start]).standard_normal((4, PARCELS))
        return {"rois": (1 + number / 10) * noise.astype(np.float32)}

    def collate(self, samples: Any) -> dict[str, torch.Tensor]:
        return {"rois": torch.from_numpy(np.stack([sample["rois"] for sample in samples]))}


def test_a_model_of_regions_is_explained_and_its_truth_is_found(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(trained, seeds=(0,))
    atlas = f"{trained / 'demo' / ATLAS}.nii.gz"
    toy = config.datasets["toy"].model_copy(update={"atlas": atlas})
    config = config.model_copy(update={"datasets": {"toy": toy}})
    of_effect = np.isin(np.array(NETWORKS)[parcellation()[1]], ["A", "B", "D"])
    weight = torch.tensor(0.1 * of_effect, dtype=torch.float32).expand(2, 1, PARCELS).clone()
    network = HeadedModel(Reader("rois", weight, power=2), ClassHead([1.0, 1.0]), 0.0, frozen=True)
    network.head[-1].weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    opened = open_predictor(Layout.of(config, "toy").finetune("tiny", 0, "sex"), "cpu")
    fake = replace(opened, network=network.eval())
    monkeypatch.setattr("neuromamba.explain.open_predictor", lambda *arguments: fake)
    monkeypatch.setattr("neuromamba.explainer.make_readers", lambda *arguments: [RegionWindows()])
    run_explain(config, "toy", "tiny", 0, "sex", tmp_path / "out", steps=2)
    checks, maps = read_json(tmp_path / "out" / "explain.json"), read_maps(tmp_path / "out")
    assert (checks["input"], checks["resolution_mm"]) == ("rois", None)
    assert checks["completeness"]["gap"] < 1e-4
    assert checks["share_in_no_region"] == 0
    found = checks["truth"]["strength"]
    assert (found["parcel_auroc"], found["p"]) == (1.0, 1 / 20)
    assert "clearly" in found["verdict"]
    table = read_table(tmp_path / "out" / "regions.tsv")
    used = table["strength"] > 0
    assert set(table["region"][used].str[0]) == {"A", "B", "D"}
    assert set(table["region"][~used].str[0]) == {"C", "E", "F"}
    first = table.iloc[0]
    assert np.isclose(maps["strength"], first["strength"], rtol=1e-5).sum() == first["n_voxels"]


def test_checks_are_valid_json(explained: Path):
    text = (explained / "explain.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
