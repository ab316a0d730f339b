"""Windows of ROI series, and a training on them from the stores to predictions."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import roi_stores
import torch
from roi_stores import N_ROIS, make_atlas, make_config, write_dataset, write_store

from neuromamba.batches import Windows
from neuromamba.config import Config, Lmae, RoiTransformer
from neuromamba.embed import open_embedder, run_embed
from neuromamba.excerpts import read_series
from neuromamba.expert_maps import observe_experts, tabulate_experts
from neuromamba.explain import run_explain
from neuromamba.explainer import open_windows
from neuromamba.export import run_export
from neuromamba.files import InputError, digest_file, read_json
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.layout import Layout
from neuromamba.new_scans import Asked
from neuromamba.predict import run_predict
from neuromamba.predictor import open_predictor
from neuromamba.pretrain import regions_of, run_pretrain
from neuromamba.pretrained import from_pretrained
from neuromamba.report_brain import describe_experts
from neuromamba.roi_windows import RoiWindows
from neuromamba.tables import read_table

torch.set_num_threads(1)


def waves(seconds: float, count: int) -> np.ndarray:
    """Slow waves in (time, 3) at a repetition time; the third ROI is missing."""
    t = np.arange(count) * seconds
    series = np.stack([np.sin(t / 8), 3 + np.cos(t / 12), np.full(count, np.nan)], axis=1)
    return 50 + 4 * series


def reader(folder: Path, n_rois: int = 3, **settings: object) -> RoiWindows:
    known = {"family": "lmae", "volumes": 20, "patch": 5, **settings}
    model = Lmae.model_validate(known)
    return RoiWindows(lambda run: folder / f"{run}.zarr", model, 2, n_rois)


def test_a_window_is_in_z_units_of_the_run_and_gaps_are_told(tmp_path: Path):
    series = waves(2.0, 51)
    write_store(tmp_path / "one.zarr", series)
    found = reader(tmp_path)
    assert found.positions("one") == (51 - 20) // 2 + 1
    sample = found.read("one", 3)
    whole = (series[:, :2] - series[:, :2].mean(0)) / series[:, :2].std(0)
    assert sample["rois"].dtype == np.float32
    assert sample["rois"][:, :2] == pytest.approx(whole[6:26], abs=1e-5)
    assert (sample["rois"][:, 2] == 0).all()
    assert sample["present"].tolist() == [True, True, False]
    batch = found.collate([sample, found.read("one", 0)])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "rois": (2, 20, 3),
        "present": (2, 3),
        "repetition_time": (2,),
    }
    assert batch["repetition_time"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("seconds", [1.25, 3.0])
def test_runs_of_any_repetition_time_give_the_same_windows(tmp_path: Path, seconds: float):
    count = int(200 / seconds) + 1
    write_store(tmp_path / "slow.zarr", waves(seconds, count), seconds)
    write_store(tmp_path / "usual.zarr", waves(2.0, 101))
    found = reader(tmp_path)
    other, usual = (found.read(run, 8) for run in ("slow", "usual"))
    assert float(other["repetition_time"]) == 2.0
    # Their means over the run differ a little, because one ends a little earlier.
    assert other["rois"] == pytest.approx(usual["rois"], abs=0.05)
    assert abs(other["rois"] - usual["rois"]).max() > 0
    as_scanned = reader(tmp_path, repetition_time=None)
    assert float(as_scanned.read("slow", 0)["repetition_time"]) == seconds


def test_what_does_not_fit_is_refused_with_a_reason(tmp_path: Path):
    write_store(tmp_path / "short.zarr", waves(2.0, 19))
    with pytest.raises(InputError, match=r"short has 19 volumes .* a window takes 20"):
        reader(tmp_path).positions("short")
    with pytest.raises(InputError, match="3 ROIs, where the model reads 4"):
        reader(tmp_path, n_rois=4).positions("short")
    write_store(tmp_path / "slow.zarr", waves(5.0, 60), 5.0)
    with pytest.raises(InputError, match=r"5 s cannot be brought .* choose at least 2\.5 s"):
        reader(tmp_path).positions("slow")
    with pytest.raises(InputError, match="not a readable ROI store"):
        reader(tmp_path).positions("absent")


@pytest.fixture(scope="module", params=["lmae", "roi_transformer"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp(request.param)
    write_dataset(folder)
    config = make_config(folder, family=request.param)
    run_pretrain(config, "fake", "series", 0)
    run_finetune(config, "fake", "series", 0, "sex")
    return config


def test_a_model_of_series_learns_what_they_show(trained: Config):
    test = [f"sub-{number:02d}" for number in range(31, 41)]
    found = predict_subjects(trained, "fake", "series", 0, "sex", test)
    male = np.array([int(name[4:]) % 2 == 0 for name in test])
    right = (found["prob_male"].to_numpy() > 0.5) == male
    assert right.mean() >= 0.9
    info = read_json(Layout.of(trained, "fake").finetune("series", 0, "sex") / "model.json")
    atlas = digest_file(trained.datasets["fake"].atlas)
    regions = {"atlas": "twelve", "atlas_sha256": atlas, "n_rois": N_ROIS}
    assert info["settings"]["regions"] == regions
    assert info["files"].keys() >= {"calibration.json"}


@pytest.mark.parametrize("mode", ["probe", "head", "adapters"])
def test_parts_of_it_are_fine_tuned_too(trained: Config, tmp_path: Path, mode: str):
    """From the same pretraining; how well they do depends on how much of it is left as it is."""
    shutil.copytree(trained.results, tmp_path / "results", symlinks=True)
    known = trained.model_dump(mode="json", exclude_unset=True)
    known |= {"results": str(tmp_path / "results")}
    known["models"]["series"]["finetune"] |= {"mode": mode}
    config = Config.model_validate(known)
    folder = Layout.of(config, "fake").finetune("series", 0, "sex")
    shutil.rmtree(folder)
    run_finetune(config, "fake", "series", 0, "sex")
    info = read_json(folder / "model.json")
    assert info["settings"]["finetune"]["mode"] == mode
    assert 0 < info["trained_parameters"] < info["parameters"]
    test = [f"sub-{number:02d}" for number in range(31, 41)]
    found = predict_subjects(config, "fake", "series", 0, "sex", test)
    male = np.array([int(name[4:]) % 2 == 0 for name in test])
    assert ((found["prob_male"].to_numpy() > 0.5) == male).mean() >= 0.7


def test_it_is_opened_embedded_and_shared_like_any_other(trained: Config, tmp_path: Path):
    folder = Layout.of(trained, "fake").finetune("series", 0, "sex")
    assert open_predictor(folder, "cpu").network.n_rois == N_ROIS
    embedder = open_embedder(trained, "fake", "series", 0)
    run_embed(trained, "fake", embedder, "subject", tmp_path / "all.tsv", count=2)
    table = read_table(tmp_path / "all.tsv")
    assert len(table) == roi_stores.TRAIN + roi_stores.VALIDATION + roi_stores.TEST
    run_export(trained, "fake", "series", 0, tmp_path / "shared")
    shared = from_pretrained(tmp_path / "shared")
    assert shared.regions is not None
    assert shared.regions["n_rois"] == N_ROIS
    for name, value in shared.network.state_dict().items():
        assert torch.equal(value, embedder.network.state_dict()[name])
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "series of 12 regions" in card
    assert "tokens" not in card


def test_its_experts_are_mapped_beside_its_attributions(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    subjects = ["sub-31", "sub-32", "sub-33"]
    folder = tmp_path / "maps"
    if isinstance(trained.models["series"], RoiTransformer):
        predictor = open_predictor(Layout.of(trained, "fake").finetune("series", 0, "sex"), "cpu")
        windows = open_windows(trained, "fake", predictor, subjects)
        assert observe_experts(predictor.network.backbone, windows, 1, 4) is None
        return
    drawn: list[list[str]] = []  # the pictures themselves are looked at in other tests
    for module in ("explain", "expert_maps"):
        monkeypatch.setattr(
            f"neuromamba.{module}.draw_maps", lambda path, maps, *rest: drawn.append([*maps])
        )
    run_explain(trained, "fake", "series", 0, "sex", folder, subjects, steps=2, windows=1)
    assert read_json(folder / "explain.json")["input"] == "rois"
    table = read_table(folder / "experts.tsv")
    assert len(table) == N_ROIS * 2
    assert table.groupby("region")["weight"].sum().to_numpy() == pytest.approx(1, abs=1e-5)
    assert (table["n"] == 3).all()
    assert (table["weight_low"] <= table["weight"]).all()
    assert table.groupby("expert")["excess"].mean().to_numpy() == pytest.approx(0, abs=1e-5)
    image = nibabel.load(folder / "experts.nii.gz")
    assert image.shape[3] == 2
    volumes = image.get_fdata()
    painted = volumes[volumes.sum(3) > 0]
    assert len(painted) > 1000
    assert painted.sum(1) == pytest.approx(1, abs=1e-4)
    assert {row["expert"] for row in describe_experts(folder)} == {"1", "2"}
    assert [text.split(":")[0] for text in drawn[0]] == ["expert 1", "expert 2"]


def test_weights_of_experts_leave_out_what_a_subject_lacks(tmp_path: Path):
    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def experts(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            share = batch["rois"].sigmoid() * batch["present"][:, None]
            rest = (1 - batch["rois"].sigmoid()) * batch["present"][:, None]
            return {"weights": torch.stack([share, rest], -1)}

    write_store(tmp_path / "one.zarr", waves(2.0, 61))
    write_store(tmp_path / "two.zarr", np.nan_to_num(waves(2.0, 61)[:, ::-1], nan=np.nan))
    windows = Windows({"a": ["one"], "b": ["two"]}, [reader(tmp_path)])
    found = observe_experts(Mixture(), windows, 2, 1)
    assert found is not None
    assert np.isnan(found.mean[..., 0]).tolist() == [[False, False, True], [True, False, False]]
    batch = windows.batch(windows.spaced(2, ["a"]))
    expected = batch["rois"].double().sigmoid()
    assert found.mean[0, :2, 0] == pytest.approx(expected.mean((0, 1))[:2].numpy(), abs=1e-6)
    spread = expected.std(1, correction=0).mean(0)
    assert found.over_time[0, :2, 1] == pytest.approx(spread[:2].numpy(), abs=1e-6)
    table = tabulate_experts(["left", "middle", "right"], found, 0)
    assert dict(table.groupby("region")["n"].first()) == {"left": 1, "middle": 2, "right": 1}


def test_a_new_scan_is_read_by_the_atlas_of_the_model(trained: Config, tmp_path: Path):
    folder = Layout.of(trained, "fake").finetune("series", 0, "sex")
    rois = Layout.of(trained, "fake").array("rois", "sub-31_task-rest")
    atlas, own = make_atlas(), read_series(rois)
    labels = np.asarray(atlas.dataobj)
    painted = np.where(labels[..., None] > 0, own.T[np.maximum(labels, 1) - 1], 0)
    scan, mask = tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz"
    image = nibabel.Nifti1Image(painted.astype(np.float32), atlas.affine)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, scan)
    nibabel.save(nibabel.Nifti1Image((labels > 0).astype(np.uint8), atlas.affine), mask)
    asked = Asked(mask=mask, space="MNI152NLin2009cAsym", repetition_time=2.0)
    file = trained.datasets["fake"].atlas
    with pytest.raises(InputError, match="name that atlas by --atlas"):
        run_predict(folder, [scan], None, asked)
    nibabel.save(nibabel.Nifti1Image(labels[::-1].copy(), atlas.affine), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="this is another file"):
        run_predict(folder, [scan], None, asked, atlas=str(tmp_path / "a.nii.gz"))
    assert run_predict(folder, [scan], tmp_path / "out.tsv", asked, device="cpu", atlas=file)
    found = read_table(tmp_path / "out.tsv").iloc[0]
    known = predict_subjects(trained, "fake", "series", 0, "sex", ["sub-31"]).iloc[0]
    # Interpolation to the common grid mixes neighbouring regions of an atlas as coarse as this one.
    assert found["prob_male"] == pytest.approx(known["prob_male"], abs=0.3)
    assert found["prediction"] == ("male" if known["prob_male"] > 0.5 else "female")


def test_a_mixture_is_of_one_atlas(tmp_path: Path):
    series = np.random.default_rng(0).normal(size=(30, 3))
    layout, model = Layout(tmp_path, "both"), Lmae(family="lmae")
    for name, atlas in (("one", "a"), ("two", "a"), ("three", "b")):
        write_store(layout.array("rois", f"{name}/run"), series, atlas=atlas * 64)
    found = regions_of(layout, model, ["one/run", "two/run"])
    assert found == {"atlas": "twelve", "atlas_sha256": "a" * 64, "n_rois": 3}
    with pytest.raises(InputError, match=r"dataset one has series .* give both the same"):
        regions_of(layout, model, ["one/run", "three/run"])


def test_series_of_another_atlas_are_refused(tmp_path: Path):
    write_dataset(tmp_path)
    config = make_config(tmp_path)
    run_pretrain(config, "fake", "series", 0)
    layout = Layout.of(config, "fake")
    rng = np.random.default_rng(0)
    for path in sorted((layout.root / "rois").glob("*.zarr")):
        write_store(path, rng.normal(size=(70, N_ROIS)), atlas="b" * 64)
    with pytest.raises(InputError, match="regions"):
        run_finetune(config, "fake", "series", 0, "sex")
    embedder = open_embedder(config, "fake", "series", 0)
    with pytest.raises(InputError, match="its regions are those of twelve"):
        run_embed(config, "fake", embedder, "run", tmp_path / "runs.tsv")
