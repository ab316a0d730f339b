"""The families that read ROI series: what they share, and what is each one's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuromamba.config import Compute, Lmae, RoiTransformer
from neuromamba.models import build_model, skills
from neuromamba.models.roi_layers import LocalBlock, time_code
from neuromamba.models.roi_masks import interpolate, local_masks, reference_errors, stretches
from neuromamba.models.roi_predictor import Predictor

ROIS, VOLUMES, PATCH = 9, 40, 5
SCALARS = {
    "loss",
    "mse_model",
    "mse_mean",
    "mse_interpolation",
    "skill_mean",
    "skill_interpolation",
}
Batch = dict[str, Tensor]
SMALL = {"volumes": VOLUMES, "patch": PATCH, "width": 8}
LMAE = {**SMALL, "head_dim": 4, "state": 4, "neighbors": 3, "mask_seconds": 8.0, "walk_steps": 2}
LMAE |= {"maps": 3}


def lmae(**changes) -> nn.Module:
    torch.manual_seed(0)
    return build_model(Lmae(family="lmae", **{**LMAE, **changes}), 0, Compute(), ROIS)


def transformer(**changes) -> nn.Module:
    torch.manual_seed(0)
    small = {**SMALL, "depth": 2, "heads": 2, "mlp_ratio": 2, **changes}
    return build_model(RoiTransformer(family="roi_transformer", **small), 0, Compute(), ROIS)


MODELS = {
    "lmae": lmae,
    "lmae-signed": lambda: lmae(signed=True, top_k=2, mask_rois=0.2),
    "lmae-without-experts": lambda: lmae(experts=0),
    "patches": transformer,
    "times": lambda: transformer(mask="times", mask_share=0.5),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def make_batch(samples: int = 4) -> Batch:
    """Each sample's values depend on its place alone; ROIs are missing in all but the first."""
    batch: Batch = {
        "rois": torch.zeros(samples, VOLUMES, ROIS),
        "present": torch.ones(samples, ROIS, dtype=torch.bool),
        "repetition_time": torch.tensor([2.0, 1.0, 2.0, 0.7])[:samples],
    }
    for k in range(samples):
        generator = torch.Generator().manual_seed(k)
        shared = torch.randn(VOLUMES, 3, generator=generator)
        mixed = shared @ torch.randn(3, ROIS, generator=generator)
        batch["rois"][k] = mixed + 0.5 * torch.randn(VOLUMES, ROIS, generator=generator)
        batch["present"][k, ROIS - k :] = False
    batch["rois"] *= batch["present"][:, None]
    return batch


def rows(batch: Batch, which: slice | list[int]) -> Batch:
    return {name: value[which] for name, value in batch.items()}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- What both families share --------------------------------------------------------------------


@every_model
def test_contract(make) -> None:
    model, batch = make(), make_batch()
    assert model.embed(batch).shape == (4, model.width)
    scalars = model.loss(batch)
    assert SCALARS <= set(scalars) <= SCALARS | {"imbalance"}
    assert all(value.shape == () and value.isfinite() for value in scalars.values())
    assert {name for name, value in scalars.items() if value.requires_grad} == {"loss"}
    for name, value in skills({name: value.item() for name, value in scalars.items()}).items():
        assert scalars[name].item() == pytest.approx(value, abs=1e-5)


@every_model
def test_pretraining_leaves_the_pool_alone_and_an_embedding_the_head(make) -> None:
    model, batch = make(), make_batch()
    model.loss(batch)["loss"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    apart = {name for name, _ in model.named_parameters() if name.startswith("pool.")}
    assert reached == {name for name, _ in model.named_parameters()} - apart
    model.zero_grad()
    model.embed(batch).square().sum().backward()
    left = {name for name, p in model.named_parameters() if p.grad is None}
    assert left == {name for name, _ in model.named_parameters() if name.startswith("head.")}


@every_model
def test_batch_mates_have_no_influence(make) -> None:
    model, batch = make().eval(), make_batch()
    embeddings = model.embed(batch)
    losses = model.loss(batch)
    each = [model.loss(rows(batch, [k])) for k in range(4)]
    for k in range(4):
        close({"": embeddings[k : k + 1]}, {"": model.embed(rows(batch, [k]))})
    for name in ("loss", "mse_model", "mse_mean", "mse_interpolation"):
        close({name: losses[name]}, {name: torch.stack([one[name] for one in each]).mean()})


@every_model
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(make) -> None:
    model, batch = make().eval(), make_batch()
    first, second = model.loss(rows(batch, slice(2))), model.loss(rows(batch, slice(2, 4)))
    close({"": model.loss(batch)["loss"]}, {"": (first["loss"] + second["loss"]) / 2})


@every_model
def test_missing_rois_have_no_influence(make) -> None:
    model, batch = make().eval(), make_batch()
    other = {**batch, "rois": torch.where(batch["present"][:, None], batch["rois"], torch.nan)}
    close({"": model.embed(batch)}, {"": model.embed(other)})
    close(model.loss(batch), model.loss(other))


@every_model
def test_masks_follow_torchs_generator_in_training_and_are_fixed_in_evaluation(make) -> None:
    model, batch = make(), make_batch()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model.loss(batch)["mse_mean"].item()

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)
    before = torch.get_rng_state()
    model.loss(batch)
    assert torch.equal(before, torch.get_rng_state())


