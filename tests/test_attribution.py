"""Attribution of what a model says to what it reads, and the checks of maps."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import scipy.stats
import torch
from fake_models import Reader
from sklearn.metrics import roc_auc_score
from torch import nn

from neuromamba.attribution import attribute, explained_output, integrated_gradients
from neuromamba.attribution_checks import (
    compare_maps,
    judge_baseline,
    judge_completeness,
    judge_recovery,
    read_truth,
    score_recovery,
    shuffled,
    similarity,
)
from neuromamba.attribution_maps import MEANING, GroupMap, SubjectMap, Summed, map_name, write_map
from neuromamba.attribution_maskers import (
    RegionMasker,
    TokenMasker,
    VolumeMasker,
    choose_masker,
    place_tokens,
    sum_over_time,
)
from neuromamba.attribution_regions import Regions
from neuromamba.config import Compute, NeuroMamba, Tokens, Volumes
from neuromamba.demo_brain import NETWORKS, load_brain
from neuromamba.files import InputError
from neuromamba.heads import ClassHead, HeadedModel, NumberHead
from neuromamba.models import build_model
from neuromamba.parcellation import Parcellation
from neuromamba.resample import target_affine
from neuromamba.tokens import index_patches

N_TIME, VALUES, PATCHES = 3, 16, 5
GRID = Volumes(shape=(4, 4, 4), voxel_size=2.0)


class Weighted(nn.Module):
    """Adds up a window's values by weights (feature, patch, value), bent by `power`."""

    needs = ("tokens",)

    def __init__(self, weight: torch.Tensor, power: int = 1) -> None:
        super().__init__()
        self.weight, self.power, self.width = nn.Parameter(weight), power, len(weight)

    def embed(self, batch):
        windows = batch["tokens"].unflatten(0, (len(batch["run"]), -1))
        return torch.einsum("bntv,fnv->bf", windows**self.power, self.weight)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_batch(windows: int = 2, seed: int = 1) -> dict:
    rows = windows * PATCHES
    return {
        "tokens": normal(rows, N_TIME, VALUES, seed=seed),
        "mean": normal(rows, VALUES, seed=seed + 1),
        "centers": torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed)),
        "patches": torch.full((windows,), PATCHES),
        "run": [f"sub-{k}_task-rest" for k in range(windows)],
    }


def headed(backbone: nn.Module, task: ClassHead | NumberHead | None = None) -> HeadedModel:
    network = HeadedModel(backbone, task or ClassHead([1.0, 1.0]), 0.0, frozen=True)
    for k, parameter in enumerate(network.head.parameters()):
        parameter.data = normal(*parameter.shape, seed=50 + k)
    return network.eval()


def neuromamba(order: str = "t-fastest") -> HeadedModel:
    settings = NeuroMamba(
        family="neuromamba", width=16, depth=2, state=8, head_dim=8, volumes=6, order=order
    )
    torch.manual_seed(3)
    backbone = build_model(settings, VALUES, Compute(device="cpu"))
    backbone.pool.weight.data = normal(*backbone.pool.weight.shape, seed=4)
    return headed(backbone)


# --- Integrated gradients -------------------------------------------------------------------------


def test_a_linear_model_has_gradient_times_change():
    weight, x, base = (normal(4, 6, seed=k).double() for k in range(3))

    def output(batch):
        return (batch["x"] * weight).sum(1)

    found = integrated_gradients(output, {"x": x}, {"x": base}, steps=1)
    torch.testing.assert_close(found["x"], weight * (x - base), rtol=1e-12, atol=1e-14)


def test_a_power_is_integrated_exactly_by_few_steps():
    x, base = normal(4, 6).double(), normal(4, 6, seed=1).double()
    for power, steps in ((3, 2), (7, 4)):
        found = integrated_gradients(
            lambda batch, power=power: (batch["x"] ** power).sum(1), {"x": x}, {"x": base}, steps
        )
        torch.testing.assert_close(found["x"], x**power - base**power, rtol=1e-9, atol=1e-12)


