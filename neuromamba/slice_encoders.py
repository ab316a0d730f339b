"""The frozen autoencoders that slices are encoded by: DC-AE, as published, or our own.

Design choices
--------------
- Weights are read from safetensors and configs from JSON: reading them runs no code. The hub is
  asked only for a name on it, at the commit that the config names.
- Of DC-AE only the encoder is built. Weights that lack a part of it are refused; diffusers would
  draw it at random and say so in its log alone.
- The class is diffusers' `AutoencoderDC` (DC-AE, arXiv 2410.10733; TABLeT uses
  dc-ae-f32c32-in-1.0). Its code is taken as it is, without the factor that diffusion models scale
  it by, which the LayerNorm of the model that reads codes would take out again.
- bfloat16 on a GPU is as published; on a CPU, where it is slow, `auto` takes float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from neuromamba.checkpoint import load_model_info, load_weights
from neuromamba.config import Codes, Config, Slices
from neuromamba.files import InputError, digest_file, digest_folder, digest_json, read_json
from neuromamba.layout import Layout
from neuromamba.runtime import choose_device
from neuromamba.slice_autoencoder import SliceAutoencoder
from neuromamba.slices import BACKGROUND, GRID, Floats

WEIGHTS = "diffusion_pytorch_model.safetensors"
_WANTED = ["config.json", WEIGHTS, f"{WEIGHTS}.index.json", "diffusion_pytorch_model-*.safetensors"]
_SETTINGS = "settings"


@dataclass(frozen=True)
class SliceEncoder:
    """A frozen encoder of slices.

    Attributes
    ----------
    network
        The module, on `device` and of type `dtype`.
    function
        From (B, edge, edge) in [-1, 1] to codes (B, channels, 3, 3), by `network`.
    edge, channels
        Of the slices that it reads, and of the codes that it gives.
    digest
        Of its weights and sizes.
    facts
        `kind` (`dc-ae` or `slices`), `sha256` of the weights, `revision` on the hub or `None`,
        `channels`.
    batch_slices
        How many slices are encoded at a time.
    """

    network: nn.Module
    function: Callable[[Tensor], Tensor]
    edge: int
    channels: int
    digest: str
    facts: dict[str, Any]
    batch_slices: int
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def encode(self, slices: Floats) -> Floats:
        """Encode (slice, row, column) float32 in [-1, 1] to (slice, channel, 3, 3) float32."""
        codes = np.empty((len(slices), self.channels, GRID, GRID), dtype=np.float32)
        for first in range(0, len(slices), self.batch_slices):
            part = slice(first, first + self.batch_slices)
            images = torch.from_numpy(np.ascontiguousarray(slices[part]))
            images = images.to(self.device, self.dtype)
            codes[part] = self.function(images).float().cpu().numpy()
        return codes

    @cached_property
    def empty(self) -> Floats:
        """(channel, 3, 3) code of a slice without brain."""
        return self.encode(np.full((1, self.edge, self.edge), BACKGROUND, dtype=np.float32))[0]


def open_encoder(config: Config, dataset: str) -> SliceEncoder:
    """The encoder that the config names for a dataset, ready on the device.

    Raises
    ------
    InputError
        When its weights are absent, damaged, or not of such a model; when it does not make 3 x 3
        places of a slice; or for a GPU that is not there.
    """
    folder = Layout.of(config, dataset).tokenizer if config.codes.trained else None
    return load_encoder(config.codes, config.volumes.shape[0], config.compute.device, folder)


def load_encoder(
    codes: Codes, edge: int, device_name: str, own: Path | None = None
) -> SliceEncoder:
    """The encoder that `codes` name, for slices of `edge` voxels; errors as of `open_encoder`.

    `own` is the folder of a tokenizer that was trained here, where they name such a one.
    """
    device = choose_device(device_name)
    dtype = getattr(torch, precision_of(codes, device))
    loaded = _load_dcae(codes, edge) if own is None else _load_own(own, edge)
    network, channels, digest, facts = loaded
    network = network.to(device, dtype).eval().requires_grad_(False)
    encode = cast(Callable[[Tensor], Any], network.encode)
    function = encode if codes.trained else _of_three_channels(encode)
    facts = {"kind": codes.tokenizer, **facts, "channels": channels}
    how = (codes.batch_slices, device, dtype)
    return SliceEncoder(network, function, edge, channels, digest, facts, *how)


def precision_of(codes: Codes, device: torch.device) -> str:
    """`float32` or `bfloat16`."""
    if codes.precision != "auto":
        return codes.precision
    return "bfloat16" if device.type == "cuda" else "float32"


def _load_own(folder: Path, edge: int) -> tuple[nn.Module, int, str, dict[str, Any]]:
    info = load_model_info(folder)
    settings = Slices.model_validate(info[_SETTINGS]["slices"])
    if info[_SETTINGS]["edge"] != edge:
        raise InputError(
            f"{folder}: this tokenizer was trained on slices of {info[_SETTINGS]['edge']} voxels, "
            f"and volumes.shape has {edge}; run the tokenizer stage again"
        )
    network = SliceAutoencoder(settings, edge)
    load_weights(network, folder)
    digest = info["files"]["model.safetensors"]
    return network, settings.channels, digest, {"sha256": digest, "revision": None}


def _load_dcae(codes: Codes, edge: int) -> tuple[nn.Module, int, str, dict[str, Any]]:
    folder = _fetch(codes) if codes.on_hub else _folder(codes)
    files = _weight_files(folder)
    network, factor = _build(folder, files)
    channels = int(network.config["latent_channels"])
    if edge != GRID * factor:
        raise InputError(
            f"{folder}: this autoencoder makes one place of {factor} x {factor} voxels, and 3 x 3 "
            f"places need volumes.shape [{GRID * factor}, {GRID * factor}, {GRID * factor}], which "
            f"is [{edge}, {edge}, {edge}]; change it, or set codes.tokenizer to slices"
        )
    digests = {file.name: digest_file(file) for file in files}
    sha256 = digests[WEIGHTS] if list(digests) == [WEIGHTS] else digest_json(digests)
    facts = {"sha256": sha256, "revision": codes.revision}
    return network, channels, digest_folder(folder), facts


def _folder(codes: Codes) -> Path:
    folder = Path(str(codes.weights))
    if codes.weights is None or not (folder / "config.json").is_file():
        raise InputError(
            f"codes.weights: {codes.weights} is no folder with the config.json and the safetensors "
            "of a DC-AE in diffusers' layout; name one, or `owner/name` on the hub with its "
            "`revision`, or set codes.tokenizer to slices"
        )
    return folder


def _fetch(codes: Codes) -> Path:
    """The folder of a model on the hub, which is fetched once and then lies in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name = str(codes.weights)
    try:
        return Path(snapshot_download(name, revision=codes.revision, allow_patterns=_WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"codes.weights: {name} at {codes.revision} cannot be had from the hub ({why}); where "
            "there is no network, fetch its files elsewhere and name the folder"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (index := folder / f"{WEIGHTS}.index.json").is_file():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{folder}: {', '.join(missing)} is missing; fetch the folder again")
        return files
    raise InputError(
        f"{folder}: holds no {WEIGHTS}; weights in other forms can run code when they are read: "
        "save them as safetensors (`save_pretrained` of diffusers does)"
    )


def _build(folder: Path, files: list[Path]) -> tuple[Any, int]:
    """DC-AE without its decoder, with the weights of `files`; and how much it downsamples by."""
    from diffusers import AutoencoderDC  # takes seconds to load

    config = read_json(folder / "config.json")
    if config.get("_class_name", "AutoencoderDC") != "AutoencoderDC":
        raise InputError(
            f"{folder}: is a {config['_class_name']}, and codes are made by AutoencoderDC (DC-AE)"
        )
    tensors: dict[str, Tensor] = {}
    try:
        for file in files:
            tensors |= safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder} cannot be read ({error}); fetch it again") from error
    # On `meta` nothing is drawn at random that the weights would replace.
    with torch.device("meta"):
        network = AutoencoderDC.from_config(config)
    del network.decoder
    start = "encoder."
    found = {k.removeprefix(start): v.float() for k, v in tensors.items() if k.startswith(start)}
    try:
        network.encoder.load_state_dict(found, strict=True, assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: its weights do not fit its config.json ({why})") from error
    return network, int(network.spatial_compression_ratio)


def _of_three_channels(encode: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def of_slices(slices_bhw: Tensor) -> Tensor:
        # Three equal channels, as published.
        return encode(slices_bhw[:, None].expand(-1, 3, -1, -1)).latent

    return of_slices
