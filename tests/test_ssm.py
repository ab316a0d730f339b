"""The Mamba-2 layer: the chunked scan, the row-wise chains and the whole layer, against their
equations written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuromamba.models import rowwise, ssd
from neuromamba.models.rowwise import causal_conv_silu, gated_rms_norm
from neuromamba.models.ssd import ssd_chunked, ssd_recurrence
from neuromamba.models.ssm import EPSILON, Mamba2

NAMES = ("x", "dt", "A", "B", "C", "D")
STEPS = {
    "usual": lambda u: 10 ** (-3 + 2 * u),
    "tiny": lambda u: torch.full_like(u, 1e-6),
    "huge": lambda u: torch.full_like(u, 50.0),
    "tiny and huge": lambda u: torch.where(u < 0.2, 50.0, 1e-6),
    "rarely huge": lambda u: torch.where(u < 0.03, 50.0, 1e-3),
}


def scan_inputs(
    length: int, batch: int = 2, heads: int = 3, head_dim: int = 5, state: int = 4, steps="usual"
) -> list[Tensor]:
    """Float64 tensors whose values float32 can hold."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).double()

    dt = STEPS[steps](torch.rand(batch, length, heads, generator=generator)).double()
    A = -torch.linspace(1, 16, heads).double()
    inputs = [
        normal(batch, length, heads, head_dim),
        dt,
        A,
        normal(batch, length, state),
        normal(batch, length, state),
        normal(heads),
    ]
    return [value.requires_grad_() for value in inputs]


