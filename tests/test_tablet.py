"""Tablet: its layers against a naive model in float64, masks, the loss, and what it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_tablet import (
    SCALARS,
    TOKENS,
    VOLUMES,
    WIDTH,
    linear,
    make_batch,
    naive_states,
    normed,
    settings,
    tablet,
    turn,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuromamba.config import Tablet
from neuromamba.models import build_model, skills
from neuromamba.models.code_masks import draw_hidden, hidden_count, split_changes, targets_of
from neuromamba.models.grouped_attention import rotation

KINDS = ("tube", "random", "time")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
every_mask = pytest.mark.parametrize("mask", KINDS)
every_input = pytest.mark.parametrize("read", ["codes", "split"])


def rows(batch, which):
    return {name: value[which] for name, value in batch.items()}


# --- Layers ---------------------------------------------------------------------------------------


def test_a_rotation_is_that_of_complex_numbers_and_sees_distances_alone() -> None:
    x = torch.randn(2, 3, 40, 8, dtype=torch.float64)
    by = rotation(torch.arange(40.0), 8)
    turned = by(x)
    expected = torch.stack([torch.stack([turn(head) for head in one]) for one in x])
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)
    one = by(torch.ones(1, 1, 40, 8))[0, 0]
    products = one @ one.T
    torch.testing.assert_close(products[3:, 3:], products[:-3, :-3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["rope", "none"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_states_are_those_of_a_naive_model(position: str, groups: int) -> None:
    model, batch = tablet(position=position, groups=groups), make_batch()
    found = model._encode(model._project(batch["codes"]))
    exact = tablet(position=position, groups=groups).double()
    tokens = linear(
        normed(batch["codes"].double().flatten(1, 2), exact.code_norm), exact.projection
    )
    torch.testing.assert_close(found.double(), naive_states(exact, tokens), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_a_naive_model() -> None:
    model, batch = tablet(), make_batch()
    weight = torch.randn(24, generator=torch.Generator().manual_seed(0))
    (model.embed(batch) @ weight).sum().backward()
    exact = tablet().double()
    tokens = linear(
        normed(batch["codes"].double().flatten(1, 2), exact.code_norm), exact.projection
    )
    (naive_states(exact, tokens)[:, 0] @ weight.double()).sum().backward()
    expected = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            assert parameter.grad is None
            continue
        wanted = expected[name].grad
        difference = (parameter.grad.double() - wanted).norm()
        assert difference <= 1e-4 * wanted.norm() + 1e-6, name


def test_positions_tell_tokens_apart_and_without_them_their_order_is_nothing() -> None:
    batch = make_batch()
    shuffled = {"codes": batch["codes"][:, torch.randperm(VOLUMES)][:, :, torch.randperm(TOKENS)]}
    apart = {}
    for position in ("rope", "none"):
        model = tablet(position=position)
        apart[position] = (model.embed(batch) - model.embed(shuffled)).abs().max().item()
    assert apart["none"] < 1e-5 < 1e-3 < apart["rope"]


def test_on_a_grid_places_and_volumes_are_told() -> None:
    model, batch = tablet(position="grid"), make_batch()
    turn_of = model._turn(torch.zeros(1, 1 + VOLUMES * TOKENS, 24))
    # CLS at 0, and the tokens of volume t at t + 1; the first pair turns by one a position.
    angles = torch.atan2(turn_of.sin, turn_of.cos)[:, 0].remainder(2 * torch.pi)
    expected = torch.cat([torch.zeros(1), torch.arange(1.0, VOLUMES + 1).repeat_interleave(TOKENS)])
    torch.testing.assert_close(angles, expected.remainder(2 * torch.pi), rtol=0, atol=1e-4)
    order = torch.randperm(TOKENS)
    moved = model.embed({"codes": batch["codes"][:, :, order]})
    assert (moved - model.embed(batch)).abs().max() > 1e-3
    with torch.no_grad():  # the same people, with tokens and what is known of their places moved
        model.places.copy_(model.places[order])
    again = model.embed({"codes": batch["codes"][:, :, order]})
    torch.testing.assert_close(again, tablet(position="grid").embed(batch), rtol=1e-4, atol=1e-5)


def test_an_embedding_is_cls_or_the_mean_of_the_tokens() -> None:
    batch = make_batch()
    states = tablet()._encode(tablet()._project(batch["codes"]))
    torch.testing.assert_close(tablet().embed(batch), states[:, 0])
    torch.testing.assert_close(tablet(readout="mean").embed(batch), states[:, 1:].mean(1))


def test_recomputed_blocks_change_nothing() -> None:
    batch = make_batch()
    gradients = []
    for again in (False, True):
        model = tablet(checkpoint_blocks=again)
        model.eval().loss(batch)["loss"].backward()
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_published_sizes_have_the_releases_parameters() -> None:
    with torch.device("meta"):
        codes = {"n_tokens": 27, "code_width": 3072}
        model = build_model(Tablet(family="tablet"), 0, codes=codes)
    count = sum(one.numel() for one in model.parameters())
    ours = sum(one.numel() for part in (model.head, model.norm) for one in part.parameters())
    # Of the release: input LN 2 * 3072, projection, CLS, LN 2 * 896, and twelve layers.
    layer = 2 * 896 * 897 + 2 * 128 * 897 + 4 * 896 + 4864 * 897 + 896 * 4865
    assert count - ours == 2 * 3072 + 3073 * 896 + 896 + 2 * 896 + 12 * layer == 129_514_496


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"heads": 5}, "multiple of 2 \\* heads"), ({"groups": 4}, "multiple of groups")],
)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(**wrong)


# --- Masks ----------------------------------------------------------------------------------------


@every_mask
@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.999])
def test_masks_hide_the_share_and_leave_something(mask: str, share: float) -> None:
    places = draw_hidden(mask, 5, 10, TOKENS, share, training=True)
    assert places.shape == (5, hidden_count(mask, 10, TOKENS, share))
    units = {"tube": TOKENS, "time": 10, "random": 10 * TOKENS}[mask]
    expected = min(max(1, round(share * units)), units - 1) * 10 * TOKENS // units
    assert places.shape[1] == expected
    hidden = torch.zeros(5, 10 * TOKENS, dtype=torch.bool).scatter(1, places, True)
    assert (hidden.sum(1) == expected).all()
    hidden = hidden.view(5, 10, TOKENS)
    if mask == "tube":
        assert (hidden == hidden[:, :1]).all()
    if mask == "time":
        assert (hidden == hidden[:, :, :1]).all()
    assert (places.diff(dim=1) > 0).all()


@every_mask
def test_masks_follow_torchs_generator_in_training_and_are_fixed_in_evaluation(mask: str) -> None:
    def drawn(seed: int, training: bool) -> torch.Tensor:
        torch.manual_seed(seed)
        return draw_hidden(mask, 4, 10, TOKENS, 0.5, training)

    assert torch.equal(drawn(1, True), drawn(1, True))
    assert not torch.equal(drawn(1, True), drawn(2, True))
    assert not torch.equal(*drawn(1, True)[:2])
    assert torch.equal(drawn(1, False), drawn(2, False))
    assert (drawn(1, False) == drawn(1, False)[0]).all()
    before = torch.get_rng_state()
    draw_hidden(mask, 4, 10, TOKENS, 0.5, training=False)
    assert torch.equal(before, torch.get_rng_state())


# --- The loss -------------------------------------------------------------------------------------


@every_mask
@pytest.mark.parametrize("target", ["normed", "raw", "changes"])
def test_the_loss_is_of_hidden_tokens_alone(mask: str, target: str) -> None:
    model, batch = tablet(mask=mask, target=target).eval(), make_batch()
    scalars = model.loss(batch)
    assert set(scalars) == SCALARS
    assert {name for name, value in scalars.items() if value.requires_grad} == {"loss"}
    places = draw_hidden(mask, 3, VOLUMES, TOKENS, 0.5, training=False)
    tokens = model._project(batch["codes"])
    hidden = torch.zeros(3, VOLUMES * TOKENS, dtype=torch.bool).scatter(1, places, True)
    tokens[hidden] = model.head.mask
    guesses = model.head.values(model._encode(tokens)[:, 1:][hidden])
    wanted = targets_of(batch["codes"], target).flatten(1, 2)[hidden]
    torch.testing.assert_close(scalars["loss"], (guesses - wanted).abs().mean())
    torch.testing.assert_close(scalars["mse_model"], (guesses - wanted).square().mean())
    squared = tablet(mask=mask, target=target, objective="mse").eval().loss(batch)
    torch.testing.assert_close(squared["loss"].detach(), scalars["mse_model"])
    for name, value in skills({name: value.item() for name, value in scalars.items()}).items():
        assert scalars[name].item() == pytest.approx(value, abs=1e-5)


@every_input
@every_mask
def test_what_is_hidden_is_not_seen(mask: str, read: str) -> None:
    model, batch = tablet(mask=mask, target="raw", input=read).eval(), make_batch()
    places = draw_hidden(mask, 3, VOLUMES, TOKENS, 0.5, training=False)
    # A model without a linear layer's answer: the loss then tells what it was asked for alone.
    seen = []
    model.head.values.register_forward_pre_hook(lambda _, call: seen.append(call[0].detach()))
    model.loss(batch)
    changed = batch["codes"].clone().flatten(1, 2)
    changed.scatter_add_(
        1, places[..., None].expand(-1, -1, WIDTH), torch.full((3, places.shape[1], WIDTH), 7.0)
    )
    model.loss({"codes": changed.view_as(batch["codes"])})
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_references_are_the_guesses_that_their_names_say() -> None:
    batch = make_batch()
    codes = batch["codes"]
    for mask in KINDS:
        found = tablet(mask=mask, target="raw").eval().loss(batch)
        places = draw_hidden(mask, 3, VOLUMES, TOKENS, 0.5, training=False)
        seen = torch.ones(3, VOLUMES * TOKENS).scatter(1, places, 0.0).view(3, VOLUMES, TOKENS)
        static, visible = [], []
        for sample in range(3):
            for place in places[sample].tolist():
                time, token = divmod(place, TOKENS)
                value = codes[sample, time, token]
                static.append((value - codes[sample, :, token].mean(0)).square().mean())
                shown = seen[sample].bool()
                others = codes[sample, time][shown[time]]
                if mask != "tube":
                    others = codes[sample, :, token][shown[:, token]]
                guess = others.mean(0) if len(others) else torch.zeros(WIDTH)
                visible.append((value - guess).square().mean())
        torch.testing.assert_close(found["mse_static"], torch.stack(static).mean())
        torch.testing.assert_close(found["mse_visible"], torch.stack(visible).mean())


def test_targets_are_in_the_units_that_their_names_say() -> None:
    codes = make_batch()["codes"]
    codes[:, :, 0] = 0.25  # outside of the brain nothing changes
    normed_, changes = targets_of(codes, "normed"), targets_of(codes, "changes")
    assert normed_.mean(-1).abs().max() < 1e-5
    assert normed_[:, :, 1:].std(-1, correction=0) == pytest.approx(1.0, abs=1e-3)
    assert torch.equal(targets_of(codes, "raw"), codes)
    assert changes.mean(1).abs().max() < 1e-5
    assert changes[:, :, 1:].square().mean((1, 3)) == pytest.approx(1.0, abs=1e-4)
    assert changes.isfinite().all()
    assert not changes[:, :, 0].any()


@every_input
@every_mask
def test_batch_mates_have_no_influence(mask: str, read: str) -> None:
    model, batch = tablet(mask=mask, input=read).eval(), make_batch()
    embeddings, losses = model.embed(batch), model.loss(batch)
    each = [model.loss(rows(batch, [k])) for k in range(3)]
    for k in range(3):
        alone = model.embed(rows(batch, [k]))
        torch.testing.assert_close(embeddings[k : k + 1], alone, rtol=1e-4, atol=1e-5)
    for name in SCALARS - {"skill_visible", "skill_static"}:
        mean = torch.stack([one[name] for one in each]).mean()
        torch.testing.assert_close(losses[name], mean, rtol=1e-4, atol=1e-5)


@every_input
def test_pretraining_reaches_all_and_an_embedding_leaves_the_head(read: str) -> None:
    model, batch = tablet(input=read), make_batch()
    model.loss(batch)["loss"].backward()
    assert all(one.grad is not None for one in model.parameters())
    model.zero_grad()
    model.embed(batch).square().sum().backward()
    left = {name for name, one in model.named_parameters() if one.grad is None}
    assert left == {name for name, _ in model.named_parameters() if name.startswith("head.")}


@every_input
@every_mask
def test_flops_are_those_that_torch_counts(mask: str, read: str) -> None:
    model, batch = tablet(mask=mask, input=read).eval(), make_batch()
    # The fused kernels of attention on a CPU are not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(batch)
    # Torch also counts the sums of the references.
    assert model.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_what_stays_and_what_changes_are_told_apart_by_what_is_seen() -> None:
    """Against loops over tokens in float64."""
    codes = make_batch()["codes"].double()
    codes[:, :, 0] = 0.25  # outside of the brain nothing changes
    seen = (torch.rand(codes.shape[:3], generator=torch.Generator().manual_seed(2)) < 0.6).double()
    seen[0, :, 1] = 0
    mean, changes = split_changes(codes, seen)
    for sample, token in np.ndindex(3, TOKENS):
        shown = codes[sample, seen[sample, :, token].bool(), token]
        expected = shown.mean(0) if len(shown) else torch.zeros(WIDTH, dtype=torch.float64)
        torch.testing.assert_close(mean[sample, 0, token], expected)
        if token and len(shown) > 1:
            wanted = (shown - expected) / (shown - expected).square().mean().sqrt()
            found = changes[sample, seen[sample, :, token].bool(), token]
            torch.testing.assert_close(found, wanted)
    assert not changes[:, :, 0].any()
    assert not changes[seen == 0].any()


def test_what_changes_is_read_in_units_of_itself() -> None:
    """A code whose changes are a thousandth of it is read like one whose changes are large."""
    model, codes = tablet(input="split").eval(), make_batch()["codes"].double()
    mean = codes.mean(1, keepdim=True)
    embeddings = [model.embed({"codes": (mean + of * (codes - mean)).float()}) for of in (1, 1e-3)]
    torch.testing.assert_close(*embeddings, rtol=0, atol=2e-3)


@every_input
def test_half_precision_changes_little(read: str) -> None:
    model, batch = tablet(input=read).eval(), make_batch()
    loss, embedding = model.loss(batch)["loss"], model.embed(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(batch)
        assert all(value.dtype == torch.float32 for value in rough.values())
        assert rough["loss"].item() == pytest.approx(loss.item(), rel=0.02)
        assert (model.embed(batch) - embedding).norm() < 0.02 * embedding.norm()


@pytest.mark.parametrize(
    ("position", "visible", "static"), [("rope", 0.5, -9.0), ("grid", 0.8, 0.2)]
)
def test_it_learns_to_tell_what_is_hidden(position: str, visible: float, static: float) -> None:
    """All tokens follow one course in time, each with a pattern and a gain of its own."""
    random = torch.Generator().manual_seed(0)
    pattern = torch.randn(1, 1, TOKENS, WIDTH, generator=random)
    course = torch.randn(8, 3, 1, 1, generator=random)
    codes = pattern + 0.5 * course * pattern.roll(1, -1)
    model = tablet(mask_share=0.3, position=position, width=48, heads=4).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(150):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model.loss({"codes": codes})["loss"].backward()
        optimizer.step()
    scalars = model.eval().loss({"codes": codes})
    assert scalars["skill_visible"] > visible
    # Above 0 it tells more than the pattern, which never changes: the course, which is visible.
    assert scalars["skill_static"] > static


def test_change_that_is_little_beside_what_stays_is_learnt_where_the_two_are_split() -> None:
    """The same with new courses in each step, and changes as small beside the pattern as real."""
    random = torch.Generator().manual_seed(0)
    pattern = torch.randn(1, 1, TOKENS, WIDTH, generator=random)

    def draw(samples: int) -> dict[str, Tensor]:
        course = torch.randn(samples, VOLUMES, 1, 1, generator=random)
        return {"codes": pattern + 0.1 * course * pattern.roll(1, -1)}

    skill = {}
    for read in ("codes", "split"):
        how = {"input": read, "target": "changes", "objective": "mse", "position": "grid"}
        model = tablet(**how, width=48, heads=4, depth=1).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(100):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model.loss(draw(8))["loss"].backward()
            optimizer.step()
        skill[read] = float(model.eval().loss(draw(32))["skill_static"])
    assert skill["split"] > 0.5
    assert skill["codes"] < 0.5 * skill["split"]


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_a_cpu_gives(precision: torch.dtype) -> None:
    model, batch = tablet().eval(), make_batch()
    expected = {name: value.detach() for name, value in model.loss(batch).items()}
    embedding = model.embed(batch).detach()
    model.cuda()
    there = {name: value.cuda() for name, value in batch.items()}
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-3} if precision == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    )
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        found = model.loss(there)
        found["loss"].backward()
        torch.testing.assert_close(model.embed(there).cpu(), embedding, **tolerance)
    for name in ("loss", "mse_model", "mse_visible", "mse_static"):
        torch.testing.assert_close(found[name].cpu().detach(), expected[name], **tolerance)
    assert all(one.grad.isfinite().all() for one in model.parameters())