def test_several_inputs_share_the_change():
    batch = {"a": normal(2, 3).double(), "b": normal(2, 4, seed=1).double()}
    zero = {name: torch.zeros_like(value) for name, value in batch.items()}
    found = integrated_gradients(lambda at: at["a"].sum(1) * at["b"].sum(1), batch, zero, steps=2)
    total = found["a"].sum(1) + found["b"].sum(1)
    torch.testing.assert_close(total, batch["a"].sum(1) * batch["b"].sum(1))


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
def test_attributions_of_the_model_are_complete(order: str):
    network, batch = neuromamba(order), make_batch()
    gaps = []
    for steps in (2, 32):
        found = attribute(network, batch, 1, steps)
        gaps.append((found.total - found.change).abs() / found.change.abs())
    assert (gaps[1] < 0.01).all()
    assert gaps[1].max() < gaps[0].max()


def test_a_window_is_attributed_the_same_alone_and_among_others():
    network, batch = neuromamba(), make_batch(windows=3)
    among = attribute(network, batch, 1, steps=8)
    rows = slice(PATCHES, 2 * PATCHES)
    alone = {name: value[rows] for name, value in batch.items() if name in ("tokens", "centers")}
    alone |= {"mean": batch["mean"][rows], "patches": batch["patches"][1:2], "run": ["one"]}
    found = attribute(network, alone, 1, steps=8)
    torch.testing.assert_close(
        found.values["tokens"], among.values["tokens"][rows], rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(found.total, among.total[1:2], rtol=1e-4, atol=1e-6)


def test_a_patch_that_is_not_read_gets_nothing():
    weight = torch.zeros(2, PATCHES, VALUES)
    weight[:, 3] = normal(2, VALUES)
    found = attribute(headed(Weighted(weight, power=2)), make_batch(), 1, steps=4)
    each = found.values["tokens"].abs().sum((1, 2)).unflatten(0, (2, PATCHES))
    assert (each[:, [0, 1, 2, 4]] == 0).all()
    assert (each[:, 3] > 0).all()


def test_the_baseline_is_the_mean_of_each_voxel():
    batch = make_batch()
    batch["tokens"] = batch["mean"][:, None].repeat(1, N_TIME, 1)
    batch["tokens"][2, 1, 7] += 1.0
    found = attribute(headed(Weighted(normal(2, PATCHES, VALUES))), batch, 1, steps=2)
    assert found.values["tokens"].nonzero().tolist() == [[2, 1, 7]]


def test_classes_are_explained_against_the_others():
    batch, backbone = make_batch(), Weighted(0.02 * normal(4, PATCHES, VALUES))
    two, three = headed(backbone), headed(backbone, ClassHead([1.0, 1.0, 1.0]))
    odds = torch.logit(two.predict_features(two.features(batch))[:, 1].double()).float()
    torch.testing.assert_close(explained_output(two, batch, 1), odds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(explained_output(two, batch, 0), -explained_output(two, batch, 1))
    logits = three.head(three.features(batch))
    expected = logits[:, 0] - (logits[:, 1] + logits[:, 2]) / 2
    torch.testing.assert_close(explained_output(three, batch, 0), expected)


def test_numbers_are_explained_in_their_own_units():
    batch, backbone = make_batch(), Weighted(normal(4, PATCHES, VALUES))
    years, z = headed(backbone, NumberHead(50.0, 12.0)), headed(backbone, NumberHead(0.0, 1.0))
    predicted = years.predict_features(years.features(batch))[:, 0]
    torch.testing.assert_close(explained_output(years, batch, -1), predicted)
    found, of_z = (attribute(network, batch, -1, steps=1) for network in (years, z))
    expected = 12 * of_z.values["tokens"]
    torch.testing.assert_close(found.values["tokens"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.total, found.change, rtol=1e-3, atol=1e-3)


def test_models_that_cannot_be_explained_say_so():
    class Blind(Weighted):
        def embed(self, batch):
            return super().embed(batch).detach()

    network = headed(Blind(normal(2, PATCHES, VALUES))).requires_grad_(False)
    with pytest.raises(InputError, match="passes no gradient to tokens"):
        attribute(network, make_batch(), 1, steps=2)
    batch = make_batch()
    batch["tokens"][0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"sub-0_task-rest.*not finite"):
        attribute(headed(Weighted(normal(2, PATCHES, VALUES))), batch, 1, steps=2)


# --- Maps -----------------------------------------------------------------------------------------


def test_tokens_return_to_their_place():
    mask = np.random.default_rng(0).random((6, 4, 8)) > 0.5
    volume = np.random.default_rng(1).random(mask.shape)
    index = index_patches(mask, 2, 0.5)
    values = volume.ravel()[index.voxels]
    placed = place_tokens(values, index.grid_index, 2, index.patch_grid)
    kept = np.zeros(mask.shape, dtype=bool)
    kept.ravel()[index.voxels] = True
    assert not kept.all()
    np.testing.assert_array_equal(placed, np.where(kept, volume, 0).T)


def test_time_is_summed_within_and_over_windows():
    windows, voxels = 2, VALUES // 2
    values = normal(windows * PATCHES, N_TIME, VALUES).double()
    frames = values.numpy().reshape(windows, PATCHES, N_TIME, 2, voxels)
    expected = sum(frames[w, :, t, f] for w in range(2) for t in range(N_TIME) for f in range(2))
    np.testing.assert_allclose(sum_over_time(values, windows, voxels), expected)


def subject_maps(count: int, shape: tuple[int, int, int] = (4, 4, 4)) -> list[SubjectMap]:
    rng = np.random.default_rng(2)
    brain = np.ones(shape, dtype=bool)
    brain[0] = False
    signed = [0.5 + rng.standard_normal(shape, dtype=np.float32) for _ in range(count)]
    return [
        SubjectMap(f"sub-{k}", np.abs(one), one, brain, [1.0], [1.0])
        for k, one in enumerate(signed)
    ]


def test_group_maps_are_means_with_intervals_over_subjects():
    maps, group = subject_maps(6), GroupMap((4, 4, 4))
    for one in maps:
        group.add(one)
    found, signed = group.volumes(), np.stack([one.signed for one in maps]).astype(float)
    np.testing.assert_allclose(found["signed"], signed.mean(0), rtol=1e-5, atol=1e-6)
    test = scipy.stats.ttest_1samp(signed, 0, axis=0)
    np.testing.assert_allclose(found["signed_t"], test.statistic, rtol=1e-4)
    interval = test.confidence_interval(0.95)
    np.testing.assert_allclose(found["signed_low"], interval.low, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["signed_high"], interval.high, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(group.brain, maps[0].brain)
    alike = (np.sign(signed) == np.sign(signed.mean(0))).mean(0)
    np.testing.assert_allclose(found["signed_agreement"], alike)
    assert alike.min() < 0.6
    assert alike.max() == 1


def test_what_tells_people_apart_sums_to_one():
    rng, group = np.random.default_rng(4), GroupMap((4, 4, 4))
    brain = np.ones((4, 4, 4), dtype=bool)
    common = 50 * rng.standard_normal((4, 4, 4))
    own = np.zeros((7, 4, 4, 4))
    own[:, 2, 1] = rng.standard_normal((7, 1))
    signed = common + own
    for k, one in enumerate(signed.astype(np.float32)):
        group.add(SubjectMap(f"sub-{k}", np.abs(one), one, brain, [0.0], [0.0]))
    between = group.maps()["between"]
    assert between.sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(between[2, 1], 0.25, atol=1e-3)
    assert np.abs(np.delete(between, 2, axis=0)).max() < 1e-3
    same = GroupMap((4, 4, 4))
    for _ in range(3):
        same.add(SubjectMap("sub-0", np.abs(one), one, brain, [0.0], [0.0]))
    assert "between" not in same.maps()


def test_one_subject_has_no_interval():
    group = GroupMap((4, 4, 4))
    group.add(subject_maps(1)[0])
    assert list(group.volumes()) == ["strength", "signed"]


def test_maps_are_nifti_in_mni_space(tmp_path: Path):
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = [90, -126, -72]
    values = np.arange(24.0).reshape(2, 3, 4)
    write_map(tmp_path / "map.nii.gz", {"a": values, "between": -values}, affine, {"space": "MNI"})
    image = nibabel.load(tmp_path / "map.nii.gz")
    assert image.shape == (2, 3, 4, 2)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 4)
    np.testing.assert_allclose(image.affine, affine)
    np.testing.assert_array_equal(image.get_fdata()[..., 1], -values)
    about = json.loads((tmp_path / "map.json").read_text())
    assert about.pop("meaning") == {"between": MEANING["between"]}
    assert about == {"volumes": ["a", "between"], "space": "MNI"}


def three_regions() -> Parcellation:
    """Regions on `GRID`: its first plane along x, and two halves of the two planes after it."""
    index = np.full((4, 4, 4), -1, dtype=np.int32)
    index[0], index[1:3, :2], index[1:3, 2:] = 0, 1, 2
    return Parcellation("three", None, ["edge", "left", "right"], index, target_affine(GRID))


def test_a_figure_of_patches_shows_their_means_over_the_brain():
    masker = TokenMasker(GRID, Tokens(patch=2))
    rng = np.random.default_rng(3)
    values, brain = rng.standard_normal((4, 4, 4)), rng.random((4, 4, 4)) > 0.3
    coarse = masker.coarsen(values, brain)
    patch = (slice(2, 4), slice(0, 2), slice(2, 4))
    expected = np.where(brain[patch], values[patch][brain[patch]].mean(), 0)
    np.testing.assert_allclose(coarse[patch], expected)
    assert 0 < brain[patch].sum() < 8
    assert coarse.sum() == pytest.approx(values[brain].sum())


def test_maps_have_names_of_bids_derivatives():
    name = map_name("sub-01_task-rest", "MNI152NLin6Asym")
    assert name == "sub-01_task-rest_space-MNI152NLin6Asym_desc-attribution_statmap.nii.gz"


# --- Models that read other things than tokens ----------------------------------------------------


def explain_windows(network: HeadedModel, masker, series: torch.Tensor) -> SubjectMap:
    """The map of windows (window, time, ...) of one run, seen two at a time."""
    summed = Summed(masker)
    for part in series.split(2):
        batch = {masker.need: part, "run": ["sub-1_task-rest"] * len(part)}
        summed.add(attribute(network, batch, 1, steps=4), batch)
    return summed.map("sub-1")


def test_a_model_of_regions_has_a_table_and_a_painted_map():
    atlas = three_regions()
    masker = choose_masker(("rois",), GRID, Tokens(patch=2), atlas)
    weight = torch.zeros(2, 1, 3)
    weight[:, 0, 2] = 1.0
    network = headed(Reader("rois", weight, power=2))
    series = 5 + normal(3, N_TIME, 3, seed=7)
    series[..., 0] = 5.0  # a region without a signal
    one = explain_windows(network, masker, series)
    assert one.signed.shape == (3,)
    assert one.brain.tolist() == [False, True, True]
    assert one.strength[:2].tolist() == [0, 0]
    assert one.signed.sum() == pytest.approx(np.mean(one.change), rel=1e-3)
    regions = Regions(atlas, masker)
    regions.add(one)
    table = regions.table(one.brain, None, seed=0).set_index("region")
    assert table["strength"].to_dict() == {"right": one.strength[2], "left": 0}
    assert table["n_voxels"].tolist() == [16, 16]
    assert table.loc["right", "share"] == pytest.approx(1)
    painted = masker.paint(one.signed)
    np.testing.assert_array_equal(painted[1:3, 2:], one.signed[2])
    assert np.count_nonzero(painted) == 16
    with pytest.raises(InputError, match="reads 4 regions, and three has 3"):
        explain_windows(headed(Reader("rois", normal(2, 1, 4))), masker, normal(2, N_TIME, 4))


def test_a_model_of_volumes_has_a_map_of_voxels():
    masker = choose_masker(("volumes", "fc"), GRID, Tokens(patch=2), None)
    weight = torch.zeros(2, 1, 4, 4, 4)
    weight[:, 0, 1, 2, 3] = 1.0
    series = normal(3, N_TIME, 4, 4, 4, seed=8)
    series[:, :, 0] = 0.0  # no brain
    one = explain_windows(headed(Reader("volumes", weight, power=3)), masker, series)
    assert np.argwhere(one.strength).tolist() == [[1, 2, 3]]
    assert not one.brain[0].any()
    assert one.brain[1:].all()
    assert one.signed.sum() == pytest.approx(np.mean(one.change), rel=1e-3)
    assert masker.paint(one.signed) is one.signed
    with pytest.raises(InputError, match=r"volumes of \(5, 4, 4\) voxels"):
        explain_windows(
            headed(Reader("volumes", normal(2, 1, 5, 4, 4))), masker, normal(2, N_TIME, 5, 4, 4)
        )


def test_a_series_is_explained_from_its_own_mean():
    series = normal(2, N_TIME, 3).cumsum(1)
    batch = {"rois": series, "run": ["one"] * 2}
    network = headed(Reader("rois", torch.ones(2, N_TIME, 3), power=1))
    found = attribute(network, batch, 1, steps=1)
    # A sum over time is that of the mean: nothing is left, and each value has its own difference.
    torch.testing.assert_close(found.change, torch.zeros(2).double(), rtol=0, atol=1e-4)
    slope = found.values["rois"] / (series - series.mean(1, keepdim=True))
    torch.testing.assert_close(slope, slope[:1, :1, :1].expand_as(slope), rtol=1e-3, atol=1e-3)


def test_a_map_takes_one_input_with_a_place():
    for needs in (("fc",), ("anat", "fc"), ("tokens", "rois")):
        with pytest.raises(InputError, match=f"reads {', '.join(needs)}: a map in space takes"):
            choose_masker(needs, GRID, Tokens(patch=2), three_regions())
    with pytest.raises(InputError, match="no atlas is known"):
        choose_masker(("rois",), GRID, Tokens(patch=2), None)
    assert isinstance(
        choose_masker(("rois",), GRID, Tokens(patch=2), three_regions()), RegionMasker
    )


def test_regions_share_the_strength():
    regions, maps = Regions(three_regions(), VolumeMasker(GRID)), subject_maps(5)
    for one in maps:
        one.strength[1:3, 2:] += 3
        regions.add(one)
    between = np.full((4, 4, 4), 1 / 64)
    table = regions.table(maps[0].brain, between, seed=0)
    # The first has no voxel in the brain.
    assert table["region"].tolist() == ["right", "left"]
    assert table["n_voxels"].tolist() == [16, 16]
    strength = np.stack([one.strength for one in maps]).astype(float)
    row = table.iloc[0]
    assert row["strength"] == pytest.approx(strength[:, 1:3, 2:].mean())
    assert row["strength_low"] < row["strength"] < row["strength_high"]
    whole = strength.sum()
    assert row["share"] == pytest.approx(strength[:, 1:3, 2:].sum() / whole)
    assert regions.outside == pytest.approx(strength[:, 3].sum() / whole)
    assert table["between"].tolist() == [0.25, 0.25]
    again = regions.table(maps[0].brain, between, seed=0)
    assert again.equals(table)


def test_a_map_that_is_the_same_everywhere_is_so_by_region_however_brains_end():
    regions, group = Regions(three_regions(), VolumeMasker(GRID)), GroupMap((4, 4, 4))
    rng = np.random.default_rng(5)
    for k in range(5):
        brain = np.ones((4, 4, 4), dtype=bool)
        brain[0] = rng.random((4, 4)) > 0.5  # the region at the edge
        one = brain.astype(np.float32)
        for adder in (regions, group):
            adder.add(SubjectMap(f"sub-{k}", one, one, brain, [1.0], [1.0]))
    table = regions.table(group.brain, None, seed=0).set_index("region")
    assert 0 < table.loc["edge", "n_voxels"] < 16
    for name in ("strength", "strength_low", "strength_high"):
        assert table[name].to_dict() == {"edge": 1.0, "left": 1.0, "right": 1.0}


# --- Checks ---------------------------------------------------------------------------------------


def test_shuffling_keeps_the_values_of_each_tensor_and_the_network():
    network = neuromamba()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    head, every = shuffled(network, network.head, 0), shuffled(network, None, 0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for name, value in every.named_parameters():
        torch.testing.assert_close(value.flatten().sort()[0], before[name].flatten().sort()[0])
        if not name.startswith("head."):
            torch.testing.assert_close(dict(head.named_parameters())[name], before[name])
    assert not torch.equal(head.head[1].weight, before["head.1.weight"])
    moved = [name for name, v in every.named_parameters() if not torch.equal(v, before[name])]
    assert any(name.startswith("backbone.blocks") for name in moved)
    again = shuffled(network, None, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(every.parameters(), again.parameters(), strict=True)
    )


def map_of(network: HeadedModel) -> dict[str, np.ndarray]:
    values = attribute(network, make_batch(windows=1), 1, steps=4).values["tokens"]
    return {"strength": values.abs().sum(1).numpy(), "signed": values.sum(1).numpy()}


def test_a_map_of_what_was_learnt_is_told_from_one_that_shows_the_input():
    brain = np.ones((PATCHES, VALUES), dtype=bool)
    planted = torch.zeros(1, PATCHES, VALUES)
    planted[:, 2] = 1.0
    planted += 0.01 * normal(1, PATCHES, VALUES)
    blind = torch.ones(1, PATCHES, VALUES)
    verdicts = {}
    for name, weight in (("planted", planted), ("blind", blind)):
        network = headed(Weighted(weight, power=2))
        other = shuffled(network, None, 1)
        found = compare_maps(map_of(network), map_of(other), brain, "weights")
        verdicts[name] = found["strength"]
    assert verdicts["planted"]["spearman"] < 0.7
    assert "hardly" not in verdicts["planted"]["verdict"]
    assert verdicts["blind"]["spearman"] == pytest.approx(1)
    assert "hardly depends on what the model has learnt" in verdicts["blind"]["verdict"]


def test_maps_are_alike_in_either_direction_and_constant_ones_are_not_compared():
    brain = np.ones((3, 3), dtype=bool)
    brain[0, 0] = False
    one = np.arange(9.0).reshape(3, 3)
    assert similarity(one, np.exp(one), brain) == pytest.approx(1)
    found = compare_maps({"signed": one}, {"signed": -one}, brain, "labels")["signed"]
    assert found["spearman"] == pytest.approx(-1)
    assert "hardly depends on the labels it learnt by" in found["verdict"]
    found = compare_maps({"signed": one}, {"signed": -one}, brain, "seed")["signed"]
    assert "hardly repeated" in found["verdict"]
    assert similarity(one, np.where(brain, 1.0, 5.0), brain) is None


def test_missing_completeness_is_told():
    assert "raise" not in judge_completeness([1.0, -1.0], [1.01, -1.0])["verdict"]
    coarse = judge_completeness([1.0, -1.0, 0.0], [1.0, -1.0, 0.5])
    assert coarse["largest_gap"] == pytest.approx(0.75)
    assert "raise --steps" in coarse["verdict"]
    assert judge_completeness([0.0], [0.0])["gap"] is None


def test_a_change_that_everybody_shares_is_told():
    assert "`between` alone" in judge_baseline([-5.0, -5.2, -4.9])["verdict"]
    assert "alone" not in judge_baseline([-5.0, 5.2, -4.9])["verdict"]
    assert "alone" not in judge_baseline([-5.0])["verdict"]


# --- The truth of synthetic data ------------------------------------------------------------------


def truth_map(networks: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """1 in some networks on a grid of the demo's brain, and the grid's affine."""
    brain = load_brain(8.0)
    values = np.zeros(brain.mask.shape)
    inside = np.isin(np.array(NETWORKS)[brain.network[brain.parcel]], networks)
    values[brain.mask] = inside
    return values.T, brain.affine


def test_the_networks_with_the_effect_are_scored():
    truth, affine = truth_map(["A", "B", "D"])
    brain, _ = truth_map(list(NETWORKS))
    noise = np.random.default_rng(0).standard_normal(truth.shape)
    # Networks are looked up on another grid, whose borders lie a little elsewhere.
    assert score_recovery(truth, ["A", "B", "D"], affine) > 0.9
    assert score_recovery(truth, ["C", "E", "F"], affine) < 0.1
    assert score_recovery(-noise, ["A", "B"], affine) == score_recovery(noise, ["A", "B"], affine)
    blurred, inside = np.abs(noise + truth), brain > 0
    found = score_recovery(blurred, ["A", "B", "D"], affine, inside)
    assert found == pytest.approx(roc_auc_score(truth[inside], blurred[inside]), abs=0.05)


def test_recovery_is_judged_by_other_choices_of_networks():
    truth, affine = truth_map(["C", "E"])
    brain = truth_map(list(NETWORKS))[0] > 0
    noise = np.random.default_rng(1).standard_normal(truth.shape)
    found = judge_recovery("strength", truth + 0.1 * noise, ["C", "E"], affine, brain)
    assert found["p"] == pytest.approx(1 / 15)
    assert "clearly, and better than all 14 other choices of 2 networks" in found["verdict"]
    assert found["parcel_auroc"] > found["auroc"] - 1e-9 > 0.9
    found = judge_recovery("between", 1 - truth + 0.1 * noise, ["C", "E"], affine, brain)
    assert found["p"] == 1
    assert "14 of 14 other choices" in found["verdict"]
    assert "does not find" in found["verdict"]


def test_only_synthetic_data_has_a_truth(tmp_path: Path):
    assert read_truth(tmp_path, "sex") is None
    truth = {"sex_on_logit_coherence": {"B": 0.7, "A": 0.7}, "subjects": []}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert read_truth(tmp_path, "sex") == ["A", "B"]
    assert read_truth(tmp_path, "site") is None
