"""Walks on the graph of correlations, and the mixture of experts, against float64 references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from neuromamba.models.random_walk import (
    RandomWalkExperts,
    correlation,
    imbalance,
    strongest,
    transitions,
    walk,
)
from neuromamba.models.roi_layers import TIME_FEATURES

ROIS, VOLUMES = 7, 30


def series(samples: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(samples, 1, VOLUMES, generator=generator, dtype=torch.float64)
    own = torch.randn(samples, ROIS, VOLUMES, generator=generator, dtype=torch.float64)
    sign = torch.tensor([1.0, 1, 1, -1, -1, 1, 0], dtype=torch.float64)
    return sign[:, None] * shared + own


def steps_of(values: Tensor, neighbors: int = 3, signed: bool = False, **changes) -> list[Tensor]:
    visible = torch.ones_like(values, dtype=torch.bool)
    given = {"usable_BR": visible.any(-1), "affinity_RR": torch.zeros(ROIS, ROIS), **changes}
    return transitions(correlation(values, visible), neighbors=neighbors, signed=signed, **given)


def reference_steps(values: np.ndarray, neighbors: int, sign: int) -> np.ndarray:
    """One sample's matrix, by loops."""
    r = sign * np.corrcoef(values)
    found = np.zeros_like(r)
    for i in range(len(r)):
        others = sorted((j for j in range(len(r)) if j != i), key=lambda j: -r[i, j])
        kept = [j for j in others[:neighbors] if r[i, j] > 0]
        for j in kept:
            found[i, j] = r[i, j] / sum(r[i, k] for k in kept)
    return found


def test_correlations_are_those_of_numpy() -> None:
    values = series() * 3 + 5
    found = correlation(values, torch.ones_like(values, dtype=torch.bool))
    for sample, each in zip(found, values, strict=True):
        np.testing.assert_allclose(sample, np.corrcoef(each), atol=1e-9)


def test_correlations_are_of_what_is_visible_in_both() -> None:
    values = series(1)
    visible = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    found = correlation(values, visible)[0].numpy()
    x, v = values[0].numpy(), visible[0].numpy()
    for i in range(ROIS):
        for j in range(ROIS):
            both = v[i] & v[j]
            a, b = x[i, both] - x[i, v[i]].mean(), x[j, both] - x[j, v[j]].mean()
            assert found[i, j] == pytest.approx(a @ b / np.sqrt(a @ a * (b @ b)), abs=1e-9)
    hidden = torch.where(visible, values, 1e6)
    np.testing.assert_array_equal(correlation(hidden, visible)[0].numpy(), found)


def test_a_roi_without_a_visible_value_or_without_change_correlates_with_none() -> None:
    values, visible = series(1), torch.ones(1, ROIS, VOLUMES, dtype=torch.bool)
    visible[0, 1] = False
    values[0, 2] = 3.0
    found = correlation(values, visible)[0]
    assert (found[1:3] == 0).all()
    assert (found[:, 1:3] == 0).all()


@pytest.mark.parametrize("neighbors", [1, 3, 50])
def test_steps_against_loops(neighbors: int) -> None:
    values = series()
    positive, negative = steps_of(values, neighbors, signed=True)
    for k in range(len(values)):
        expected = reference_steps(values[k].numpy(), neighbors, -1)
        np.testing.assert_allclose(negative[k], expected, atol=1e-9)
        # The last ROI may have no positive correlation; see the test of such ROIs.
        expected = reference_steps(values[k].numpy(), neighbors, 1)
        some = expected.sum(1) > 0
        np.testing.assert_allclose(positive[k][some], expected[some], atol=1e-9)
        np.testing.assert_allclose(positive[k].sum(1), 1, atol=1e-9)