@every_model
def test_flops_are_those_that_torch_counts(make) -> None:
    model, batch = make().eval(), make_batch()
    batch["present"][:] = True
    # The fused kernels of attention on a CPU are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch)
    # Smaller products (of codes of time, of embeddings of ROIs) are left out.
    assert model.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.1)


@every_model
def test_half_precision_changes_little(make) -> None:
    model, batch = make().eval(), make_batch()
    loss, embedding = model.loss(batch)["loss"], model.embed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(batch)["loss"]
        assert rough.dtype == torch.float32
        assert rough.item() == pytest.approx(loss.item(), rel=0.02)
        assert (model.embed(batch) - embedding).norm() < 0.02 * embedding.norm()


@every_model
def test_round_trip_of_the_weights(make) -> None:
    model, batch = make().eval(), make_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = make().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.embed(batch), model.embed(batch))
    assert other.loss(batch) == model.loss(batch)


@pytest.mark.parametrize("make", [lmae, transformer], ids=["lmae", "transformer"])
def test_it_learns_to_tell_what_is_masked(make) -> None:
    model, batch = make(width=32), rows(make_batch(), slice(2))
    model.eval()  # the same masks each time
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        scalars = model.loss(batch)
        scalars["loss"].backward()
        optimizer.step()
    assert scalars["skill_mean"] > 0.8
    assert scalars["skill_interpolation"] > 0.8


# --- Masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("repetition_time", "length"), [(2.0, 5), (1.0, 10), (3.3, 3), (20.0, 1)])
def test_masks_are_as_long_in_seconds_at_every_repetition_time(repetition_time, length) -> None:
    times = torch.tensor([repetition_time])
    (mask,) = local_masks(500, 200, times, 10.0, 0.3, 0.0, training=False)
    # Stretches may touch, so that some runs of masked volumes are longer, but none is shorter.
    change = torch.diff(nn.functional.pad(mask.int(), (1, 1)))
    runs = (change == -1).nonzero()[:, 1] - (change == 1).nonzero()[:, 1]
    assert runs.min() == length
    assert mask.float().mean(1).sub(0.3).abs().max() <= 0.5 * length / 200 + 1e-6
    # Anywhere in the window, and elsewhere in each ROI.
    assert mask.float().mean(0).min() > 0.02
    assert len(mask.unique(dim=0)) > 400


def test_a_mask_longer_than_the_window_takes_all_of_it() -> None:
    assert stretches(3, 10, 25, 0.3, None).all()


def test_whole_rois_are_masked_besides() -> None:
    mask = local_masks(100, 50, torch.tensor([2.0, 2.0]), 10.0, 0.2, 0.25, training=True)
    assert mask.all(-1).sum(1).tolist() == [25, 25]
    assert not torch.equal(mask[0], mask[1])


def test_masks_of_evaluation_depend_on_the_repetition_time_alone() -> None:
    times = torch.tensor([2.0, 1.0, 2.0])
    one, two, three = local_masks(20, 50, times, 10.0, 0.3, 0.1, training=False)
    assert torch.equal(one, three)
    assert not torch.equal(one, two)


def test_interpolation_by_hand() -> None:
    values = torch.tensor([[[9.0, 1, 9, 9, 4, 9, 6, 9], [9.0] * 8]])
    visible = torch.tensor([[[0, 1, 0, 0, 1, 0, 1, 0], [0] * 8]], dtype=torch.bool)
    expected = [[1.0, 1, 2, 3, 4, 5, 6, 6], [0.0] * 8]
    assert interpolate(values, visible).tolist() == [expected]
    errors = reference_errors(values, visible, ~visible)
    mean = 11 / 3
    by_mean = (5 * (9 - mean) ** 2 + 8 * 81) / 13
    by_line = (sum((9 - one) ** 2 for one in (1, 2, 3, 5, 6)) + 8 * 81) / 13
    assert errors["mse_mean"].item() == pytest.approx(by_mean)
    assert errors["mse_interpolation"].item() == pytest.approx(by_line)


# --- What is masked is hidden --------------------------------------------------------------------


