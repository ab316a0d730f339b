"""SwiFT and NeuroSTORM from checkouts of their published code, with their published settings.

Nothing of theirs is contained here. What they import must be installed: `requirements.txt`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from common import package_without_init
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SETTINGS: dict[str, Any] = {
    "img_size": (96, 96, 96, 20),
    "in_chans": 1,
    "embed_dim": 36,
    "window_size": (4, 4, 4, 4),
    "first_window_size": (4, 4, 4, 4),
    "patch_size": (6, 6, 6, 1),
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "c_multiplier": 2,
    "last_layer_full_MSA": True,
}
"""Of SwiFT's `sample_scripts/sample_script.sh` and NeuroSTORM's `scripts/configs/models`."""

WINDOWS_AT_ONCE = 32


def swift(path: str) -> nn.Module:
    """SwiFT's backbone from a checkout of github.com/Transconnectome/SwiFT (Apache-2.0)."""
    _without_nvtx()
    package_without_init("module", f"{path}/project")
    package_without_init("module.models")
    module = importlib.import_module("module.models.swin4d_transformer_ver7")
    return module.SwinTransformer4D(**SETTINGS, to_float=True)


def neurostorm(path: str, pretraining: bool) -> tuple[nn.Module, str]:
    """NeuroSTORM from a checkout of github.com/CUHK-AIM-Group/NeuroSTORM (Apache-2.0), and a note.

    Either its backbone or its masked autoencoder. Its blocks are the Mamba-1 of mamba-ssm, whose
    scan is a CUDA extension. Without that they run with the scan below: the same numbers, and times
    that say little about NeuroSTORM on a GPU. The note says which it was.
    """
    _without_nvtx()
    note = "mamba-ssm's CUDA scan"
    try:
        importlib.import_module("mamba_ssm")
    except ImportError as error:
        note = f"a scan in torch in place of mamba-ssm's CUDA kernel ({error})"
        _mamba_ssm_without_cuda()
    package_without_init("models", path)
    module = importlib.import_module("models.neurostorm")
    if not pretraining:
        return module.NeuroSTORM(**SETTINGS), note
    masks = {"mask_ratio": 0.5, "spatial_mask": "window", "time_mask": "random"}
    return module.NeuroSTORMMAE(**SETTINGS, **masks), note


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """Mamba-1's scan with the parameters of mamba-ssm's `selective_scan_fn`.

    Source: A. Gu and T. Dao (2023), arXiv 2312.00752, algorithm 2. One step at a time, on some
    windows at once, recomputed in the backward pass: what fits in memory, and the fastest on a CPU
    of what was tried (mamba-ssm's own reference needs the square of the length).

    u, delta, z are (batch, channels, length), A (channels, state), B, C (batch, state, length).
    """
    if return_last_state or not delta_softplus or z is None:
        raise ValueError("needs z and delta_softplus, and gives no last state, as in a training")
    delta = F.softplus(delta if delta_bias is None else delta + delta_bias[:, None])
    parts = zip(*(v.split(WINDOWS_AT_ONCE) for v in (u, delta, B, C)), strict=True)
    y = torch.cat([checkpoint(_scan, A, *part, use_reentrant=False) for part in parts])
    return (y + u * D[:, None]) * F.silu(z)


def _scan(A: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    steps = zip(u.unbind(-1), delta.unbind(-1), B.unbind(-1), C.unbind(-1), strict=True)
    for u_t, delta_t, B_t, C_t in steps:
        update = (delta_t * u_t)[..., None] * B_t[:, None]
        state = torch.exp(delta_t[..., None] * A) * state + update
        outputs.append(torch.linalg.vecdot(state, C_t[:, None]))
    return torch.stack(outputs, dim=-1)


def _check_scan(reference: Callable[..., Tensor]) -> None:
    """Stop if `selective_scan` and mamba-ssm's reference do not give the same numbers."""
    u, delta, z = torch.randn(3, 2 * WINDOWS_AT_ONCE, 4, 10).unbind()
    B, C = torch.randn(2, 2 * WINDOWS_AT_ONCE, 3, 10).unbind()
    arguments = (u, delta, -torch.rand(4, 3), B, C, torch.randn(4), z, torch.randn(4), True)
    torch.testing.assert_close(selective_scan(*arguments), reference(*arguments))


def _mamba_ssm_without_cuda() -> None:
    """Let `from mamba_ssm import Mamba, Mamba2` work, with `selective_scan` as the scan."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
    package = package_without_init("mamba_ssm")
    # It is imported, and nothing of it is used.
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    _check_scan(interface.selective_scan_ref)
    simple = importlib.import_module("mamba_ssm.modules.mamba_simple")
    simple.selective_scan_fn = selective_scan  # type: ignore[attr-defined]
    package.Mamba = simple.Mamba  # type: ignore[attr-defined]
    package.Mamba2 = None  # type: ignore[attr-defined]


def _without_nvtx() -> None:
    """Both mark ranges for NVIDIA's profiler, which a CPU build of torch refuses."""
    if not torch.cuda.is_available():
        torch.cuda.nvtx.range_push = lambda *_: 0
        torch.cuda.nvtx.range_pop = lambda *_: 0