def test_only_the_strongest_are_kept() -> None:
    weight = torch.tensor([[[0.0, 0.5, -0.7, 0.2, 0.3]]])
    assert strongest(weight, 2).tolist() == [[[0.0, 0.5, 0.0, 0.0, pytest.approx(0.3)]]]
    assert (strongest(weight, 5) > 0).sum() == 3


def test_a_walk_is_the_power_of_the_matrix() -> None:
    graphs = steps_of(series(), signed=True)
    features = torch.randn(2, ROIS, 4, dtype=torch.float64)
    found = walk(graphs, features, 3)
    assert len(found) == 6
    for place, (graph, steps) in enumerate((graph, k) for graph in graphs for k in (1, 2, 3)):
        expected = torch.linalg.matrix_power(graph, steps) @ features
        torch.testing.assert_close(found[place], expected)


def test_a_walk_reaches_regions_that_are_not_neighbours() -> None:
    chain = torch.zeros(1, 4, 4, dtype=torch.float64)
    chain[0, 0, 1] = chain[0, 1, 2] = chain[0, 2, 3] = chain[0, 3, 2] = 1
    reached = walk([chain], torch.eye(4, dtype=torch.float64)[None], 3)
    assert [one[0, 0].argmax().item() for one in reached] == [1, 2, 3]


def test_missing_rois_are_never_reached() -> None:
    usable = torch.ones(2, ROIS, dtype=torch.bool)
    usable[0, 2] = False
    for graph in steps_of(series(), neighbors=50, signed=True, usable_BR=usable):
        assert (graph[0, :, 2] == 0).all()
        assert (graph[1, :, 2] > 0).any()


def test_a_roi_that_correlates_with_none_steps_by_likeness() -> None:
    values, usable = series(1), torch.ones(1, ROIS, dtype=torch.bool)
    values[0, 1], usable[0, 5] = 0.0, False
    affinity = torch.randn(ROIS, ROIS, requires_grad=True)
    (graph,) = steps_of(values, usable_BR=usable, affinity_RR=affinity)
    allowed = [0, 2, 3, 4, 6]
    torch.testing.assert_close(graph[0, 1, allowed].float(), affinity[1, allowed].softmax(0))
    assert (graph[0, 1, [1, 5]] == 0).all()
    graph[0, 1, 3].backward()
    assert (affinity.grad[1, allowed] != 0).all()
    assert (affinity.grad[[0, 2]] == 0).all()


def test_one_roi_alone_steps_nowhere() -> None:
    usable = torch.zeros(1, ROIS, dtype=torch.bool)
    usable[0, 3] = True
    (graph,) = steps_of(series(1), usable_BR=usable)
    assert (graph[0, 3] == 0).all()
    assert graph.isfinite().all()


def test_the_gradient_passes_through_the_graph() -> None:
    features = torch.randn(1, ROIS, 2, dtype=torch.float64)

    def reached(values: Tensor) -> Tensor:
        return torch.stack(walk(steps_of(values, neighbors=4, signed=True), features, 2))

    assert torch.autograd.gradcheck(reached, series(1).requires_grad_(), atol=1e-6)


# --- The mixture ---------------------------------------------------------------------------------

WIDTH, REGION_WIDTH, WALKS, EXPERTS, TIMES = 4, 6, 2, 3, 5


def mixture(top_k: int | None = None) -> RandomWalkExperts:
    torch.manual_seed(0)
    found = RandomWalkExperts(WIDTH, REGION_WIDTH, WALKS, EXPERTS, top_k).double()
    torch.nn.init.normal_(found.out_bias)
    return found


