"""Cinp: what is its own, whatever brings the two kinds of data together."""

from __future__ import annotations

import os
import subprocess
import sys

import cinp_processes
import pytest
import torch
from cinp_processes import gradients
from safetensors.torch import load_file
from small_cinp import ROIS, SMALL, WIDTH, cinp, make_batch, rows
from torch import Tensor

from neuromamba.config import Cinp as Settings
from neuromamba.config import ImageChanges as ChangeSettings
from neuromamba.config import Pretrain
from neuromamba.distributed import World
from neuromamba.models.image_changes import ImageChanges, hide_cubes

SCALARS = {"loss", "inc", "top1_image", "top1_network", "temperature", "mim", "inm", "matched"}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert set(one) == set(other)
    for name in one:
        difference = (one[name] - other[name]).abs().max()
        assert float(difference) <= tolerance * max(1.0, float(one[name].abs().max())), name


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return gradients(World())


def test_the_loss_is_the_sum_of_its_parts_and_reaches_every_parameter(whole) -> None:
    assert {n.removeprefix("scalar.") for n in whole if n.startswith("scalar.")} == SCALARS
    parts = sum(whole[f"scalar.{name}"] for name in ("inc", "mim", "inm"))
    assert float(whole["scalar.loss"]) == pytest.approx(float(parts), rel=1e-6)
    flat = [name for name, value in whole.items() if not value.abs().any()]
    # A shift of all keys of an attention changes no softmax.
    # Neither does a shift of all projections change what is standardised.
    without = ("scalar", "qkv.bias", "image.project.bias", "network.project.2.bias")
    assert not [name for name in flat if not any(part in name for part in without)]


def test_two_processes_have_the_gradients_of_one_with_the_whole_batch(whole, tmp_path) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *torchrun, cinp_processes.__file__, str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("whole", "chunks"):
        assert_same(whole, load_file(tmp_path / f"{kind}.safetensors"), 1e-10)


def test_chunks_have_the_gradients_of_the_large_batch_and_are_encoded_twice(whole) -> None:
    assert_same(whole, gradients(World(), chunk=4), 1e-10)
    model, sizes = cinp(chunk=3, mim=0.0).train(), []
    model.head.network.register_forward_pre_hook(lambda _, call: sizes.append(len(call[0])))
    loss = model.loss(make_batch(4))["loss"]
    assert sizes == [3, 1]
    loss.backward()
    assert sorted(sizes) == [1, 1, 3, 3]


def test_parts_without_a_weight_are_left_out() -> None:
    model = cinp(mim=0.0, inm=0.0).train()
    scalars = model.loss(make_batch())
    assert set(scalars) == SCALARS - {"mim", "inm", "matched"}
    scalars["loss"].backward()
    assert all(one.grad is not None for one in model.parameters())
    weighted = cinp(mim=0.5, inm=0.25).train()
    torch.manual_seed(1)
    found = weighted.loss(make_batch())
    wanted = found["inc"] + 0.5 * found["mim"] + 0.25 * found["inm"]
    assert float(found["loss"].detach()) == pytest.approx(float(wanted), rel=1e-6)


def test_what_a_sample_lacks_has_no_influence() -> None:
    model, batch = cinp().train(), cinp_processes.lone_batch()
    other = {name: value.clone() for name, value in batch.items()}
    other["fc"][1], other["anat"][4] = 0.3, 0.5
    found = []
    for one in (batch, other):
        torch.manual_seed(2)
        found.append(model.loss(one))
    losses = [float(scalars["loss"].detach()) for scalars in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    found = [model.eval().embed(one) for one in (batch, other)]
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_embeddings_are_of_images_or_else_of_networks() -> None:
    model, batch = cinp().eval(), make_batch()
    batch["has_anat"][2] = False
    embedding, pairs = model.embed(batch), model.embed_pairs(batch)
    assert embedding.shape == (4, WIDTH) == (4, model.width)
    assert torch.allclose(embedding.norm(dim=1), torch.ones(4))
    kept = [0, 1, 3]
    assert torch.allclose(embedding[kept], pairs.first[kept], atol=1e-6)
    assert torch.allclose(embedding[2], pairs.second[2], atol=1e-6)
    assert pairs.paired.tolist() == [True, True, False, True]


def test_people_who_are_nearly_the_same_are_told_apart_once_it_has_settled() -> None:
    model, batch = cinp().train(), make_batch(6)
    raw = torch.nn.functional.normalize(model.image(batch["anat"]), dim=1)
    assert float((raw @ raw.T).min().detach()) > 0.9
    model.settle([rows(batch, slice(0, 4)), rows(batch, slice(4, 6))])
    assert model.training
    embedding = model.eval().embed(batch)
    apart = (embedding @ embedding.T).fill_diagonal_(0)
    assert float(apart.max().detach()) < 0.9


def test_an_embedding_does_not_depend_on_what_is_embedded_with_it() -> None:
    model, batch = cinp().eval(), make_batch()
    assert torch.allclose(model.embed(rows(batch, [1]))[0], model.embed(batch)[1], atol=1e-5)


def test_training_is_the_same_for_a_seed_and_evaluation_changes_no_image() -> None:
    model, batch = cinp().train(), make_batch()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(model.loss(batch)["loss"].detach()))
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(1)
    changed = model.embed(batch)
    assert not torch.allclose(changed, model.eval().embed(batch), atol=1e-4)
    assert torch.equal(model.embed(batch), model.embed(batch))


