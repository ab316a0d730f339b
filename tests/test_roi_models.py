"""What the families that read ROI series share."""

from __future__ import annotations

import pytest
import torch
from small_roi_models import (
    ROIS,
    SCALARS,
    assert_close,
    every_model,
    lmae,
    make_batch,
    rows,
    transformer,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from neuromamba.models import skills


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
        assert_close({"": embeddings[k : k + 1]}, {"": model.embed(rows(batch, [k]))})
    for name in ("loss", "mse_model", "mse_mean", "mse_interpolation"):
        assert_close({name: losses[name]}, {name: torch.stack([one[name] for one in each]).mean()})


@every_model
def test_the_loss_of_a_batch_is_the_mean_of_its_halves(make) -> None:
    model, batch = make().eval(), make_batch()
    first, second = model.loss(rows(batch, slice(2))), model.loss(rows(batch, slice(2, 4)))
    assert_close({"": model.loss(batch)["loss"]}, {"": (first["loss"] + second["loss"]) / 2})


@every_model
def test_missing_rois_have_no_influence(make) -> None:
    model, batch = make().eval(), make_batch()
    other = {**batch, "rois": torch.where(batch["present"][:, None], batch["rois"], torch.nan)}
    assert_close({"": model.embed(batch)}, {"": model.embed(other)})
    assert_close(model.loss(batch), model.loss(other))


@every_model
def test_nothing_that_was_learnt_of_a_missing_roi_has_influence(make) -> None:
    model, batch = make().eval(), rows(make_batch(), [2])
    missing = ~batch["present"][0]
    embedding, losses = model.embed(batch), model.loss(batch)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.shape[0] == ROIS:
                parameter[missing] += 3
    assert_close({"": embedding}, {"": model.embed(batch)})
    assert_close(losses, model.loss(batch))


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