def output_and_gradients(function, inputs: list[Tensor]) -> dict[str, Tensor]:
    y = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    gradients = torch.autograd.grad((y * weight).sum(), inputs)
    return {"y": y.detach(), **dict(zip(NAMES, gradients, strict=False))}


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: ((found[name].double() - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    }


@pytest.fixture(params=["one group", "a chunk a group"])
def _groups(request, monkeypatch) -> None:
    if request.param == "a chunk a group":
        monkeypatch.setattr(ssd, "CACHE_ELEMENTS", 1)


def test_recurrence_is_a_running_sum_without_decay() -> None:
    x, dt, A, B, C, _ = scan_inputs(7)
    y = ssd_recurrence(x, dt, 0 * A, B, C, torch.zeros(3).double())
    scores = torch.einsum("bin,bjn->bij", C, B).tril()
    torch.testing.assert_close(y, torch.einsum("bij,bjh,bjhp->bihp", scores, dt, x))


def test_recurrence_forgets_at_the_rate_of_dt_times_a() -> None:
    one = torch.ones(1, 1, 1, 1).double()
    x = torch.cat([one, 0 * one, 0 * one], dim=1)
    dt = torch.tensor([[[0.5], [0.25], [2.0]]]).double()
    B = C = torch.ones(1, 3, 1).double()
    y = ssd_recurrence(x, dt, torch.tensor([-3.0]).double(), B, C, torch.tensor([10.0]).double())
    expected = [0.5 + 10, 0.5 * math.exp(-0.75), 0.5 * math.exp(-6.75)]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected).double())


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130, 200])
def test_chunked_equals_recurrence(length: int) -> None:
    inputs = scan_inputs(length)
    expected = output_and_gradients(ssd_recurrence, inputs)
    found = output_and_gradients(ssd_chunked, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.usefixtures("_groups")
@pytest.mark.parametrize("steps", STEPS)
def test_float32_is_as_good_as_float32_gets(steps: str) -> None:
    inputs = scan_inputs(150, head_dim=16, state=16, steps=steps)
    expected = output_and_gradients(ssd_recurrence, inputs)
    single = [value.detach().float().requires_grad_() for value in inputs]
    errors = relative_errors(output_and_gradients(ssd_chunked, single), expected)
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.usefixtures("_groups")
def test_gradients_equal_finite_differences() -> None:
    inputs = scan_inputs(5, batch=2, heads=2, head_dim=2, state=2)
    assert torch.autograd.gradcheck(lambda *v: ssd_chunked(*v, chunk=2), inputs)


@pytest.mark.parametrize("chunk", [1, 7, 32, 256])
def test_chunk_size_changes_nothing(chunk: int) -> None:
    inputs = scan_inputs(100)
    expected = output_and_gradients(ssd_chunked, inputs)
    found = output_and_gradients(lambda *v: ssd_chunked(*v, chunk=chunk), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


def test_the_future_does_not_alter_the_past() -> None:
    inputs = scan_inputs(130)
    changed = [v.detach().clone() for v in inputs]
    for value in (changed[0], changed[1], changed[3], changed[4]):
        value[:, 70:] += 1
    before, after = ssd_chunked(*inputs), ssd_chunked(*changed)
    torch.testing.assert_close(after[:, :70], before[:, :70], rtol=0, atol=0)
    assert (after[:, 70:] - before[:, 70:]).abs().min(dim=1).values.max() > 0


def test_batch_mates_do_not_matter() -> None:
    x, dt, A, B, C, D = scan_inputs(100, batch=3)
    together = ssd_chunked(x, dt, A, B, C, D)
    for index in range(3):
        one = slice(index, index + 1)
        alone = ssd_chunked(x[one], dt[one], A, B[one], C[one], D)
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


def test_keeps_its_inputs_and_one_state_a_group_for_the_backward_pass() -> None:
    inputs = [v.detach().float().requires_grad_() for v in scan_inputs(4096, 1, 2, 16, 16)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()), lambda _: None):
        ssd_chunked(*inputs)
    assert sum(kept) < 1.05 * sum(v.numel() for v in inputs)


def test_bfloat16_costs_its_own_rounding_only() -> None:
    """Products are added up, and states carried, in float32: errors do not grow with length."""
    x, dt, A, B, C, D = (v.detach().float() for v in scan_inputs(2000))
    half = [x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16(), D]
    for value in half:
        value.requires_grad_()
    full = [v.detach().float().requires_grad_() for v in half]
    expected = output_and_gradients(ssd_chunked, full)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output_and_gradients(ssd_chunked, half)
    assert [found[name].dtype for name in NAMES] == [v.dtype for v in half]
    errors = relative_errors(found, {k: v.double() for k, v in expected.items()})
    assert max(errors.values()) < 3 * 2**-8, errors


# --- Row-wise chains ----------------------------------------------------------------------------


@pytest.fixture(params=[1 << 16, 40, 1])
def _rows(request, monkeypatch) -> None:
    monkeypatch.setattr(rowwise, "CACHE_ELEMENTS", request.param)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("length", [1, 2, 4, 17])
def test_causal_convolution(length: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = normal(2, length, 5), normal(5, 4), normal(5)
    padded = F.pad(x.mT, (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=5)).mT
    torch.testing.assert_close(causal_conv_silu(x, weight, bias), expected)
    assert torch.autograd.gradcheck(causal_conv_silu, (x, weight, bias))


@pytest.mark.usefixtures("_rows")
def test_gated_rms_norm() -> None:
    torch.manual_seed(0)
    y, z, weight = normal(2, 9, 5), normal(2, 9, 5), normal(5)
    expected = F.rms_norm(y * F.silu(z), (5,), weight, 1e-5)
    torch.testing.assert_close(gated_rms_norm(y, z, weight, 1e-5), expected)
    assert torch.autograd.gradcheck(lambda *v: gated_rms_norm(*v, 1e-5), (y, z, weight))


# --- The layer ----------------------------------------------------------------------------------


def layer_written_out(layer: Mamba2, u: Tensor) -> Tensor:
    """The layer as its equations stand in the paper, one operation after the other."""
    inner, heads = layer.out_proj.in_features, layer.D.numel()
    state = (layer.conv_bias.numel() - inner) // 2
    projected = u @ layer.in_proj.weight.T
    z, x, B, C, dt = projected.split([inner, inner, state, state, heads], dim=-1)
    xBC = torch.cat([x, B, C], dim=-1)
    taps = layer.conv_weight.shape[1]
    padded = F.pad(xBC, (0, 0, taps - 1, 0))
    windows = padded.unfold(1, taps, 1)
    xBC = F.silu((windows * layer.conv_weight).sum(-1) + layer.conv_bias)
    x, B, C = xBC.split([inner, state, state], dim=-1)
    y = ssd_recurrence(
        x.unflatten(-1, (heads, -1)),
        F.softplus(dt + layer.dt_bias),
        -layer.A_log.exp(),
        B,
        C,
        layer.D,
    ).flatten(2)
    gated = y * F.silu(z)
    scale = (gated.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    return (gated / scale * layer.norm_weight) @ layer.out_proj.weight.T


@pytest.mark.parametrize("length", [1, 2, 100])
def test_layer_equals_its_equations(length: int) -> None:
    torch.manual_seed(0)
    layer = Mamba2(width=8, state=4, head_dim=4, expand=2, conv=4, chunk=16).double()
    torch.nn.init.normal_(layer.norm_weight)
    torch.nn.init.normal_(layer.D)
    u = normal(2, length, 8)
    wanted = [u, *layer.parameters()]
    expected, found = layer_written_out(layer, u), layer(u)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_layer_starts_as_the_reference() -> None:
    torch.manual_seed(0)
    layer = Mamba2(width=512, state=8, head_dim=4)
    dt = F.softplus(layer.dt_bias)
    assert 0.99e-3 < dt.min() < 1.5e-3
    assert 0.07 < dt.max() < 0.101
    assert 0.008 < dt.log().mean().exp() < 0.0125, "log-uniform: the geometric mean is 0.01"
    A = layer.A_log.exp()
    assert 1 <= A.min() < 1.5
    assert 15.5 < A.max() <= 16
    assert (layer.D == 1).all()
    assert layer.conv_weight.abs().max() <= 0.5