def test_images_are_changed_in_the_brain_alone_and_each_by_its_own_number() -> None:
    images = make_batch()["anat"]
    change = ImageChanges(ChangeSettings(flip=0.0, share=1.0))
    changed = change(images, [1, 2, 3, 4])
    assert torch.equal(changed[:, :6], images[:, :6])
    assert not torch.allclose(changed, images, atol=0.01)
    assert torch.equal(change(images[2:], [3, 4]), changed[2:])
    flipped = ImageChanges(ChangeSettings(flip=1.0, share=0.0))(images, [1, 2, 3, 4])
    assert type(flipped) is Tensor
    assert torch.equal(flipped, images.flip(-1))


def test_changes_are_as_strong_as_the_settings_say() -> None:
    images, seeds = make_batch(8)["anat"] + 0.5, list(range(8))
    still = {"flip": 0.0, "share": 1.0, "scale": 0.0, "shift": 0.0, "noise": 0.0}

    def change(**changed: float) -> Tensor:
        return ImageChanges(ChangeSettings(**still | changed))(images, seeds)

    assert torch.equal(change(), images)
    factors = change(scale=0.2) / images
    shifts = change(shift=0.2) - images
    for found in (factors.flatten(1) - 1, shifts.flatten(1)):
        assert float(found.std(1).max()) < 1e-6
        assert float(found.mean(1).std()) > 0.05
        assert float(found.abs().max()) < 0.2
    noise = change(noise=0.2) - images
    spread = noise.flatten(1).std(1)
    assert 0 < float(spread.min()) < float(spread.max()) < 0.21
    same = (change(share=0.5, shift=0.2) == images).flatten(1).all(1)
    assert 0 < int(same.sum()) < len(images)


def test_a_share_of_cubes_is_hidden() -> None:
    hidden = hide_cubes((32, 24, 20), 8, 0.3, [5, 6])
    assert hidden.shape == (2, 32, 24, 20)
    cubes = hidden[:, ::8, ::8, ::8]
    assert cubes.flatten(1).sum(1).tolist() == [11, 11]  # of 4 * 3 * 3
    assert torch.equal(hidden[0, 8:16, 16:, :8], hidden[0, 8:9, 16:17, :1].expand(8, 8, 8))
    assert not torch.equal(hidden[0], hidden[1])
    assert torch.equal(hide_cubes((32, 24, 20), 8, 0.3, [6])[0], hidden[1])


def test_masked_modelling_rebuilds_what_is_hidden_of_the_brain() -> None:
    model, batch = cinp(inm=0.0).eval(), make_batch(2)
    torch.manual_seed(0)
    zeros = float(model.loss({**batch, "anat": batch["anat"] * 0})["mim"])
    assert zeros == 0  # no brain, nothing to be wrong about
    with torch.no_grad():
        last = model.head.decoder.layers[-1]
        last.weight.zero_()
        last.bias.fill_(0.25)
    anat = torch.where(batch["anat"] > 0, 0.75, 0.0)
    assert float(model.loss({**batch, "anat": anat})["mim"]) == pytest.approx(0.5)


def test_batches_that_are_contrasted_are_not_accumulated() -> None:
    with pytest.raises(ValueError, match="batch_size instead, and set `chunk`"):
        Settings(family="cinp", **SMALL, pretrain=Pretrain(accumulate=2))


def test_learning_pairs_makes_them_find_each_other() -> None:
    plain = ChangeSettings(share=0.0, flip=0.0)
    model, batch = cinp(mim=0.0, inm=0.0, changes=plain).train(), make_batch()
    # Of each person, another quarter of the brain is bright.
    for number, image in enumerate(batch["anat"]):
        image[:, 8 * number : 8 * number + 8] *= 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = model.loss(batch)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = model.loss(batch)
    assert losses[-1] < losses[0] / 2
    assert float(found["top1_image"]) == float(found["top1_network"]) == 1


def test_the_number_of_regions_is_that_of_the_data() -> None:
    assert cinp().n_rois == ROIS
    assert cinp().head.network.layers[0].attention.query.in_features == ROIS
