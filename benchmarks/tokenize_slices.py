"""How fast volumes become codes: DC-AE at its published sizes, and our own small autoencoder.

    python benchmarks/tokenize_slices.py --derivatives DERIVATIVES     # some 20 minutes of one core
    python benchmarks/tokenize_slices.py --derivatives DERIVATIVES --device cuda --volumes 24

DERIVATIVES holds a real scan in fMRIPrep's layout. Its volumes, 96^3 at 2 mm, are encoded with and
without leaving out the slices that hold no brain, which must give the same. Weights are random: how
long it takes does not depend on them, and no weights need to be fetched. DC-AE has the sizes of
dc-ae-f32c32-in-1.0; our own autoencoder has the default sizes, and goes through the whole stage,
from the volumes' store to that of the codes. Each case runs in a process of its own. With
`--device cuda` it needs a GPU, and is skipped where there is none.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, head, in_process, machine, peak_mb, reset_peak, write_results
from safetensors.torch import save_file

from neuromamba.bids import run_index
from neuromamba.checkpoint import save_model
from neuromamba.codes import run_codes
from neuromamba.config import Config
from neuromamba.files import write_json
from neuromamba.layout import Layout
from neuromamba.slice_autoencoder import SliceAutoencoder
from neuromamba.slice_encoders import WEIGHTS, open_encoder
from neuromamba.slices import RunVolumes, encode_volumes
from neuromamba.stage import usable_runs
from neuromamba.volumes import run_volumes

PACKAGES = ("torch", "diffusers")
KINDS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
WIDTHS = [128, 256, 512, 512, 1024, 1024]
F32C32 = {
    "latent_channels": 32,
    "encoder_block_types": KINDS,
    "decoder_block_types": KINDS,
    "encoder_block_out_channels": WIDTHS,
    "decoder_block_out_channels": WIDTHS,
    "encoder_layers_per_block": [0, 4, 8, 2, 2, 2],
    "decoder_layers_per_block": [0, 5, 10, 2, 2, 2],
    "encoder_qkv_multiscales": [[]] * 6,
    "decoder_qkv_multiscales": [[]] * 6,
    "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * 3,
    "decoder_act_fns": ["relu"] * 3 + ["silu"] * 3,
}
"""Sizes of dc-ae-f32c32-in-1.0, as diffusers' conversion of it has them."""


def make_config(folder: Path, derivatives: str, tokenizer: str, device: str) -> Config:
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {"scan": {"derivatives": derivatives}},
            "models": {"any": {"family": "neuromamba"}},
            "codes": {
                "tokenizer": tokenizer,
                "weights": str(folder / "dcae") if tokenizer == "dc-ae" else None,
                "batch_slices": 96 if device == "cuda" else 12,
            },
            "compute": {"device": device},
        }
    )


