"""The Brain Network Transformer against its equations (Kan et al. 2022)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from neuromamba.files import InputError
from neuromamba.models.brain_network_transformer import (
    BrainNetworkTransformer,
    NodeAttention,
    OrthonormalReadout,
    orthonormal_centers,
)

ROIS, HEADS, CLUSTERS = 7, 2, 3


def network(**changes) -> BrainNetworkTransformer:
    torch.manual_seed(0)
    sizes = {"depth": 2, "heads": HEADS, "hidden": 16, "clusters": CLUSTERS, **changes}
    return BrainNetworkTransformer(ROIS, 12, **sizes)


def networks(samples: int = 3) -> tuple[Tensor, Tensor]:
    series = np.random.default_rng(1).standard_normal((samples, 40, ROIS))
    fc = np.stack([np.corrcoef(one.T) for one in series])
    return torch.tensor(fc, dtype=torch.float32), torch.ones(samples, ROIS, dtype=torch.bool)


def test_centres_are_those_of_gram_schmidt() -> None:
    torch.manual_seed(3)
    centers = orthonormal_centers(CLUSTERS, ROIS).double().numpy()
    assert np.allclose(centers @ centers.T, np.eye(CLUSTERS), atol=1e-6)
    torch.manual_seed(3)
    bound = math.sqrt(6 / (CLUSTERS + ROIS))
    drawn = torch.empty(CLUSTERS, ROIS).uniform_(-bound, bound).double().numpy()
    # Gram-Schmidt is the QR decomposition whose diagonal is positive.
    q, r = np.linalg.qr(drawn.T)
    assert np.allclose(centers, (q * np.sign(np.diag(r))).T, atol=1e-6)


def test_more_clusters_than_regions_are_refused() -> None:
    with pytest.raises(InputError, match="at most 7 `clusters`"):
        network(clusters=8)


def test_attention_is_that_of_the_equation() -> None:
    torch.manual_seed(0)
    layer, nodes = NodeAttention(ROIS, HEADS).double(), networks(1)[0].double()
    present = torch.ones(1, ROIS, dtype=torch.bool)
    # Seven features in two heads: four channels each.
    z, mixed = nodes[0].numpy(), []
    weights = {name: one.detach().numpy() for name, one in layer.named_parameters()}
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (z @ weights[f"{n}.weight"][head].T for n in ("query", "key", "value"))
        score = np.exp(q @ k.T / math.sqrt(4))
        mixed.append(score / score.sum(1, keepdims=True) @ v)
    wanted = np.concatenate(mixed, 1) @ weights["out.weight"].T
    assert np.allclose(layer(nodes, present)[0].detach().numpy(), wanted, atol=1e-12)


def test_the_readout_is_that_of_the_equations() -> None:
    torch.manual_seed(0)
    readout, nodes = OrthonormalReadout(CLUSTERS, ROIS, False).double(), networks(2)[0].double()
    found = readout(nodes, torch.ones(2, ROIS, dtype=torch.bool))
    centers = readout.centers.numpy()
    for z, one in zip(nodes.numpy(), found.numpy(), strict=True):
        likeness = np.exp(z @ centers.T)
        shares = likeness / likeness.sum(1, keepdims=True)
        assert np.allclose(one, shares.T @ z, atol=1e-12)


def test_the_order_of_nodes_does_not_matter_but_that_of_features_does() -> None:
    model, (fc, present) = network().double(), networks()
    fc, order = fc.double(), torch.randperm(ROIS, generator=torch.Generator().manual_seed(2))
    read = model.read(fc, present)
    assert torch.allclose(model.read(fc[:, order], present), read, atol=1e-12)
    assert not torch.allclose(model.read(fc[:, :, order], present), read, atol=1e-3)


def test_missing_regions_have_no_influence() -> None:
    model, (fc, present) = network(), networks()
    present[0, 2] = False
    fc[0, :, 2] = 0
    moved = fc.clone()
    moved[0, 2] = 5.0
    assert torch.allclose(model(fc, present), model(moved, present), atol=1e-6)
    assert not torch.allclose(model(fc, present)[0], model(fc, present | True)[0], atol=1e-4)


def test_whoever_has_no_region_is_still_a_number() -> None:
    model, (fc, present) = network(), networks()
    present[1] = False
    embedding = model(torch.where(present[:, None], fc, 0.0), present)
    embedding.square().sum().backward()
    assert embedding.shape == (3, 12)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_centres_are_learnt_on_request_alone() -> None:
    named = dict(network(learn_centers=True).named_parameters())
    assert "readout.centers" in named
    assert "readout.centers" not in dict(network().named_parameters())
    assert "readout.centers" in network().state_dict()
