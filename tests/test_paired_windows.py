"""T1w images and connectivity from the scans to a trained Cinp model and its predictions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from neuromamba.anat import run_anat
from neuromamba.baseline_predictions import run_baselines
from neuromamba.batches import Windows, list_runs, make_readers
from neuromamba.bids import run_index
from neuromamba.checkpoint import load_model_info, load_weights
from neuromamba.config import Config
from neuromamba.demo import write_demo
from neuromamba.embed import open_embedder, open_shared, run_embed
from neuromamba.evaluate import run_evaluate
from neuromamba.excluded import run_excluded
from neuromamba.export import run_export
from neuromamba.files import InputError, read_json
from neuromamba.finetune import run_finetune
from neuromamba.identify import run_identify
from neuromamba.keys import Keys
from neuromamba.layout import Layout
from neuromamba.models import Cinp
from neuromamba.new_scans import Asked
from neuromamba.predict import run_predict
from neuromamba.pretrain import list_training, make_network, make_record, run_pretrain
from neuromamba.retrieve import run_retrieve
from neuromamba.rois import run_rois
from neuromamba.splits import read_split, run_splits
from neuromamba.stages import Job, jobs_before
from neuromamba.tables import read_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

torch.set_num_threads(1)
SUBJECTS, WITHOUT = 16, "sub-03"
TRAINING = {"steps": 2, "batch_size": 4, "log_every": 1, "validate_every": 2}


def make_config(folder: Path, **changes) -> Config:
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    demo = {
        "derivatives": str(folder / "data"),
        "participants": {"file": str(folder / "data/participants.tsv"), "site_column": "site"},
        "targets": {"sex": sex},
    }
    small = {"family": "cinp", "width": 8, "feature_size": 12, "window": 4, "network_depth": 1}
    small |= {"network_hidden": 8, "clusters": 4, "mask_patch": 8, "pretrain": TRAINING}
    small |= {"finetune": {**TRAINING, "evaluation_windows": 1}}
    probe = {**small, "base": "m", "finetune": {"mode": "probe", "evaluation_windows": 1}}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {"demo": demo},
            "models": {"m": {**small, **changes}, "probe": {**probe, **changes}},
            "volumes": {"shape": [24, 24, 24], "voxel_size": 8.0, "shard_volumes": 20},
            "rois": {"cube": 48.0},
            "splits": {"test": 0.4, "validation": 0.25},
            "evaluate": {"bootstrap": 50, "inner_folds": 2, "baselines": ["fc"]},
            "compute": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data of subjects, of whom one has no T1w image, up to the split."""
    folder = tmp_path_factory.mktemp("paired")
    write_demo(folder / "data", SUBJECTS, volumes=40, voxel_size=8.0)
    shutil.rmtree(folder / "data" / WITHOUT / "anat")
    config = make_config(folder)
    run_index(config, "demo")
    for stage in (run_volumes, run_tokens, run_rois, run_anat):
        stage(config, "demo", 0)
    run_excluded(config, "demo")
    run_splits(config, "demo")
    return folder


def open_all(folder: Path) -> tuple[Config, Cinp, Windows]:
    config = make_config(folder)
    layout = Layout.of(config, "demo")
    _, runs = list_training(config, "demo", config.models["m"].needs)
    record = make_record(config, "demo", "m", 0, config.models["m"].pretrain, runs)
    network = make_network(config, "m", 0, record["settings"])
    assert isinstance(network, Cinp)
    names = {f"sub-{i + 1:02d}": [f"sub-{i + 1:02d}_task-rest"] for i in range(SUBJECTS)}
    readers = make_readers(network, layout, config.models["m"], config.tokens)
    return config, network, Windows(names, readers)


def test_a_batch_has_the_images_and_networks_of_the_stores(made: Path) -> None:
    config, network, windows = open_all(made)
    layout = Layout.of(config, "demo")
    batch = windows.batch(windows.spaced(3))
    assert batch["subject"] == [f"sub-{i + 1:02d}" for i in range(SUBJECTS)]
    assert batch["has_anat"].tolist() == [name != WITHOUT for name in batch["subject"]]
    assert batch["has_fc"].all()
    assert len(set(batch["person"].tolist())) == SUBJECTS
    image = batch["anat"][0].numpy()
    with xarray.open_zarr(layout.array("anat", "sub-01")) as anat:
        inside, values = anat["mask"].values, anat["t1w"].values
    low, high = np.percentile(values[inside], [0.5, 99.5])
    wanted = np.clip((values[inside] - low) / (high - low), 0, 1)
    assert image[inside] == pytest.approx(wanted, abs=2e-3)
    assert not image[~inside].any()
    assert not batch["anat"][2].any()
    with xarray.open_zarr(layout.array("rois", "sub-01_task-rest")) as rois:
        fc = rois["fc"].values
    present = ~np.isnan(np.diag(fc))
    assert batch["present"][0].tolist() == present.tolist()
    assert batch["fc"][0].numpy() == pytest.approx(
        np.where(np.outer(present, present), fc, 0), abs=1e-4
    )
    assert network.loss(batch)["loss"].isfinite()


