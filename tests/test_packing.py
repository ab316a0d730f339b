"""Packed sequences: none of the layer's parts looks across a boundary."""

from __future__ import annotations

import pytest
import torch
from test_ssm import output_and_gradients, relative_errors, scan_inputs
from torch import Tensor

from neuromamba.models import rowwise, ssd
from neuromamba.models.packing import Packing, mean_of_windows
from neuromamba.models.rowwise import causal_conv_silu, conv_silu_plain
from neuromamba.models.ssd import first_steps, ssd_chunked, ssd_recurrence
from neuromamba.models.ssm import Mamba2

LENGTHS = {
    "inside a chunk": [10, 20, 34],
    "at chunks' ends": [64, 64, 64],
    "of one step": [1, 1, 1, 70, 1],
    "over groups": [130, 3, 200],
}


def ids(lengths: list[int]) -> Tensor:
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


@pytest.fixture(params=[1 << 17, 1])
def _group_sizes(request, monkeypatch) -> None:
    monkeypatch.setattr(ssd, "CACHE_ELEMENTS", request.param)


@pytest.mark.usefixtures("_group_sizes")
@pytest.mark.parametrize("name", LENGTHS)
def test_chunked_scan_of_packed_sequences_equals_the_recurrence(name: str) -> None:
    lengths = LENGTHS[name]
    inputs = scan_inputs(sum(lengths))
    # The second row of the batch is packed otherwise than the first.
    seq_idx = torch.stack([ids(lengths), ids(lengths[::-1])])
    expected = output_and_gradients(lambda *v: ssd_recurrence(*v, seq_idx), inputs)
    found = output_and_gradients(lambda *v: ssd_chunked(*v, seq_idx=seq_idx), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_packed_recurrence_is_that_of_each_sequence_alone() -> None:
    lengths = [10, 1, 23]
    x, dt, A, B, C, D = scan_inputs(sum(lengths))
    packed = ssd_recurrence(x, dt, A, B, C, D, ids(lengths).expand(2, -1))
    parts = zip(*(v.split(lengths, dim=1) for v in (x, dt, B, C)), strict=True)
    alone = [ssd_recurrence(x, dt, A, B, C, D) for x, dt, B, C in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=0)


@pytest.mark.parametrize("steps", ["tiny", "huge", "tiny and huge"])
def test_float32_keeps_its_digits_beside_boundaries(steps: str) -> None:
    inputs = scan_inputs(150, head_dim=16, state=16, steps=steps)
    seq_idx = ids([7, 1, 1, 60, 81]).expand(2, -1)
    expected = output_and_gradients(lambda *v: ssd_recurrence(*v, seq_idx), inputs)
    single = [value.detach().float().requires_grad_() for value in inputs]
    found = output_and_gradients(lambda *v: ssd_chunked(*v, seq_idx=seq_idx), single)
    errors = relative_errors(found, expected)
    assert max(errors.values()) < 1e-6, errors


def test_first_steps() -> None:
    seq_idx = torch.tensor([[0, 0, 1, 1], [5, 7, 7, 7]])
    expected = [[True, False, True, False], [True, True, False, False]]
    assert first_steps(seq_idx).tolist() == expected


@pytest.mark.parametrize("lengths", [[12], [5, 1, 6], [1, 1, 2, 8], [3, 9]])
@pytest.mark.parametrize("block", [1 << 16, 1])
def test_packed_convolution_is_that_of_each_sequence_alone(lengths, block, monkeypatch) -> None:
    monkeypatch.setattr(rowwise, "CACHE_ELEMENTS", block)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 12, 3), torch.randn(3, 4), torch.randn(3)]
    inputs = [value.double().requires_grad_() for value in inputs]
    seq_idx = ids(lengths).expand(2, -1)

    def alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([causal_conv_silu(p, weight, bias) for p in x.split(lengths, 1)], 1)

    expected = output_and_gradients(alone, inputs)
    for function in (causal_conv_silu, conv_silu_plain):
        found = output_and_gradients(lambda *v, f=function: f(*v, seq_idx), inputs)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_a_layer_reads_packed_sequences_as_if_alone() -> None:
    torch.manual_seed(0)
    layer, lengths = Mamba2(16, 4, 8, chunk=8).double(), [3, 20, 1, 9]
    u = torch.randn(2, sum(lengths), 16).double()
    alone = torch.cat([layer(part) for part in u.split(lengths, 1)], 1)
    packed = layer(u, ids(lengths).expand(2, -1))
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["t-fastest", "space-fastest"])
def test_sequence_and_grid(order: str) -> None:
    packing = Packing([2, 1, 3], 4, order)
    grid = torch.arange(6 * 4 * 2).reshape(6, 4, 2)
    sequence = packing.to_sequence(grid)
    assert torch.equal(packing.to_grid(sequence), grid)
    first = sequence[:8, 0] // 2
    expected = list(range(8)) if order == "t-fastest" else [0, 4, 1, 5, 2, 6, 3, 7]
    assert first.tolist() == expected
    assert packing.seq_idx(grid.device).tolist() == [[0] * 8 + [1] * 4 + [2] * 12]
    assert packing._replace(patches=[6]).seq_idx(grid.device) is None


def test_every_window_counts_the_same() -> None:
    assert mean_of_windows((torch.tensor([1.0, 3.0]), torch.tensor([8.0]))) == 5