def hidden_values(model: nn.Module, batch: Batch) -> Tensor:
    """Where the loss takes its targets, from the gradient of the error of a mute model."""
    model.eval()
    model.settings = model.settings.model_copy(update={"balance": 0.0})
    last = model.head if isinstance(model.head, nn.Linear) else model.head.values
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    leaf = batch["rois"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss({**batch, "rois": leaf})["loss"], leaf)
    return gradient != 0


@every_model
def test_only_masked_values_of_present_rois_are_targets(make) -> None:
    batch = make_batch()
    hidden = hidden_values(make(), batch)
    assert not hidden[~batch["present"][:, None].expand_as(hidden)].any()
    share = hidden.float().mean((1, 2)) / batch["present"].float().mean(1)
    assert ((share > 0.15) & (share < 0.85)).all()


@every_model
def test_what_is_predicted_does_not_depend_on_masked_values(make) -> None:
    model, batch = make(), rows(make_batch(), [1])
    hidden = hidden_values(make(), batch)
    model.eval()
    predicted: list[Tensor] = []
    last = model.head if isinstance(model.head, nn.Linear) else model.head.values
    last.register_forward_hook(lambda module, given, output: predicted.append(output))
    others = torch.where(hidden, torch.randn_like(batch["rois"]) * 5, batch["rois"])
    shown = torch.where(hidden, batch["rois"], torch.randn_like(batch["rois"]) * 5)
    for series in (batch["rois"], others, shown):
        model.loss({**batch, "rois": series})
    assert torch.equal(predicted[0], predicted[1])
    assert not torch.allclose(predicted[0], predicted[2])


def test_times_are_masked_in_all_rois() -> None:
    batch = make_batch()
    hidden = hidden_values(transformer(mask="times", mask_share=0.5), batch)
    for sample, present in zip(hidden, batch["present"], strict=True):
        patches = sample[:, present].view(-1, PATCH * int(present.sum()))
        assert sorted(patches.float().mean(1).tolist()) == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_share_of_the_patches_there_are_is_masked(share: float) -> None:
    batch = make_batch()
    hidden = hidden_values(transformer(mask_share=share), batch)
    count = hidden.unflatten(1, (-1, PATCH)).any(2).sum((1, 2))
    tokens = batch["present"].sum(1) * VOLUMES // PATCH
    assert count.tolist() == [round(share * n) for n in tokens.tolist()]


# --- Lmae ----------------------------------------------------------------------------------------


def test_values_that_are_masked_are_told_apart_from_zeros() -> None:
    model, batch = lmae().eval(), rows(make_batch(), [0])
    batch["rois"] = torch.zeros_like(batch["rois"])
    visible = torch.ones(1, ROIS, VOLUMES, dtype=torch.bool)
    hidden = visible.clone()
    hidden[0, 3, 10:20] = False
    one, other = model._encode(batch, visible).states, model._encode(batch, hidden).states
    assert not torch.allclose(one[0, 3], other[0, 3])


def test_regions_meet_by_walks_alone() -> None:
    batch = rows(make_batch(), [0])
    moved = {**batch, "rois": batch["rois"].clone()}
    moved["rois"][0, :, 4] = batch["rois"][0].flip(0)[:, 4]
    for experts, meet in ((0, False), (3, True)):
        model = lmae(experts=experts).eval()
        visible = model._visible(batch)
        one, other = model._encode(batch, visible).states, model._encode(moved, visible).states
        assert not torch.allclose(one[0, 4], other[0, 4])
        assert torch.allclose(one[0, :4], other[0, :4]) is not meet


def test_the_encoder_is_local_in_time() -> None:
    block, h = LocalBlock(8), torch.randn(1, 2, 10, 8)
    moved = h.clone()
    moved[0, 1, 6] += 1
    changed = (block(moved) - block(h)).abs().amax(-1) > 0
    assert changed.nonzero().tolist() == [[0, 1, 5], [0, 1, 6], [0, 1, 7]]


def test_time_is_told_in_seconds() -> None:
    slow, fast = time_code(torch.tensor([2.0]), 6, 5), time_code(torch.tensor([1.0]), 12, 5)
    # The centre of a patch of 10 s lies between two of 5 s.
    assert not torch.allclose(slow, fast[:, :6])
    twice = time_code(torch.tensor([1.0]), 6, 10)
    torch.testing.assert_close(slow, twice)
    assert slow[0, 0, 8].item() == pytest.approx(math.cos(2 * math.pi * 5 / 4), abs=1e-5)