def test_who_has_no_image_is_listed_and_the_key_tells_so(made: Path) -> None:
    config = make_config(made)
    everybody = [f"sub-{i + 1:02d}" for i in range(SUBJECTS)]
    runs = list_runs(config, "demo", everybody, config.models["m"].needs).set_index("subject")
    assert len(runs) == SUBJECTS
    without = runs["key"].str.endswith(" no T1w image")
    assert without[without].index.tolist() == [WITHOUT]


def test_a_batch_of_whom_nobody_has_an_image_is_one_too(made: Path) -> None:
    _, network, windows = open_all(made)
    batch = windows.batch(windows.spaced(1, [WITHOUT]))
    assert not batch["has_anat"].any()
    embedding = network.eval().embed(batch)
    assert torch.allclose(embedding, network.embed_pairs(batch).second)


def test_an_image_that_is_gone_takes_its_store_with_it(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    config = make_config(folder)
    shutil.rmtree(folder / "data" / "sub-05" / "anat")
    assert Layout.of(config, "demo").array("anat", "sub-05").exists()
    run_anat(config, "demo", 0)
    assert not Layout.of(config, "demo").array("anat", "sub-05").exists()
    assert Layout.of(config, "demo").array("anat", "sub-06").exists()


def test_pretraining_probing_and_tuning_predict_every_test_subject(made: Path) -> None:
    config = make_config(made)
    run_pretrain(config, "demo", "m", 0)
    layout = Layout.of(config, "demo")
    info = load_model_info(layout.pretrain("m", 0))
    assert info["settings"]["regions"]["n_rois"] > 4
    assert {"inc", "mim", "inm", "top1_image"} < set(info["best"])
    # It has settled: training subjects' projections have mean 0 and SD 1.
    _, network, windows = open_all(made)
    load_weights(network, layout.pretrain("m", 0))
    train = [name for name in read_split(layout.split)["train"] if name != WITHOUT]
    pairs = network.eval().image(windows.batch(windows.spaced(1, train))["anat"])
    known = network.head.standardise[0]
    assert torch.allclose(known.mean, pairs.mean(0), atol=1e-4)
    assert torch.allclose(known.variance, pairs.var(0, correction=0), rtol=0.05)
    run_baselines(config, "demo", "sex")
    for model in ("m", "probe"):
        run_finetune(config, "demo", model, 0, "sex")
        run_evaluate(config, "demo", model, 0, "sex")
        predicted = read_table(layout.evaluate(model, 0, "sex") / "predictions.tsv")
        ours = predicted[predicted["predictor"] == model]
        assert sorted(ours["subject"]) == sorted(read_split(layout.split)["test"])
        assert ours["prob_male"].between(0, 1).all()
    with pytest.raises(InputError, match="take a model that reads windows"):
        run_identify(config, "demo", "m", 0)


def test_people_with_an_image_alone_are_predicted(made: Path, tmp_path: Path, capsys) -> None:
    config = make_config(made)
    layout = Layout.of(config, "demo")
    run_pretrain(config, "demo", "m", 0)
    run_baselines(config, "demo", "sex")
    run_finetune(config, "demo", "m", 0, "sex")
    run_evaluate(config, "demo", "m", 0, "sex")
    rows = read_table(layout.evaluate("m", 0, "sex") / "predictions.tsv")
    expected = (
        rows[rows["predictor"] == "m"]
        .set_index("subject")["prob_male"]
        .drop(WITHOUT, errors="ignore")
    )
    # Copies of the test subjects that have no functional data.
    new = tmp_path / "new"
    for subject in expected.index:
        shutil.copytree(made / "data" / subject / "anat", new / subject / "anat")
    (new / "sub-lost" / "func").mkdir(parents=True)
    model = layout.finetune("m", 0, "sex")
    assert not run_predict(model, [new], tmp_path / "all.tsv", device="cpu")
    table = read_table(tmp_path / "all.tsv").set_index("subject")
    assert set(table.index) == {*expected.index, "sub-lost"}
    assert "there is no T1w image" in table.loc["sub-lost", "reason"]
    found = table.loc[expected.index]
    assert np.allclose(found["uncalibrated_male"], expected, atol=1e-6)
    assert found["uncalibrated_male"].nunique() == len(found)
    assert (found["windows"] == 1).all()
    assert (found["run"] == found.index).all()
    assert f"{len(expected)} predicted, 1 refused" in capsys.readouterr().out
    # A single file, and the folder of one person, give the same as the folder of all.
    one = str(expected.index[0])
    (image,) = (new / one / "anat").glob("*_desc-preproc_T1w.nii.gz")
    for given in (image, new / one):
        assert run_predict(model, [given], tmp_path / "one.tsv", device="cpu")
        (row,) = read_table(tmp_path / "one.tsv").to_dict("records")
        assert row["uncalibrated_male"] == found.loc[one, "uncalibrated_male"]


def test_it_is_shared_with_what_tells_its_regions(made: Path, tmp_path: Path) -> None:
    config = make_config(made)
    run_pretrain(config, "demo", "m", 0)
    run_export(config, "demo", "m", 0, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    regions = load_model_info(Layout.of(config, "demo").pretrain("m", 0))["settings"]["regions"]
    assert f"the regions of `{regions['atlas']}`." in card
    assert "2503.04205" in card
    assert "T1w image" in card
    for name, embedder in (
        ("own", open_embedder(config, "demo", "m", 0)),
        ("shared", open_shared(config, tmp_path / "shared")),
    ):
        run_embed(config, "demo", embedder, "run", tmp_path / f"{name}.tsv")
    own, shared = (read_table(tmp_path / f"{name}.tsv") for name in ("own", "shared"))
    assert own.equals(shared)


def test_what_is_no_image_in_the_models_space_is_refused(made: Path, tmp_path: Path) -> None:
    config = make_config(made)
    layout = Layout.of(config, "demo")
    run_pretrain(config, "demo", "m", 0)
    run_finetune(config, "demo", "m", 0, "sex")
    model, (subject, other) = layout.finetune("m", 0, "sex"), ("sub-01", "sub-02")
    data = made / "data"

    def refusal(given: Path, **asked: Any) -> str:
        output = tmp_path / "table.tsv"
        assert not run_predict(model, [given], output, Asked(**asked), device="cpu")
        (row,) = read_table(output).to_dict("records")
        return str(row["reason"])

    (image,) = (data / subject / "anat").glob("*_desc-preproc_T1w.nii.gz")
    (mask,) = (data / subject / "anat").glob("*_desc-brain_mask.nii.gz")
    (bold,) = (data / other / "func").glob("*_desc-preproc_bold.nii.gz")
    assert "is a series of 40 volumes; a T1w image is 3D" in refusal(bold, mask=mask)
    lonely = tmp_path / image.name
    shutil.copy(image, lonely)
    assert "no brain mask" in refusal(lonely)
    assert run_predict(model, [lonely], None, Asked(mask=mask), device="cpu")
    native = tmp_path / "sub-01_desc-preproc_T1w.nii.gz"
    shutil.copy(image, native)
    assert "its name has no space-" in refusal(native)
    lonely.write_bytes(image.read_bytes()[:-500])
    assert "truncated" in refusal(lonely, mask=mask)
    assert "holds no folder sub-*" in refusal(tmp_path)
    with pytest.raises(InputError, match="of new scans the model reads no regions"):
        run_predict(model, [image], atlas="AAL", device="cpu")
    with pytest.raises(InputError, match="a map in space takes a model that reads one of"):
        run_predict(model, [image], explain=tmp_path / "maps", device="cpu")


def test_images_and_networks_are_retrieved_and_prompted(made: Path) -> None:
    config = make_config(made)
    run_pretrain(config, "demo", "m", 0)
    run_retrieve(config, "demo", "m", 0)
    layout = Layout.of(config, "demo")
    folder, split = layout.retrieve("m", 0), read_split(layout.split)
    facts = read_json(folder / "retrieve.json")
    both = [name for name in split["test"] if name != WITHOUT]
    assert facts["kinds"] == ["image", "network"]
    assert facts["n_pairs"] == len(both)
    ranks = read_table(folder / "ranks.tsv")
    assert sorted(ranks["subject"].unique()) == sorted(both)
    assert ranks["rank"].between(1, len(both)).all()
    table = read_table(folder / "retrieve.tsv").set_index("direction")
    assert list(table.index) == ["image to network", "network to image"]
    for name, row in table.iterrows():
        own = ranks.loc[ranks["direction"] == name, "rank"]
        assert row["recall_1"] == pytest.approx((own == 1).mean())
    with np.load(folder / "embeddings.npz", allow_pickle=False) as found:
        assert found["subject"].tolist() == sorted(n for part in split.values() for n in part)
        lacking = np.isnan(found["image"]).all(axis=1)
        assert found["subject"][lacking].tolist() == [WITHOUT]
        assert np.allclose(np.linalg.norm(found["network"], axis=1), 1, atol=1e-5)
    predicted = read_table(folder / "predictions.tsv")
    told = ["network-prompting", "svm-image", "svm-network", "majority"]
    assert predicted["predictor"].unique().tolist() == told
    assert sorted(predicted["subject"].unique()) == sorted(both)
    metrics = read_table(folder / "metrics.tsv")
    assert set(metrics["target"]) == {"sex"}
    assert {"auroc", "balanced_accuracy"} <= set(metrics["metric"])
    # One subject a class prompts it, of the training part.
    assert facts["references"] == {"sex": {"female": 1, "male": 1}}
    assert b"<svg" in (folder / "retrieve.svg").read_bytes()


def test_only_a_model_of_pairs_can_retrieve(made: Path) -> None:
    settings = make_config(made).model_dump(mode="json")
    settings["models"] = {"plain": {"family": "lmae", "volumes": 20, "patch": 5}}
    with pytest.raises(InputError, match="brings no two kinds of data together"):
        run_retrieve(Config.model_validate(settings), "demo", "plain", 0)


def test_its_jobs_come_after_those_of_images_and_regions(made: Path) -> None:
    config = make_config(made)
    before = {job.stage for job in jobs_before(config, Job("pretrain", "demo", model="m"))}
    assert before == {"splits", "rois", "anat"}
    before = {job.stage for job in jobs_before(config, Job("retrieve", "demo", model="m"))}
    assert before == {"splits", "pretrain", "rois", "anat"}


def test_another_image_of_somebody_of_the_split_is_another_training(
    made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    config = make_config(folder)
    of_trainings = [
        Job("pretrain", "demo", model="m"),
        Job("finetune", "demo", model="m", target="sex"),
        Job("evaluate", "demo", model="m", target="sex"),
        Job("retrieve", "demo", model="m"),
    ]
    baselines = Job("baselines", "demo", target="sex")

    def keys() -> list[str | None]:
        return [Keys(config).key(job) for job in (*of_trainings, baselines)]

    first = keys()
    assert None not in first
    # Somebody who came after the split.
    shutil.copytree(folder / "data" / "sub-05" / "anat", folder / "data" / "sub-99" / "anat")
    assert keys() == first
    (image,) = (folder / "data" / "sub-05" / "anat").glob("*_desc-preproc_T1w.nii.gz")
    (other,) = (folder / "data" / "sub-06" / "anat").glob("*_desc-preproc_T1w.nii.gz")
    shutil.copy(other, image)
    changed = keys()
    assert all(new != old for new, old in zip(changed[:-1], first[:-1], strict=True))
    assert changed[-1] == first[-1]


def test_published_weights_are_told_of(made: Path, tmp_path: Path) -> None:
    _, network, _ = open_all(made)
    own = network.image_encoder.named_parameters()
    tensors = {f"module.{name}": one.detach() + 1 for name, one in own}
    torch.save({"state_dict": tensors}, tmp_path / "weights.pt")
    folder = tmp_path / "copy"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("m"))
    config = make_config(folder, image_weights=str(tmp_path / "weights.pt"))
    run_pretrain(config, "demo", "m", 0)
    info = load_model_info(Layout.of(config, "demo").pretrain("m", 0))
    assert len(info["image_weights"]["loaded"]) == len(tensors)
    assert info["image_weights"]["missing"] == []
    assert "image_weights" in info["inputs"]
    assert "image_weights" not in info["settings"]["model"]
    gone = make_config(folder, image_weights=str(tmp_path / "none.pt"))
    with pytest.raises(InputError, match=r"none\.pt does not exist; set image_weights"):
        run_pretrain(gone, "demo", "m", 1)


def test_states_are_not_told_by_whole_runs(made: Path) -> None:
    settings = make_config(made).model_dump(mode="json")
    state = {"kind": "state", "classes": {"rest": "rest", "task": "task"}}
    settings["datasets"]["demo"]["targets"] = {"task": state}
    with pytest.raises(ValueError, match="reads whole runs, and dataset demo has the state 'task'"):
        Config.model_validate(settings)
    del settings["datasets"]["demo"]["targets"]
    settings["datasets"]["demo"]["series"] = {}
    with pytest.raises(ValueError, match="needs anat, which are made of images"):
        Config.model_validate(settings)