def inputs() -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    states = [torch.randn(2, ROIS, TIMES, WIDTH).double() for _ in range(1 + WALKS)]
    embedding, vectors = torch.randn(ROIS, REGION_WIDTH), torch.randn(2, ROIS, WALKS * REGION_WIDTH)
    time = torch.randn(2, TIMES, TIME_FEATURES)
    return states[0], states[1:], embedding.double(), vectors.double(), time.double()


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_mixture_is_the_gated_sum_of_its_experts(top_k: int | None) -> None:
    model = mixture(top_k)
    h, reached, embedding, vectors, time = inputs()
    mixed, gates = model(h, reached, embedding, vectors, time)
    b, r, t = 1, 4, 2
    state = torch.cat([h[b, r, t], *(one[b, r, t] for one in reached)])
    place = torch.cat([embedding[r], vectors[b, r]])
    logits = model.gate_state(h[b, r, t]) + model.gate_roi(place) + model.gate_time(time[b, t])
    if top_k is not None:
        logits[logits.argmin()] = -torch.inf
    weights = logits.softmax(0)
    torch.testing.assert_close(gates[b, r, t].double(), weights, atol=1e-6, rtol=1e-6)
    hidden = torch.nn.functional.gelu(model.states(state) + model.vectors(vectors[b, r]))
    expected = torch.zeros(WIDTH).double()
    for e in range(EXPERTS):
        own = slice(e * WIDTH, (e + 1) * WIDTH)
        expected += weights[e] * (model.out.weight[:, own] @ hidden[own] + model.out_bias[e])
    torch.testing.assert_close(mixed[b, r, t], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("top_k", [None, 1, 2, EXPERTS])
def test_weights_sum_to_one_over_the_experts_that_are_used(top_k: int | None) -> None:
    gates = mixture(top_k)(*inputs())[1]
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, ROIS, TIMES))
    assert ((gates > 0).sum(-1) == (top_k or EXPERTS)).all()


@pytest.mark.parametrize("part", ["state", "embedding", "vectors", "time"])
def test_the_gate_reads_the_state_the_place_the_walks_and_the_time(part: str) -> None:
    model = mixture()
    h, _, embedding, vectors, time = inputs()
    given = {"state": h, "embedding": embedding, "vectors": vectors, "time": time}
    changed = {**given, part: given[part] + 1}
    assert not torch.allclose(model.gate(*given.values()), model.gate(*changed.values()))


def test_imbalance_is_least_where_all_experts_are_used_alike() -> None:
    present = torch.ones(2, ROIS, dtype=torch.bool)
    uniform = torch.full((2, ROIS, TIMES, EXPERTS), 1 / EXPERTS)
    assert imbalance(uniform, present).item() == pytest.approx(0, abs=1e-6)
    # Each does another part of the work alone: as balanced.
    split = torch.eye(EXPERTS)[torch.arange(6) % EXPERTS].view(1, 6, 1, EXPERTS)
    assert imbalance(split, torch.ones(1, 6, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-6)
    alone = torch.zeros_like(uniform)
    alone[..., 1] = 1
    assert imbalance(alone, present).item() == pytest.approx(EXPERTS - 1)
    tilted = torch.randn(2, ROIS, TIMES, EXPERTS).softmax(-1)
    assert 0 < imbalance(tilted, present) < EXPERTS - 1


def test_imbalance_is_of_each_sample_and_of_the_rois_there_are() -> None:
    gates = torch.randn(2, ROIS, TIMES, EXPERTS).softmax(-1)
    present = torch.ones(2, ROIS, dtype=torch.bool)
    present[:, 5:] = False
    each = [imbalance(gates[k : k + 1, :5], present[k : k + 1, :5]) for k in range(2)]
    torch.testing.assert_close(imbalance(gates, present), torch.stack(each).mean())


def test_learning_the_imbalance_alone_makes_the_gate_even() -> None:
    model, given = mixture(), inputs()
    with torch.no_grad():
        model.gate_state.bias[0] = 3.0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    present = torch.ones(2, ROIS, dtype=torch.bool)
    first = imbalance(model(*given)[1], present).item()
    for _ in range(100):
        optimizer.zero_grad()
        imbalance(model(*given)[1], present).backward()
        optimizer.step()
    assert imbalance(model(*given)[1], present).item() < 0.02 * first
