"""Load weights of a Swin Transformer that others have published, and tell which of them fitted.

Meant for the self-supervised weights of MONAI's Swin UNETR (`model_swinvit.pt`), which name the
same encoder by older names. Files are read without unpickling anything but tensors and plain
containers: `torch.load(weights_only=True)`, or safetensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from neuromamba.files import InputError, digest_file

_PREFIXES = ("module.", "model.", "swinViT.", "swin_vit.", "backbone.")
_RENAMED = {".mlp.fc1.": ".mlp.linear1.", ".mlp.fc2.": ".mlp.linear2."}
_CONTAINERS = ("state_dict", "model")


@dataclass(frozen=True)
class KeyReport:
    """What became of each tensor of a file and of a network, by the network's names.

    Attributes
    ----------
    loaded
        Taken over.
    missing
        Of the network, and not in the file: they stay as they were drawn.
    unused
        In the file, and not of the network.
    misfits
        Of both, with different shapes: `name (file shape, network shape)`. They stay as they were.
    """

    loaded: list[str]
    missing: list[str]
    unused: list[str]
    misfits: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("missing", "misfits", "unused"):
            if names := getattr(self, what):
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                parts.append(f"{len(names)} {what} ({shown})")
        return "; ".join(parts)


def load_image_weights(network: nn.Module, path: Path) -> KeyReport:
    """Copy the tensors of a file into those of `network` that have the same name and shape.

    Parameters
    ----------
    network
        MONAI's `SwinTransformer`.
    path
        `.safetensors`, or what `torch.save` has written: tensors by name, or a dict with such ones
        under `state_dict` or `model`.

    Raises
    ------
    InputError
        When the file cannot be read as tensors alone, or none of them fits.
    """
    own = {name: one.detach() for name, one in network.named_parameters()}
    # Which places are neighbours follows from the sizes, and is nothing that was learnt.
    computed = {name for name, _ in network.named_buffers()}
    named = {_our_name(name): value for name, value in _read(path).items()}
    found = {name: value for name, value in named.items() if name not in computed}
    fitting = {n: v for n, v in found.items() if n in own and v.shape == own[n].shape}
    misfits = [
        f"{name} ({tuple(found[name].shape)}, {tuple(own[name].shape)})"
        for name in own
        if name in found and name not in fitting
    ]
    report = KeyReport(
        loaded=[name for name in own if name in fitting],
        missing=[name for name in own if name not in found],
        unused=[name for name in found if name not in own],
        misfits=misfits,
    )
    if not fitting:
        raise InputError(
            f"{path}: none of its {len(found)} tensors fits the image encoder ({report}); give "
            "weights of a Swin Transformer with the same feature_size, or set image_weights to null"
        )
    network.load_state_dict(fitting, strict=False)
    return report


def digest_weights(path: Path) -> str:
    """Digest of the file; `InputError` when it does not exist."""
    if not path.is_file():
        raise InputError(_absent(path))
    return digest_file(path)


def _absent(path: Path) -> str:
    return f"{path} does not exist; set image_weights to the file of the weights, or to null"


def _our_name(name: str) -> str:
    """The name that MONAI's encoder has now for a tensor."""
    while start := next((one for one in _PREFIXES if name.startswith(one)), ""):
        name = name.removeprefix(start)
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(_absent(path)) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as weights alone ({' '.join(str(error).split())[:200]}); it is "
            "damaged, or holds objects, which are never unpickled: save its tensors as safetensors"
        ) from error
    for name in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    tensors = content if isinstance(content, Mapping) else {}
    return {str(name): one for name, one in tensors.items() if isinstance(one, Tensor)}
