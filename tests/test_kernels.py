"""What runs the scan: the switch, the compiled forms, and the reference's own kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_ssm import output_and_gradients, relative_errors, scan_inputs

from neuromamba.config.schema import Compute
from neuromamba.files import InputError
from neuromamba.models.compiled import compiled_on_gpu
from neuromamba.models.kernels import mamba_ssm_scan, run_ssd
from neuromamba.models.rowwise import (
    causal_conv_silu,
    conv_silu_plain,
    gated_norm_plain,
    gated_rms_norm,
)
from neuromamba.models.ssd import first_steps, ssd_chunked, ssd_recurrence
from neuromamba.models.ssd_chunks import Inputs, backward_group, forward_group

SEQ_IDX = torch.tensor([0] * 70 + [1] * 1 + [2] * 229, dtype=torch.int32).expand(2, -1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_on_a_cpu_the_scan_is_the_packages_own(kernels) -> None:
    inputs = scan_inputs(300)
    expected = ssd_chunked(*inputs, seq_idx=SEQ_IDX)
    assert torch.equal(run_ssd(*inputs, seq_idx=SEQ_IDX, kernels=kernels), expected)
    assert not any(name.split(".")[0] == "mamba_ssm" for name in sys.modules)


def test_kernels_that_need_a_gpu_are_refused_on_a_cpu() -> None:
    with pytest.raises(InputError, match=r"compute.kernels is mamba-ssm.*on cpu; use auto"):
        run_ssd(*scan_inputs(5), kernels="mamba-ssm")


def test_the_switch_is_checked() -> None:
    with pytest.raises(ValueError, match="kernels"):
        Compute(kernels="cuda")


def test_plain_chains_equal_the_blocked_ones() -> None:
    torch.manual_seed(0)
    y, z, weight = torch.randn(2, 50, 6), torch.randn(2, 50, 6), torch.randn(6)
    inputs = [value.double().requires_grad_() for value in (y, z, weight)]
    expected = output_and_gradients(lambda *v: gated_norm_plain(*v, 1e-5), inputs)
    found = output_and_gradients(lambda *v: gated_rms_norm(*v, 1e-5), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12, msg=name)
    x, taps, bias = torch.randn(2, 300, 6), torch.randn(6, 4), torch.randn(6)
    inputs = [value.double().requires_grad_() for value in (x, taps, bias)]
    expected = output_and_gradients(lambda *v: conv_silu_plain(*v, SEQ_IDX), inputs)
    found = output_and_gradients(lambda *v: causal_conv_silu(*v, SEQ_IDX), inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12, msg=name)


def test_compiled_forms_give_the_same_numbers(monkeypatch) -> None:
    """What a GPU runs is one graph for all lengths; only its kernels are not made here."""
    monkeypatch.setattr("neuromamba.models.compiled.has_triton", lambda: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    forward, backward = compiled_on_gpu(forward_group), compiled_on_gpu(backward_group)
    conv, norm = compiled_on_gpu(conv_silu_plain), compiled_on_gpu(gated_norm_plain)
    for length in (300, 75):  # 5 and 2 chunks
        values = [v.detach().float() for v in scan_inputs(length)]
        starts = first_steps(SEQ_IDX[:, :length])
        inputs = Inputs(*values, starts).chunks(slice(0, length), 64)
        entry = torch.randn(2, 3, 4, 5)
        y, after = forward(inputs, entry)
        torch.testing.assert_close((y, after), forward_group(inputs, entry))
        found, expected = (f(inputs, entry, y, after) for f in (backward, backward_group))
        torch.testing.assert_close(found[0][:6], expected[0][:6], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
        x = values[0].flatten(2)
        taps = [torch.randn(15, 4), torch.randn(15), SEQ_IDX[:, :length]]
        torch.testing.assert_close(conv(x, *taps), conv_silu_plain(x, *taps))
        gate = [x.flip(1), torch.randn(15), 1e-5]
        torch.testing.assert_close(norm(x, *gate), gated_norm_plain(x, *gate))


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kernels", ["torch", "mamba-ssm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_on_a_gpu_equal_the_recurrence(kernels: str, dtype: torch.dtype) -> None:
    if kernels == "mamba-ssm" and isinstance(mamba_ssm_scan(), Exception):
        pytest.skip(f"mamba-ssm cannot be imported here: {mamba_ssm_scan()}")
    inputs = scan_inputs(300, head_dim=64, state=32)
    exact = [value.detach().to(dtype).double().requires_grad_() for value in inputs]
    expected = output_and_gradients(lambda *v: ssd_recurrence(*v, SEQ_IDX), exact)
    # The layer keeps dt, A and D in float32, also under autocast.
    dtypes = [dtype, torch.float32, torch.float32, dtype, dtype, torch.float32]
    given = [
        value.detach().to("cuda", kind).requires_grad_()
        for value, kind in zip(exact, dtypes, strict=True)
    ]
    seq_idx = SEQ_IDX.cuda()
    found = output_and_gradients(lambda *v: run_ssd(*v, 64, seq_idx, kernels), given)
    errors = relative_errors({name: value.cpu() for name, value in found.items()}, expected)
    # Products of float32 are made in TF32 by Triton.
    assert max(errors.values()) < (5e-3 if dtype == torch.float32 else 3e-2), errors


TRITON_INTERPRETER = """
import contextlib, sys, types
sys.path.insert(0, {tests!r})
import torch, triton
from test_kernels import SEQ_IDX, output_and_gradients, relative_errors, scan_inputs, ssd_chunked
from neuromamba.models.kernels import mamba_ssm_scan, ssd_by_mamba_ssm

scan = mamba_ssm_scan()
if isinstance(scan, Exception):
    raise scan
# The interpreter has no device to enter, to ask for its size, or to time configurations on.
torch.cuda.device = lambda index: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda _=None: types.SimpleNamespace(multi_processor_count=1)
for name, module in list(sys.modules.items()):
    if name.startswith("mamba_ssm."):
        for value in vars(module).values():
            if isinstance(value, triton.runtime.autotuner.Autotuner):
                value.configs = value.configs[:1]
inputs = [v.detach() for v in scan_inputs(90, heads=2, head_dim=16, state=16)]
seq_idx = SEQ_IDX[:, :90].contiguous()
expected = output_and_gradients(
    lambda *v: ssd_chunked(*v, 32, seq_idx), [v.clone().requires_grad_() for v in inputs]
)
found = output_and_gradients(
    lambda *v: ssd_by_mamba_ssm(scan, *v, 32, seq_idx), [v.float().requires_grad_() for v in inputs]
)
errors = relative_errors(found, expected)
assert max(errors.values()) < 1e-5, errors
print("equal")
"""


@pytest.mark.skipif(
    find_spec("mamba_ssm") is None or find_spec("triton") is None,
    reason="mamba-ssm or triton is not installed (docs/neuromamba.md says how)",
)
def test_mamba_ssm_under_the_triton_interpreter_equals_the_chunked_scan() -> None:
    """The reference's kernels, run on the CPU: a process of its own, as Triton asks for."""
    code = TRITON_INTERPRETER.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "equal\n", done.stderr
