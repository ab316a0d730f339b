"""How fast and how large is the data layer, beside what others do, in one run on one machine.

    python benchmarks/data_layer.py                    # 1200 volumes, about 5 minutes, 3 GB of disk
    python benchmarks/data_layer.py --volumes 200      # quicker

A synthetic series (2 mm, int16, realistic noise and compression) is written once, half a
millimetre off the target grid so that there is something to interpolate. Then:

- preprocess: our volumes stage, and our tokens stage, against a script that loads the whole scan,
  resamples each volume with scipy, and then does what SwiFT's does: masked z-scores, one `.pt` file
  a volume. The script runs on fewer volumes; times are per volume. It is measured with the scan in
  float64 and in float32, and with a crop instead of the resampling.
- resample: one volume by our matrix, by nilearn, by scipy.
- window: 20 consecutive volumes from a random place, from the page cache.
- peak memory of both, each in a process of its own.

Both sides' values are compared; the difference is given in units of the voxels' SD over time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, machine, median_ms, peak_mb, write_results
from data_layer_common import SHAPE, WINDOW, write_inputs
from data_layer_rivals import SCRIPTS, run_script, time_other_windows

SHARD = 48


# --- Each side in a process of its own ------------------------------------------------------------


def run_ours(folder: Path, n: int) -> dict[str, float]:
    from neuromamba.config import Tokens, Volumes
    from neuromamba.tokens import make_tokens
    from neuromamba.volumes import Source, make_volumes

    bold, mask = folder / f"bold-{n}.nii.gz", folder / "mask.nii.gz"
    volumes, tokens = folder / f"volumes-{n}.zarr", folder / f"tokens-{n}.zarr"
    start, start_cpu = time.perf_counter(), time.process_time()
    make_volumes(Source("run", "sub", bold, mask, "MNI", 2.0, ""), volumes, Volumes(), 2)
    middle, middle_cpu = time.perf_counter(), time.process_time()
    peak = peak_mb()
    make_tokens(volumes, tokens, Tokens(), SHARD)
    stop = time.perf_counter()
    return {
        "volumes_ms": (middle - start) / n * 1e3,
        "volumes_cpu_ms": (middle_cpu - start_cpu) / n * 1e3,
        "volumes_peak_mb": peak,
        "tokens_ms": (stop - middle) / n * 1e3,
        "tokens_peak_mb": peak_mb(),
    }


def in_process(what: str, folder: Path, n: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", what, "--folder", str(folder), "--volumes"]
    result = subprocess.run([*command, str(n)], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


# --- Comparisons in this process ------------------------------------------------------------------


def compare_resampling(folder: Path, n: int) -> dict[str, float]:
    import nibabel
    from nilearn.image import resample_img
    from scipy.ndimage import affine_transform

    from neuromamba.brain import read_brain
    from neuromamba.config import Volumes
    from neuromamba.nifti import read_blocks, read_header
    from neuromamba.resample import Resampler, resample_mask, target_affine

    header = read_header(folder / f"bold-{n}.nii.gz")
    block = next(read_blocks(header, ahead=0))
    affine, shape = target_affine(Volumes()), (96, 96, 96)
    brain = read_brain(header, folder / "mask.nii.gz")
    voxels = resample_mask(brain, header.affine, shape, affine)
    start = time.perf_counter()
    resampler = Resampler(header.shape, header.affine, shape, affine, voxels)
    set_up = (time.perf_counter() - start) * 1e3
    volume = block[0].reshape(SHAPE, order="F").astype(np.float32)
    image = nibabel.Nifti1Image(volume, header.affine)
    to_source = np.linalg.inv(header.affine) @ affine

    def ours(_: int) -> np.ndarray:
        return resampler.apply(resampler.gather(block))

    def nilearn(_: int) -> np.ndarray:
        options = {"interpolation": "linear", "force_resample": True, "copy_header": True}
        return np.asarray(resample_img(image, affine, shape, **options).dataobj)

    def scipy(_: int) -> np.ndarray:
        return affine_transform(volume, to_source, output_shape=shape, order=1)

    reference = nilearn(0).ravel(order="F")[voxels]
    return {
        "ours_ms": median_ms(ours, list(range(9))) / len(block),
        "ours_set_up_once_ms": set_up,
        "nilearn_ms": median_ms(nilearn, list(range(5))),
        "scipy_ms": median_ms(scipy, list(range(5))),
        "largest_difference_to_nilearn": float(np.abs(ours(0)[0] - reference).max()),
        "typical_value": float(np.median(reference)),
    }


def compare_windows(folder: Path, n: int, few: int, seed: int) -> dict[str, float]:
    from neuromamba.token_store import TokenStore

    store = TokenStore(folder / f"tokens-{n}.zarr")
    patches = WINDOW // 2
    random = np.random.default_rng(seed)
    starts = random.integers(0, store.n_time_patches - patches + 1, 100).tolist()
    row = store.n_tokens * store.n_values
    # More than the processor's cache, so that both copies come from main memory.
    memory = store.window(0, min(store.n_time_patches, 200)).reshape(-1, row)
    places = random.integers(0, len(memory) - patches + 1, 100).tolist()
    reused = np.empty((patches, row), dtype=np.float16)

    def copy_new(start: int) -> None:
        np.copyto(np.empty((patches, row), dtype=np.float16), memory[start : start + patches])

    def copy_reused(start: int) -> None:
        np.copyto(reused, memory[start : start + patches])

    # Interleaved, so that other load on the machine hits all alike.
    rounds = [
        (
            median_ms(lambda s: store.window(s, patches), starts[i::5]),
            median_ms(copy_new, places[i::5]),
            median_ms(copy_reused, places[i::5]),
        )
        for i in range(5)
    ]
    names = ("ours_ms", "memcpy_ms", "memcpy_reused_ms")
    result = dict(zip(names, np.median(rounds, axis=0).tolist(), strict=True))
    for kind in ("global", "voxel"):
        result[f"ours_normalized_{kind}_ms"] = median_ms(
            lambda s, kind=kind: store.normalized(s, patches, kind), starts[:20]
        )
    return result | time_other_windows(folder, n, starts[:20], [s % (few - WINDOW) for s in starts])


def compare_values(folder: Path, n: int, script: dict[str, float]) -> dict[str, float]:
    """Difference between our store and the script's files, over the voxels' SD."""
    import torch
    import xarray

    ours = xarray.open_zarr(folder / f"volumes-{n}.zarr", chunks=None)
    mask, sd = ours["mask"].values, ours["sd"].values
    differences = []
    for t in (0, 7, WINDOW):
        theirs = torch.load(folder / "pt-resampled-float32" / f"frame_{t}.pt", weights_only=True)
        values = theirs[..., 0].numpy().astype(np.float64).T * script["sd"] + script["mean"]
        differences.append(np.abs(ours["bold"][t].values - values)[mask] / sd[mask])
    return {
        "median_in_voxel_sd": float(np.median(differences)),
        "p99_in_voxel_sd": float(np.percentile(differences, 99)),
        "largest_in_voxel_sd": float(np.max(differences)),
    }


# --- Report ---------------------------------------------------------------------------------------


PACKAGES = ("numpy", "scipy", "zarr", "isal", "nibabel", "nilearn", "torch", "neuromamba")


def measure(folder: Path, n: int, few: int, background: str, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "machine": machine(*PACKAGES),
        "background": background,
        "volumes": n,
        "volumes_of_the_script": few,
    }

    def step(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    step(f"writing a scan of {n} volumes")
    write_inputs(folder, sorted({n, few}), background, seed)
    packed = (folder / f"bold-{n}.nii.gz").stat().st_size
    result["gzip_ratio"] = n * int(np.prod(SHAPE)) * 2 / packed
    step("volumes and tokens")
    result["ours"] = in_process("ours", folder, n)
    for script in SCRIPTS:
        step(f"{script}, on {few} volumes")
        result[script] = in_process(script, folder, few)
    step("resampling")
    result["resample"] = compare_resampling(folder, n)
    step("windows")
    result["window"] = compare_windows(folder, n, few, seed)
    result["difference"] = compare_values(folder, n, result["script"])
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown, losses included."""
    ours, script = result["ours"], result["script"]
    resample, window = result["resample"], result["window"]
    few, n, host = result["volumes_of_the_script"], result["volumes"], result["machine"]

    def line(what: str, value: float, unit: str, base: float | None = None) -> str:
        ratio = f"{value / base:.2f}x ours" if base else ""
        return f"| {what} | {value:.2f} {unit} | {ratio} |"

    base, place = ours["volumes_ms"], resample["ours_ms"]
    both, read = base + ours["tokens_ms"], window["ours_ms"]
    difference = result["difference"]
    rows = [
        f"{host['date']}, {host['processor']}, {host['cores']} cores, load "
        f"{host['load_average_at_start']:.1f} at the start. Scan: {SHAPE} x {n}, int16, background "
        f"{result['background']}, gzip ratio {result['gzip_ratio']:.2f}. "
        f"Preprocessing is per volume; the scripts ran on {few} volumes.",
        "",
        "| what | value | beside ours |",
        "|---|---|---|",
        line("preprocess: ours, volumes stage", base, "ms"),
        line("preprocess: ours, volumes and tokens stages", both, "ms", base),
        line("preprocess: get_fdata() + scipy + .pt", result["float64_script"]["ms"], "ms", base),
        line("preprocess: the same in float32 (`script`)", script["ms"], "ms", base),
        line("preprocess: float32, crop instead of scipy", result["crop_script"]["ms"], "ms", base),
        line("processor time: ours, volumes stage", ours["volumes_cpu_ms"], "ms"),
        line("processor time: script", script["cpu_ms"], "ms", ours["volumes_cpu_ms"]),
        line(f"peak memory: ours, volumes stage, {n} volumes", ours["volumes_peak_mb"], "MiB"),
        line(f"peak memory: ours, tokens stage, {n} volumes", ours["tokens_peak_mb"], "MiB"),
        line(f"peak memory: script, {few} volumes", script["peak_mb"], "MiB"),
        line("resample a volume: ours", place, "ms"),
        line("resample a volume: scipy", resample["scipy_ms"], "ms", place),
        line("resample a volume: nilearn", resample["nilearn_ms"], "ms", place),
        line(f"window of {WINDOW} volumes: ours", read, "ms"),
        line("window: memcpy to new memory", window["memcpy_ms"], "ms", read),
        line("window: memcpy to reused memory", window["memcpy_reused_ms"], "ms", read),
        line("window: zarr-python", window["zarr_python_ms"], "ms", read),
        line("window: .pt files", window["pt_files_ms"], "ms", read),
        line("window: nibabel, .nii.gz", window["nibabel_ms"], "ms", read),
        line("window: ours, normalised globally", window["ours_normalized_global_ms"], "ms", read),
        line("window: ours, normalised by voxel", window["ours_normalized_voxel_ms"], "ms", read),
        "",
        f"The stores agree: they differ by {difference['median_in_voxel_sd']:.4f} (median), "
        f"{difference['p99_in_voxel_sd']:.4f} (99th percentile), "
        f"{difference['largest_in_voxel_sd']:.4f} (largest) of a voxel's SD, both being float16; "
        f"resampling differs from nilearn's by at most "
        f"{resample['largest_difference_to_nilearn']:.1g} at values about "
        f"{resample['typical_value']:.0f}.",
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=1200)
    parser.add_argument("--script-volumes", type=int, default=60, help="for the slow alternative")
    parser.add_argument("--background", choices=["zero", "noise"], default="zero")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--side", choices=["ours", *SCRIPTS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "ours":
        print(json.dumps(run_ours(arguments.folder, arguments.volumes)))
        return
    if arguments.side:
        how = SCRIPTS[arguments.side]
        print(json.dumps(run_script(arguments.folder, arguments.volumes, *how)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Path(folder),
            arguments.volumes,
            arguments.script_volumes,
            arguments.background,
            arguments.seed,
        )
    text = table(result)
    print(text)
    background = f"{arguments.background}-background"
    write_results(arguments.results, "data_layer", result, text, background)


if __name__ == "__main__":
    main()
