"""The same scan and the same layer by others, each behind the parameters of ours.

A scan is a function of (x, dt, A, B, C, D, chunk) with the shapes of
`neuromamba.models.ssd.ssd_chunked`. Other people's code is imported from where it is installed;
only the listing of the Mamba-2 paper is written out here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from common import package_without_init
from torch import Tensor, nn

from neuromamba.models.ssd import ssd_chunked, ssd_recurrence

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]


# --- The paper's listing --------------------------------------------------------------------------


def segment_sums(a: Tensor) -> Tensor:
    """Sums of `a` over (j, i], minus infinity for j > i: (..., n) -> (..., n, n)."""
    n = a.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=a.device).tril()
    repeated = a[..., None].expand(*a.shape, n).masked_fill(~lower.tril(-1), 0)
    return repeated.cumsum(-2).masked_fill(~lower, -torch.inf)


def listing(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int
) -> Tensor:
    """The minimal listing of the paper, with plain autograd.

    Source: T. Dao and A. Gu (2024), arXiv 2405.21060, listing 1 (`ssd`), in the same four steps and
    with the same contractions; written with torch's own reshapes instead of einops, with B and C
    shared by all heads, and with the padding, discretisation and skip connection around it that the
    paper leaves to the caller.
    """
    length, heads = x.shape[1:3]
    pad = -length % chunk
    values = (x * dt[..., None], dt * A, B.to(dt.dtype), C.to(dt.dtype))
    X, a, B, C = (
        F.pad(v, (*[0, 0] * (v.ndim - 2), 0, pad)).unflatten(1, (-1, chunk)) for v in values
    )
    B, C = (v[..., None, :].expand(*v.shape[:3], heads, -1) for v in (B, C))
    a = a.permute(0, 3, 1, 2)
    sums = a.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segment_sums(a).exp(), X)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (sums[..., -1:] - sums).exp(), X)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    between = segment_sums(F.pad(sums[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    across = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, sums.exp())
    return (inside + across).flatten(1, 2)[:, :length] + x * D[:, None]


# --- transformers ---------------------------------------------------------------------------------


def transformers_scan() -> Scan:
    """The torch path of the Mamba-2 of transformers (Apache-2.0), without its layer."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int
    ) -> Tensor:
        return mamba2_chunk_scan(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), chunk_size=chunk, D=D)

    return scan


def transformers_layer(ours: nn.Module, width: int, chunk: int) -> nn.Module:
    """The Mamba-2 layer of transformers with the weights of our layer."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    weights = ours.state_dict()
    inner, heads = len(weights["norm_weight"]), len(weights["D"])
    config = Mamba2Config(
        hidden_size=width,
        expand=inner // width,
        num_heads=heads,
        head_dim=inner // heads,
        state_size=(len(weights["conv_bias"]) - inner) // 2,
        conv_kernel=weights["conv_weight"].shape[1],
        n_groups=1,
        layer_norm_epsilon=1e-5,
        chunk_size=chunk,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    names = {
        "conv_weight": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "norm_weight": "norm.weight",
    }
    weights["conv_weight"] = weights["conv_weight"].unsqueeze(1)
    theirs.load_state_dict({names.get(name, name): value for name, value in weights.items()})
    return theirs


# --- mamba-ssm ------------------------------------------------------------------------------------


def mamba_ssm_module(path: str | None) -> ModuleType:
    """`mamba_ssm.ops.triton.ssd_combined`, also where mamba-ssm was built without CUDA.

    `import mamba_ssm` imports the CUDA extension of Mamba-1, which the scan of Mamba-2 does not
    use. So the package is made known without running its `__init__`. It needs triton and einops.
    `path` is a folder that holds the package `mamba_ssm`, if it is not installed.
    """
    package_without_init("mamba_ssm", path)
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


def mamba_ssm_reference(path: str | None) -> Scan:
    """The reference in torch that mamba-ssm (Apache-2.0) tests its kernels against."""
    reference = mamba_ssm_module(path).ssd_chunk_scan_combined_ref

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int
    ) -> Tensor:
        return reference(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), chunk, D=D)

    return scan


def mamba_ssm_triton(path: str | None) -> Scan:
    """The Triton kernels of mamba-ssm (Apache-2.0); they need a GPU."""
    kernels = mamba_ssm_module(path).mamba_chunk_scan_combined

    def scan(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int
    ) -> Tensor:
        return kernels(x, dt, A, B.unsqueeze(2), C.unsqueeze(2), chunk, D=D)

    return scan


# --- All of them ----------------------------------------------------------------------------------


def find_scan(name: str, mamba_ssm: str | None) -> Scan:
    """A scan by its name in the tables; `mamba_ssm` is the folder of that package, if any."""
    match name:
        case "ours":
            return ssd_chunked
        case "recurrence":
            return lambda x, dt, A, B, C, D, _: ssd_recurrence(x, dt, A, B, C, D)
        case "listing":
            return listing
        case "transformers":
            return transformers_scan()
        case "mamba-ssm-reference":
            return mamba_ssm_reference(mamba_ssm)
        case "mamba-ssm-triton":
            return mamba_ssm_triton(mamba_ssm)
    raise SystemExit(f"no side is called {name}")
