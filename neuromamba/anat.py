"""Anatomy: each subject's preprocessed T1w image on the grid of the volumes, as a Zarr store.

Design choices
--------------
- The image is the one that fMRIPrep and our `ants` engine call `desc-preproc_T1w`, in the dataset's
  space: bias-corrected already. It goes through the affine like the volumes do, trilinear, so that
  voxels of both are the same place. From a finer image values are picked, not averaged.
- Only the brain is kept: NaN outside its mask, which is stored beside it. What lies outside tells
  how a site defaced its images, and a model would learn that.
- Intensities of T1w images have no unit. They are stored as they are (float16 with a linear code
  that xarray undoes); mean, SD and percentiles inside the brain stand in the attributes, and
  normalisation is applied at load.
- One image a subject, see `neuromamba.anat_scan`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

import neuromamba
from neuromamba.anat_scan import Anatomical, find_anatomicals
from neuromamba.brain import BrainStream
from neuromamba.config import Config, Volumes
from neuromamba.contents import Contents
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.nifti import read_header
from neuromamba.resample import target_affine
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.store import CHUNK_KEYS, FLOAT16_MAX, Code, add_array, finish, finished, new_store
from neuromamba.tables import read_table

PERCENTILES = (0.5, 1, 2, 5, 25, 50, 75, 95, 98, 99, 99.5)
MANIFEST_FACTS = ("key", "n_voxels", "session", "note")


def run_anat(config: Config, dataset: str, batch: int) -> None:
    """Make `anat/{subject}.zarr` for each subject with usable runs in a batch, and the manifest.

    The manifest's column `run` holds subjects.

    Raises
    ------
    InputError
        When more subjects than `compute.max_excluded` have no usable image, or the disk is full.
    """
    layout = Layout.of(config, dataset)
    part = layout.manifest("index", batch)
    of_run = read_table(part, dtype=str).set_index("run")["subject"]
    subjects = sorted({of_run[run] for run in usable_runs([part])})
    settings = config.datasets[dataset]
    found = {one.subject: one for one in find_anatomicals(settings)}
    manifest = layout.manifest("anat", batch)
    contents = Contents(layout, "anat", batch)

    def make(subject: str) -> dict[str, Any]:
        target = layout.array("anat", subject)
        none = Anatomical(subject, reason=f"{settings.derivatives} has no folder {subject}")
        try:
            facts = make_anat(found.get(subject, none), target, settings.space, config.volumes)
        except InputError:
            # What was made of an earlier image is no longer the subject's.
            shutil.rmtree(target, ignore_errors=True)
            raise
        return contents.add(subject, facts)

    process_runs("anat", subjects, make, manifest, config.compute.max_excluded)


def make_anat(source: Anatomical, target: Path, space: str, grid: Volumes) -> dict[str, Any]:
    """Resample one subject's T1w image to the grid and write its store, unless it is there already.

    Parameters
    ----------
    source
        The image.
    target
        Where the store goes; it appears there only when it is whole.
    space
        The standard space of the image.
    grid
        Its `shape` and `voxel_size` count.

    Returns
    -------
    dict
        `key`, which tells what the store was made from, `n_voxels` (in the brain mask), `session`
        and `note` of the image.

    Raises
    ------
    InputError
        When there is no image, or it cannot be used: unreadable, truncated, a series; NaN in the
        brain; the same everywhere; a mask that is empty or on another grid.
    """
    if source.reason or source.t1w is None or source.mask is None:
        raise InputError(source.reason or f"{source.subject} has no T1w image")
    facts: dict[str, Any] = {
        "subject": source.subject,
        "session": source.session,
        "note": source.note,
        "space": space,
        "fingerprint": source.fingerprint,
    }
    key = digest_json([code_of("anat"), facts, grid.shape, grid.voxel_size])
    attributes = finished(target, key)
    if attributes is None:
        voxels, values = _read(Path(source.t1w), Path(source.mask), grid)
        facts |= {
            "key": key,
            "source": source.t1w,
            "source_sha256": digest_file(source.t1w),
            "mask_source": source.mask,
            "mask_sha256": digest_file(source.mask),
        }
        attributes = _write(target, facts, voxels, values, grid)
    return {name: attributes[name] for name in MANIFEST_FACTS}


def _read(
    path: Path, mask: Path, grid: Volumes
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Numbers (x fastest) and values of the brain's voxels on the grid."""
    header = read_header(path)
    if header.n_volumes > 1:
        raise InputError(f"{path}: is a series of {header.n_volumes} volumes; a T1w image is 3D")
    stream = BrainStream(header, mask, grid.shape, target_affine(grid))
    # All blocks, because only the end of the file tells that it is whole.
    values = np.concatenate(list(stream.blocks(ahead=0)))[0]
    if values.std(dtype=np.float64) <= np.finfo(np.float32).eps * np.abs(values).max():
        raise InputError(f"{path}: is the same everywhere in the brain; make the image again")
    return stream.voxels, values


def _write(
    target: Path,
    facts: dict[str, Any],
    voxels: npt.NDArray[np.intp],
    values: npt.NDArray[np.float32],
    grid: Volumes,
) -> dict[str, Any]:
    mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    code = Code(scale=sd, offset=mean)
    stored = code.encode(values)
    if not np.abs(stored).max() < FLOAT16_MAX:
        raise InputError(
            f"{facts['source']}: has values over {FLOAT16_MAX:g} times the brain's SD from its "
            "mean; look for artefacts"
        )
    shape, affine = grid.shape[::-1], target_affine(grid)
    image = np.full(np.prod(shape), np.nan, dtype=np.float16)
    mask = np.zeros(np.prod(shape), dtype=bool)
    image[voxels], mask[voxels] = stored, True
    attributes = facts | {
        "affine": affine.tolist(),
        "interpolation": "linear",
        "mean": mean,
        "sd": sd,
        "percentiles": {
            f"{q:g}": float(value)
            for q, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
        },
        "n_voxels": len(voxels),
        "neuromamba_version": neuromamba.__version__,
    }
    with new_store(target, facts["key"]) as temporary:
        group = zarr.create_group(temporary, zarr_format=3)
        _add_image(group, image.reshape(shape), code)
        add_array(group, "mask", mask.reshape(shape), ["z", "y", "x"], long_name="brain mask")
        for axis, name in enumerate("xyz"):
            mm = affine[axis, 3] + affine[axis, axis] * np.arange(grid.shape[axis])
            add_array(group, name, mm, [name], units="mm")
        finish(group, attributes)
    return attributes


def _add_image(group: zarr.Group, image: npt.NDArray[np.float16], code: Code) -> None:
    array = group.create_array(
        "t1w",
        shape=image.shape,
        chunks=image.shape,
        dtype=image.dtype,
        compressors=ZstdCodec(level=1),
        fill_value=np.nan,
        chunk_key_encoding=CHUNK_KEYS,
        dimension_names=["z", "y", "x"],
        attributes={"long_name": "T1w intensity, NaN outside the brain", **code.attributes},
    )
    array[...] = image