def test_experts_of_each_region_and_time() -> None:
    batch = make_batch()
    weights = lmae(experts=3).experts(batch)["weights"]
    assert weights.shape == (4, VOLUMES // PATCH, ROIS, 3)
    there = batch["present"][:, None].expand(weights.shape[:3])
    torch.testing.assert_close(weights.sum(-1), there.float())
    assert (weights[0].std(0) > 0).all()
    assert (weights[0].std(1) > 0).all()
    assert lmae(experts=0).experts(batch) == {}


def test_top_k_experts() -> None:
    batch = make_batch()
    weights = lmae(top_k=1).experts(batch)["weights"]
    assert set(weights.unique().tolist()) == {0.0, 1.0}


def test_balance_is_part_of_the_loss() -> None:
    batch = make_batch()
    scalars = lmae(balance=0.5).eval().loss(batch)
    expected = scalars["mse_model"] + 0.5 * scalars["imbalance"]
    torch.testing.assert_close(scalars["loss"].detach(), expected)
    assert scalars["imbalance"] > 0


@pytest.mark.parametrize("predictor", ["ssm", "mean", "gru", "attention"])
def test_predictors(predictor: str) -> None:
    batch = make_batch()
    model = lmae(predictor=predictor, predictor_depth=2).eval()
    plain = lmae(predictor="mean").eval()
    weights = {**model.state_dict(), **plain.state_dict()}
    model.load_state_dict(weights)
    before, mean = model.embed(batch), plain.embed(batch)
    assert before.shape == (4, model.width) == (4, 8 + 3 * 2 * 8)
    if predictor in ("ssm", "gru", "mean"):
        # Before it has learnt anything, a sequence model changes nothing.
        torch.testing.assert_close(before, mean)
    optimizer = torch.optim.Adam(model.pool.parameters(), lr=0.05)
    target = torch.tensor([0.0, 1.0, 1.0, 0.0])
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (model.embed(batch)[:, :8].mean(1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    model.embed(batch).square().sum().backward()
    for name, parameter in model.pool.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("predictor", "ordered"), [("ssm", True), ("mean", False), ("gru", True), ("attention", True)]
)
def test_the_order_of_time(predictor: str, ordered: bool) -> None:
    torch.manual_seed(0)
    settings = Lmae(family="lmae", **{**LMAE, "predictor": predictor})
    pool = Predictor(settings, ROIS, 16, Compute())
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    h, vectors = torch.randn(2, ROIS, 6, 8), torch.randn(2, ROIS, 16)
    present, time = torch.ones(2, ROIS, dtype=torch.bool), time_code(torch.ones(2), 6, PATCH)
    one, other = pool(h, vectors, present, time), pool(h.flip(2), vectors, present, time)
    assert torch.allclose(one, other, atol=1e-5) is not ordered


def test_the_embedding_tells_where_a_state_occurred_and_how_regions_are_connected() -> None:
    batch = rows(make_batch(), [0])
    swapped = {**batch, "rois": batch["rois"][..., [1, 0, *range(2, ROIS)]]}
    model = lmae(predictor="mean").eval()
    one, other = model.embed(batch)[0], model.embed(swapped)[0]
    assert ((one - other).abs() > 1e-4).all()
    encoded = model._encode(batch, model._visible(batch))
    forms = torch.einsum("rm,rw->mw", model.pool.connections, encoded.vectors[0]) / ROIS**0.5
    torch.testing.assert_close(one[8:], forms.flatten())
    states = torch.einsum("rc,rtc->c", model.pool.regions, encoded.states[0])
    torch.testing.assert_close(one[:8], states / ROIS**0.5 / (VOLUMES // PATCH))


def test_the_embedding_has_a_gradient_in_the_series_through_the_graph() -> None:
    batch = rows(make_batch(), [0])
    leaf = batch["rois"].clone().requires_grad_()
    forms = lmae(neighbors=ROIS, signed=True).embed({**batch, "rois": leaf})[0, 8:]
    assert (torch.autograd.grad(forms.square().sum(), leaf)[0] != 0).all()


# --- RoiTransformer ------------------------------------------------------------------------------


def test_before_fine_tuning_the_embedding_is_the_plain_mean() -> None:
    model, batch = transformer().eval(), rows(make_batch(), [2])
    states: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, given, output: states.append(output))
    embedding = model.embed(batch)
    assert states[0].shape == (1, 7 * VOLUMES // PATCH, 8)
    torch.testing.assert_close(embedding, states[0].mean(1))
    nn.init.normal_(model.pool.weight)
    states.clear()
    found = model.embed(batch)[0]
    weights = model.pool(states[0][0]).softmax(0)
    expected = [weights[:, k] @ group for k, group in enumerate(states[0][0].chunk(2, dim=1))]
    torch.testing.assert_close(found, torch.cat(expected))


# --- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"head_dim": 5}, "head_dim"),
        ({"predictor": "attention", "head_dim": 16}, "head_dim"),
        ({"experts": 2, "top_k": 3}, "top_k"),
        ({"volumes": 42}, "patch"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Lmae(family="lmae", **{**LMAE, **changes})


def test_head_dim_matters_only_where_there_are_heads() -> None:
    assert Lmae(family="lmae", predictor="gru", head_dim=5).head_dim == 5
