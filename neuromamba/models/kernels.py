"""Which code runs the state-space scan: this package's, or the reference's CUDA kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Literal

import torch
from torch import Tensor

from neuromamba.files import InputError
from neuromamba.models.ssd import ssd_chunked

Kernels = Literal["auto", "torch", "mamba-ssm"]


def run_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk: int = 64,
    seq_idx: Tensor | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Run the scan of `neuromamba.models.ssd.ssd_chunked`, whose parameters these are.

    Parameters
    ----------
    kernels : str
        `torch`: `ssd_chunked`, compiled on a GPU. `mamba-ssm`: the Triton kernels of the package
        `mamba_ssm`, which exist for a GPU only. `auto`: those where they are installed and the
        tensors are on a GPU, else `ssd_chunked`. Nothing is imported for tensors on a CPU.

    Raises
    ------
    InputError
        When `kernels` is `mamba-ssm` and they cannot run here.
    """
    if kernels == "torch" or (kernels == "auto" and not x.is_cuda):
        return ssd_chunked(x, dt, A, B, C, D, chunk, seq_idx)
    if not x.is_cuda:
        raise InputError(
            f"compute.kernels is mamba-ssm, which needs a GPU, and the model is on {x.device}; "
            "use auto or torch"
        )
    scan = mamba_ssm_scan()
    if isinstance(scan, Exception):
        if kernels == "auto":
            return ssd_chunked(x, dt, A, B, C, D, chunk, seq_idx)
        raise InputError(
            f"compute.kernels is mamba-ssm, and it cannot be imported ({scan}); docs/neuromamba.md "
            "says how to install it; or use auto or torch"
        ) from scan
    return ssd_by_mamba_ssm(scan, x, dt, A, B, C, D, chunk, seq_idx)


def ssd_by_mamba_ssm(
    scan: Callable[..., Tensor],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    chunk: int,
    seq_idx: Tensor | None,
) -> Tensor:
    """Call `mamba_chunk_scan_combined`, which has an axis of groups in B and C, with one group."""
    return scan(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), chunk, D=D, seq_idx=seq_idx)


@cache
def mamba_ssm_scan() -> Callable[..., Tensor] | Exception:
    """`mamba_chunk_scan_combined`, or why it cannot be had."""
    try:
        if (spec := find_spec("mamba_ssm")) is None:
            raise ModuleNotFoundError("mamba_ssm is not installed")
        if find_spec("selective_scan_cuda") is None and "mamba_ssm" not in sys.modules:
            # The package's __init__ imports Mamba-1's CUDA extension, which a build without nvcc
            # does not have. The Triton kernels do not need it, so that __init__ is passed by.
            sys.modules["mamba_ssm"] = module_from_spec(spec)
        module = import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as error:  # it fails in many ways: Triton, CUDA, its own extensions
        return error
    return torch.compiler.disable(module.mamba_chunk_scan_combined)
