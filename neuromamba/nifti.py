"""Read NIfTI series as a stream: memory does not grow with the number of volumes.

Design choices
--------------
- The stream is decoded once, front to back, in blocks of whole volumes in the file's own type; who
  needs 20 % of the voxels as float converts 20 % of the voxels.
- `isal` gunzips (faster than zlib) in a thread of its own, because it is the slowest step of all.
- A file is only whole when its data ends where the header says and the gzip checksum agrees, and
  that is known at the end of the stream: what was made of the blocks must be dropped on an error.

Source: NIfTI-1 and NIfTI-2 headers as read by nibabel (https://nifti.nimh.nih.gov/nifti-1).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
from isal import igzip, igzip_lib

from neuromamba.files import InputError
from neuromamba.headers import usable_header
from neuromamba.prefetch import prefetch

BLOCK_BYTES = 4 * 2**20
"""Size of a decoded block, which is to stay in the cache; a larger volume is a block of its own."""
AHEAD = 24
"""Blocks decoded ahead: enough to keep the decoder busy while a shard is compressed."""

DAMAGED = (OSError, cast(type[Exception], igzip_lib.IsalError))
"""What reading raises; the cast is there because isal's type stub calls the class an instance."""


@dataclass(frozen=True)
class Header:
    """What is needed to read a NIfTI file.

    Attributes
    ----------
    path
        The file.
    shape
        Voxels along x, y, z.
    n_volumes
        Number of volumes; 1 for a 3D file.
    is_series
        Whether the file has a time axis, if only of length 1.
    affine
        (4, 4) voxel indices (x, y, z) to mm.
    dtype
        Type and byte order of the stored values.
    slope, intercept
        value = slope * stored + intercept.
    offset
        Bytes before the first value.
    """

    path: Path
    shape: tuple[int, int, int]
    n_volumes: int
    is_series: bool
    affine: npt.NDArray[np.float64]
    dtype: np.dtype[Any]
    slope: float
    intercept: float
    offset: int

    @property
    def n_voxels(self) -> int:
        """Voxels of one volume."""
        return int(np.prod(self.shape))


def read_header(path: Path | str) -> Header:
    """Read the header of a `.nii` or `.nii.gz` file.

    Raises
    ------
    InputError
        When the file is absent, is not gzip although its name says so, is not single-file NIfTI,
        holds no plain numbers, or has no affine.
    """
    path = Path(path)
    with _Stream(path) as stream:
        start = stream.read(540)
    header = usable_header(path, start)
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 4 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise InputError(f"{path}: has shape {shape}; a 3D image or a 4D series is needed")
    slope, intercept = header.get_slope_inter()
    return Header(
        path=path,
        shape=(shape[0], shape[1], shape[2]),
        n_volumes=shape[3] if len(shape) == 4 else 1,
        is_series=len(shape) == 4,
        affine=np.asarray(header.get_best_affine(), dtype=np.float64),
        dtype=header.get_data_dtype(),
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        offset=int(header["vox_offset"]) or 352,
    )


def read_blocks(header: Header, ahead: int = AHEAD) -> Iterator[npt.NDArray[Any]]:
    """Decode a file block by block, in a background thread.

    Parameters
    ----------
    header
        From `read_header`.
    ahead
        Blocks to decode before they are asked for; 0 decodes in the caller's thread.

    Yields
    ------
    (volume, voxel) array of `header.dtype`
        Stored values, not scaled; voxels in file order, x fastest. At most `BLOCK_BYTES`, or one
        volume.

    Raises
    ------
    InputError
        When the file turns out to be truncated, damaged, or longer than its header says. This may
        come after the last block.
    """
    blocks = _blocks(header)
    return prefetch(blocks, ahead) if ahead else blocks


def read_image(header: Header) -> npt.NDArray[np.float32]:
    """Read a 3D file, or the first volume of a series, as (x, y, z) float32, scaled."""
    first, *_ = [block[0] for block in read_blocks(header, ahead=0)]
    values = first.astype(np.float32) * np.float32(header.slope) + np.float32(header.intercept)
    return values.reshape(header.shape, order="F")


class _Stream:
    """A file's bytes, gunzipped where the name says so; every fault becomes an `InputError`."""

    def __init__(self, path: Path):
        self.path = path
        self.raw: IO[bytes]

    def __enter__(self) -> _Stream:
        zipped = self.path.suffix.lower() == ".gz"
        try:
            self.raw = self.path.open("rb")
            magic = self.raw.read(2)
            self.raw.seek(0)
        except FileNotFoundError:
            raise InputError(f"{self.path}: does not exist") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        if zipped != (magic == b"\x1f\x8b"):
            self.raw.close()
            state = "is not gzip, though its name says so" if zipped else "is gzip"
            name = "without .gz" if zipped else "with .nii.gz"
            raise InputError(
                f"{self.path}: {state}; download it again, or name it {name} if that is what it is"
            )
        # BufferedReader over the gzip reader would copy every byte once more.
        self.data = cast(io.RawIOBase, igzip.IGzipFile(fileobj=self.raw)) if zipped else self.raw
        return self

    def __exit__(self, *_: object) -> None:
        self.data.close()
        self.raw.close()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; fewer only at the end of the file."""
        buffer = bytearray(size)
        return bytes(buffer[: self.readinto(memoryview(buffer))])

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer`; return the number of bytes, fewer only at the end of the file."""
        done = 0
        try:
            while done < len(buffer):
                step = self.data.readinto(buffer[done:])
                if not step:
                    break
                done += step
        except EOFError:
            raise InputError(
                f"{self.path}: is truncated (the gzip stream has no end); copy or download it again"
            ) from None
        except DAMAGED as error:
            raise InputError(
                f"{self.path}: is damaged ({error}); copy or download it again"
            ) from None
        return done


def _blocks(header: Header) -> Iterator[npt.NDArray[Any]]:
    volume_bytes = header.n_voxels * header.dtype.itemsize
    size = max(1, BLOCK_BYTES // volume_bytes)
    with _Stream(header.path) as stream:
        stream.read(header.offset)
        for start in range(0, header.n_volumes, size):
            count = min(size, header.n_volumes - start)
            block = np.empty((count, header.n_voxels), dtype=header.dtype)
            done = stream.readinto(block.view(np.uint8).reshape(-1).data)
            if done < block.nbytes:
                raise InputError(
                    f"{header.path}: is truncated: it ends in volume {start + done // volume_bytes}"
                    f" (counted from 0) of {header.n_volumes}; copy or download it again"
                )
            yield block
        if stream.read(1):
            raise InputError(
                f"{header.path}: goes on after the {header.n_volumes} volumes that its header "
                "declares; one of the two is wrong, so make or download it again"
            )
