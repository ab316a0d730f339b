"""What others do: a script that loads the whole scan and saves `.pt` files, and other readers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from common import median_ms, peak_mb
from data_layer_common import WINDOW, source_affine

SCRIPTS = {
    "script": ("float32", True),
    "float64_script": ("float64", True),
    "crop_script": ("float32", False),
}
"""The variants of the script: type that the scan is loaded as, and whether it is resampled."""


def run_script(folder: Path, n: int, dtype: str, resample: bool) -> dict[str, float]:
    """The steps of SwiFT's preparation script, with resampling or its crop in front.

    Load the whole scan, call every 0 background, z-score the rest, fill the background with the
    least value, save each volume as a float16 `.pt`. `get_fdata()` loads as float64; MONAI, which
    SwiFT uses, as float32.
    """
    import nibabel
    import torch

    out = folder / f"pt-{'resampled' if resample else 'cropped'}-{dtype}"
    out.mkdir()
    start, start_cpu = time.perf_counter(), time.process_time()
    loaded = nibabel.load(folder / f"bold-{n}.nii.gz").get_fdata(dtype=np.dtype(dtype))
    data = torch.from_numpy(resample_all(loaded) if resample else crop(loaded))
    background = data == 0
    mean, sd = data[~background].mean(), data[~background].std()
    scores = (data - mean) / sd
    filled = torch.empty(data.shape, dtype=data.dtype)
    filled[background] = scores[~background].min()
    filled[~background] = scores[~background]
    for i, volume in enumerate(torch.split(filled.type(torch.float16), 1, 3)):
        torch.save(volume.clone(), out / f"frame_{i}.pt")
    stop, stop_cpu = time.perf_counter(), time.process_time()
    return {
        "ms": (stop - start) / n * 1e3,
        "cpu_ms": (stop_cpu - start_cpu) / n * 1e3,
        "peak_mb": peak_mb(),
        "mean": float(mean),
        "sd": float(sd),
    }


def resample_all(data: np.ndarray) -> np.ndarray:
    from scipy.ndimage import affine_transform

    from neuromamba.config import Volumes
    from neuromamba.resample import target_affine

    to_source = np.linalg.inv(source_affine()) @ target_affine(Volumes())
    out = np.empty((96, 96, 96, data.shape[3]), dtype=data.dtype)
    for i in range(data.shape[3]):
        out[..., i] = affine_transform(data[..., i], to_source, output_shape=(96,) * 3, order=1)
    return out


def crop(data: np.ndarray) -> np.ndarray:
    """The box of 96 voxels around the middle, as slices typed in by hand would cut it.

    In C order, as MONAI loads, which is the faster one for the masked steps.
    """
    return np.ascontiguousarray(data[:96, 10:106, :96])


def time_other_windows(
    folder: Path, n: int, starts: list[int], pt_starts: list[int]
) -> dict[str, float]:
    """The same windows by zarr-python, from `.pt` files, and from the `.nii.gz` by nibabel."""
    import nibabel
    import torch
    import zarr

    values = zarr.open_group(folder / f"tokens-{n}.zarr", mode="r")["values"]
    scan = nibabel.load(folder / f"bold-{n}.nii.gz")
    saved = folder / "pt-resampled-float32"

    def load_pt(start: int) -> None:
        paths = [saved / f"frame_{start + i}.pt" for i in range(WINDOW)]
        torch.stack([torch.load(path, weights_only=True) for path in paths])

    def load_scan(start: int) -> None:
        np.asarray(scan.dataobj[..., 2 * start : 2 * start + WINDOW])

    return {
        "zarr_python_ms": median_ms(lambda s: values[s : s + WINDOW // 2], starts),
        "pt_files_ms": median_ms(load_pt, pt_starts[:20]),
        "nibabel_ms": median_ms(load_scan, starts[:2]),
    }