def write_dcae(folder: Path) -> None:
    """Random weights of the encoder, which is all that codes need."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    model = AutoencoderDC(**F32C32)
    folder.mkdir()
    write_json(folder / "config.json", {"_class_name": "AutoencoderDC", **F32C32})
    tensors = {f"encoder.{k}": v.contiguous() for k, v in model.encoder.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)


def write_own(config: Config) -> None:
    """Random weights of our own autoencoder, as its training leaves them."""
    torch.manual_seed(0)
    settings, edge = config.codes.slices, config.volumes.shape[0]
    told = {"slices": settings.model_dump(mode="json"), "edge": edge}
    folder = Layout.of(config, "scan").tokenizer
    folder.mkdir(parents=True)
    save_model(folder, SliceAutoencoder(settings, edge).state_dict(), {"settings": told})


def run_dcae(
    folder: str, derivatives: str, device: str, volumes: int, skip: bool
) -> dict[str, Any]:
    """Encode the first volumes of the scan; `skip` leaves out slices without brain."""
    config = make_config(Path(folder), derivatives, "dc-ae", device)
    if device == "cpu":
        torch.set_num_threads(1)
    encoder = open_encoder(config, "scan")
    (run,) = usable_runs([Layout.of(config, "scan").manifest("volumes", 0)])
    scan = RunVolumes(Layout.of(config, "scan").array("volumes", run), "maximum")
    images = scan.normalized(0, volumes)
    every = (np.arange(scan.edge), np.arange(scan.edge), np.arange(scan.edge))
    places = scan.places if skip else every
    encoder.encode(images[0, 40:41])  # loads what is loaded late
    reset_peak()
    started, used = time.perf_counter(), time.process_time()
    tokens = encode_volumes(images, places, encoder.encode, encoder.empty)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    np.save(Path(folder) / f"tokens-{skip}.npy", tokens)
    n = volumes * sum(map(len, places)) + 1  # that without brain
    return {
        "case": "dc-ae",
        "skip": skip,
        "volumes": volumes,
        "slices": n,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak_mb(),
        "precision": str(encoder.dtype).removeprefix("torch."),
        "parameters": sum(one.numel() for one in encoder.network.parameters()),
    }


def run_own(folder: str, derivatives: str, device: str) -> dict[str, Any]:
    """The stage `codes` by our own autoencoder, over the whole scan."""
    config = make_config(Path(folder), derivatives, "slices", device)
    if device == "cpu":
        torch.set_num_threads(1)
    write_own(config)
    started, used = time.perf_counter(), time.process_time()
    run_codes(config, "scan", 0)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    layout = Layout.of(config, "scan")
    (run,) = usable_runs([layout.manifest("codes", 0)])
    scan = RunVolumes(layout.array("volumes", run), "maximum")
    return {
        "case": "slices",
        "volumes": scan.n_volumes,
        "slices": scan.n_volumes * (scan.n_slices - scan.n_empty) + 1,
        "empty": scan.n_empty,
        "n_slices": scan.n_slices,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak_mb(),
        "bytes_a_volume": 27 * scan.edge * config.codes.slices.channels * 2,
    }


def describe(cases: list[dict[str, Any]], difference: float) -> str:
    lines = [
        "| tokenizer | slices without brain | volumes | slices encoded | time | a volume "
        "| processor time a volume | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in cases:
        per = one["volumes"]
        row = [
            one["case"],
            "encoded once" if one.get("skip", True) else "encoded",
            str(per),
            str(one["slices"]),
            f"{one['seconds']:.1f} s",
            f"{one['seconds'] / per:.2f} s",
            f"{one['cpu_seconds'] / per:.2f} s",
            f"{one['peak_mb'] / 1024:.2f} GiB",
        ]
        lines.append(f"| {' | '.join(row)} |")
    skipped, whole, own = cases
    kept = skipped["cpu_seconds"] / whole["cpu_seconds"]
    about = (
        f"Of the {own['n_slices']} slices of a volume {own['empty']} hold no brain "
        f"({own['empty'] / own['n_slices']:.0%}); leaving them out takes {kept:.2f} of the "
        f"processor time. The tokens differ by {difference:.1e} of the largest value at most. "
        f"DC-AE's encoder has {whole['parameters'] / 1e6:.0f} M parameters, and ran in "
        f"{whole['precision']}."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--derivatives", help="a folder with one scan")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--volumes", type=int, default=1, help="that DC-AE encodes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        given = json.loads(options.case)
        print(json.dumps(run_own(**given) if "skip" not in given else run_dcae(**given)))
        return
    if options.derivatives is None:
        parser.error("--derivatives is missing")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    host = machine(*PACKAGES, device=options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(folder, options.derivatives, "slices", options.device)
        run_index(config, "scan")
        run_volumes(config, "scan", 0)
        write_dcae(folder / "dcae")
        shared = {"folder": name, "derivatives": options.derivatives, "device": options.device}
        wanted = [{**shared, "volumes": options.volumes, "skip": skip} for skip in (True, False)]
        cases = []
        for case in [*wanted, shared]:
            found = in_process(__file__, "--case", json.dumps(case))
            if "failed" in found:
                raise SystemExit(f"{case}: {found['failed']}")
            cases.append(found)
        some, every = (np.load(folder / f"tokens-{skip}.npy") for skip in (True, False))
        difference = float(np.abs(some - every).max() / np.abs(every).max())
    limit = 1e-4 if options.device == "cpu" else 2e-2  # bfloat16 rounds by batch there
    if difference > limit:
        raise SystemExit(f"leaving out empty slices changes the tokens by {difference:.1e}")
    text = f"{head(host, PACKAGES)}\n{describe(cases, difference)}\n"
    result = {"machine": host, "cases": cases, "largest_difference": difference}
    write_results(RESULTS, "tokenize_slices", result, text)


if __name__ == "__main__":
    main()
