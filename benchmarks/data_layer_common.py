"""What both sides of the data layer's benchmark share: the scan and its scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (97, 115, 97)
ORIGIN = (-96.0, -132.0, -78.0)
WINDOW = 20


def source_affine() -> np.ndarray:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = ORIGIN
    return affine


def write_inputs(folder: Path, counts: list[int], background: str, seed: int) -> None:
    """Write `bold-{n}.nii.gz` for each n, all with the same first volumes, and `mask.nii.gz`.

    `background` is `zero` where the brain was extracted (HCP, UK Biobank, ABCD) and `noise`
    otherwise (fMRIPrep): the same brain, but a file that takes two or three times as long to unzip.
    """
    import nibabel
    from isal import igzip
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
    from nilearn.image import resample_img

    def on_source(image: Any, interpolation: str) -> np.ndarray:
        options = {"force_resample": True, "copy_header": True, "interpolation": interpolation}
        return np.asarray(resample_img(image, source_affine(), SHAPE, **options).dataobj)

    mask = on_source(load_mni152_brain_mask(resolution=2), "nearest") > 0
    nibabel.save(
        nibabel.Nifti1Image(mask.astype(np.uint8), source_affine()), folder / "mask.nii.gz"
    )
    head = on_source(load_mni152_template(resolution=2), "linear").ravel(order="F")
    head = (9000 * head / head.max()).astype(np.float32)
    inside = mask.ravel(order="F") if background == "zero" else np.float32(1)
    random = np.random.default_rng(seed)
    noise = random.standard_normal(head.size, dtype=np.float32)
    streams = {n: igzip.open(folder / f"bold-{n}.nii.gz", "wb", compresslevel=1) for n in counts}
    for n, stream in streams.items():
        header = nibabel.Nifti1Header()
        header.set_data_shape((*SHAPE, n))
        header.set_data_dtype(np.int16)
        header.set_sform(source_affine(), 4)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        stream.write(header.binaryblock.ljust(352, b"\0"))
    for t in range(max(counts)):
        noise = 0.6 * noise + 0.8 * random.standard_normal(head.size, dtype=np.float32)
        floor = 15 * np.abs(random.standard_normal(head.size, dtype=np.float32))
        volume = ((head * (1 + 0.01 * noise) + floor) * inside).astype(np.int16).tobytes()
        for n, stream in streams.items():
            if t < n:
                stream.write(volume)
    for stream in streams.values():
        stream.close()
