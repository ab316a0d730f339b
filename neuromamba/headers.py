"""What the header of a NIfTI file says, without reading its data.

A few hundred bytes are decompressed; opening each file by `nibabel.load` takes many times as long,
which counts where there are 10,000. What makes a header unusable is the same for whoever reads the
data afterwards (`usable_header`).
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from neuromamba.files import InputError

HEADER_BYTES = 544
SECONDS_PER_UNIT = {8: 1.0, 16: 1e-3, 24: 1e-6}
"""By the code for seconds, milliseconds and microseconds."""
TIME_UNIT = 0x38
"""The bits of `xyzt_units` that hold it."""
LAYOUTS = [
    (kind.sizeof_hdr, (kind.single_magic, kind.pair_magic), kind.template_dtype.newbyteorder(order))
    for kind in (nib.Nifti1Header, nib.Nifti2Header)
    for order in ("little", "big")
]
"""Of both versions of the format in both byte orders."""


@dataclass(frozen=True)
class Glimpse:
    """Shape, repetition time in seconds where there is one, and whether the file's end fits.

    `complete` is false when the file ends with another number of bytes than the shape asks for: it
    is truncated, or (gzip) was written in several members.
    """

    shape: tuple[int, ...]
    repetition_time: float | None
    complete: bool


def glimpse_series(path: Path | str) -> Glimpse:
    """Read the header of a series of volumes; `InputError` when it is anything else."""
    header = glimpse(path)
    shape = header.shape
    if len(shape) < 4 or shape[3] == 1:
        raise InputError(
            f"{path} is 3D (shape {shape}), not a series of volumes; remove or replace it"
        )
    if len(shape) > 4:
        raise InputError(f"{path} has {len(shape)} dimensions (shape {shape}) where BOLD has 4")
    return header


def glimpse(path: Path | str) -> Glimpse:
    """Read the header of an image.

    Raises
    ------
    InputError
        When the file is a link to content that is not here, cannot be read, is not NIfTI, or is
        refused by `usable_header`.
    """
    is_gzip = str(path).endswith(".gz")
    block, length = _ends(path if isinstance(path, Path) else Path(path), is_gzip)
    fields = _parse(path, block)
    usable_header(path, block)
    dim, pixdim = fields["dim"].tolist(), fields["pixdim"].tolist()
    shape = tuple(dim[1 : 1 + dim[0]])
    step = pixdim[4] * SECONDS_PER_UNIT.get(int(fields["xyzt_units"]) & TIME_UNIT, 1.0)
    size = math.prod(shape) * int(fields["bitpix"]) // 8 + int(fields["vox_offset"])
    complete = length == size % 2**32 if is_gzip else length >= size
    return Glimpse(shape, step if step > 0 else None, complete)


def usable_header(path: Path | str, start: bytes) -> Any:
    """The NIfTI-1 or NIfTI-2 header that `start` begins with.

    Raises
    ------
    InputError
        When it is none, of a pair of files, or tells of other values than plain numbers, of an
        unusable scale, or not where the voxels lie.
    """
    cure = "is it a NIfTI file, and whole? Convert or download it again"
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    kind = nib.Nifti2Header if 540 in sizes else nib.Nifti1Header
    length = 540 if 540 in sizes else 348
    if len(start) < length or not sizes & {348, 540}:
        raise InputError(f"{path}: does not begin with a NIfTI header; {cure}")
    try:
        header = kind(binaryblock=start[:length])
    except (nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError) as error:
        raise InputError(f"{path}: its NIfTI header is unusable ({error}); {cure}") from None
    if not bytes(header["magic"]).startswith(b"n+"):
        raise InputError(f"{path}: is not a single-file NIfTI; convert it to .nii.gz")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: stores {dtype} values; convert it to integers or floats")
    try:
        header.get_slope_inter()
    except nib.spatialimages.HeaderDataError as error:
        raise InputError(f"{path}: unusable scl_slope or scl_inter ({error})") from None
    _refuse_unplaced(path, header)
    return header


def _refuse_unplaced(path: Path | str, header: Any) -> None:
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        raise InputError(
            f"{path}: has neither sform nor qform, so where its voxels lie is unknown; set the "
            "affine, for example by converting or preprocessing the run again"
        )
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(
            f"{path}: its affine cannot be inverted; convert or preprocess the run again"
        )


def _ends(path: Path, is_gzip: bool) -> tuple[bytes, int]:
    """The first bytes of the content, and its length (of gzip files modulo 2^32, as they say)."""
    try:
        with path.open("rb", buffering=0) as stream:
            raw = stream.read(4096)
            length = _length(stream, is_gzip)
        if not is_gzip:
            return raw[:HEADER_BYTES], length
        return zlib.decompressobj(wbits=31).decompress(raw, HEADER_BYTES), length
    except FileNotFoundError:
        raise InputError(
            f"{path} is a link to content that is not here; fetch it (with DataLad: datalad get)"
        ) from None
    except (OSError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({error}): it is damaged or not gzip; copy or generate it again"
        ) from None


def _length(stream: BinaryIO, is_gzip: bool) -> int:
    size = stream.seek(0, os.SEEK_END)
    if not is_gzip or size < 4:
        return size
    stream.seek(-4, os.SEEK_END)
    return int.from_bytes(stream.read(4), "little")


def _parse(path: Path | str, block: bytes) -> Any:
    for size, magics, layout in LAYOUTS:
        if len(block) >= size:
            fields = np.frombuffer(block, layout, count=1)[0]
            if fields["sizeof_hdr"] == size and fields["magic"] in magics and _is_sane(fields):
                return fields
    raise InputError(
        f"{path} has no readable NIfTI header ({len(block)} bytes could be read: truncated, or "
        "not NIfTI); copy or generate it again"
    )


def _is_sane(fields: Any) -> bool:
    dim = fields["dim"].tolist()
    return (
        0 < dim[0] < 8 and min(dim[1 : 1 + dim[0]]) > 0 and bool(np.isfinite(fields["vox_offset"]))
    )
