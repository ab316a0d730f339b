"""A run as preprocessing needs it: decoded once, its slices timed alike, interpolated once.

Design choices
--------------
- The series lies in a memory-mapped file: slice timing needs all times of a slice, resampling all
  slices of a time, and memory is to hold neither.
- Slice timing is a cubic B-spline in time. Motion and registration are composed into one set of
  points for each volume, so that space is interpolated once, by a cubic B-spline or linearly.
- Only points near the template's brain are computed. Beyond the outer faces of the scan's border
  voxels is nothing: 0.

Sources: slice timing to the middle of the acquisition and one composed interpolation, as fMRIPrep
(Esteban et al., Nature Methods 16, 2019); B-splines: Unser, IEEE Signal Processing Magazine 16
(1999), by `scipy.ndimage`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import numpy.typing as npt
from isal import igzip
from scipy import ndimage

from neuromamba.ants_template import Grid
from neuromamba.files import atomic_path
from neuromamba.nifti import Header, read_blocks
from neuromamba.resample import Affine
from neuromamba.sidecars import check_slice_timing

Series = npt.NDArray[np.float32]
MNI_CODE = 4
ZEROS = 2**20
"""Bytes that are written at a time where space cannot be reserved otherwise."""
ORDERS: dict[str, Literal[1, 3]] = {"linear": 1, "cubic": 3}


def map_new(path: Path, shape: tuple[int, ...]) -> Series:
    """A new file as a memory-mapped float32 array, all 0.

    Raises
    ------
    OSError
        When the disk has no room for it; a write to a mapping without would kill the process.
    """
    with path.open("wb") as file:
        size = 4 * int(np.prod(shape, dtype=np.int64))
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, ZEROS):
                file.write(bytes(min(ZEROS, size - start)))
    return np.memmap(path, dtype=np.float32, mode="r+", shape=shape)


def decode_series(header: Header, path: Path) -> Series:
    """Decode a run into a file: (time, z, y, x) float32, memory-mapped; what is no number is 0.

    Raises
    ------
    InputError
        When the file is truncated or damaged.
    OSError
        When the disk is full.
    """
    shape = (header.n_volumes, *header.shape[::-1])
    series = map_new(path, shape)
    flat, done = series.reshape(len(series), -1), 0
    for block in read_blocks(header):
        values = block.astype(np.float32) * np.float32(header.slope) + np.float32(header.intercept)
        flat[done : done + len(block)] = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
        done += len(block)
    return series


# --- Slice timing ---------------------------------------------------------------------------------


def slice_times(metadata: dict[str, Any], shape: Sequence[int], where: Path) -> tuple[int, Any]:
    """The slices' axis in a (time, z, y, x) series, and when in a volume each is taken: (slice,) s.

    Parameters
    ----------
    metadata
        With `SliceTiming` (s) and `RepetitionTime`, and maybe `SliceEncodingDirection`: `k-` means
        that the times begin with the last slice.
    shape
        Of the series.
    where
        The scan, for messages.

    Raises
    ------
    InputError
        When the times do not fit the scan.
    """
    in_order = shape[:0:-1]
    axis, times = check_slice_timing(metadata, in_order, metadata["RepetitionTime"], where)
    return len(in_order) - axis, np.array(times)


def middle_of(times: npt.NDArray[np.float64]) -> float:
    """The time that all slices are brought to: midway between the first and the last, s."""
    return float(times.min() + (times.max() - times.min()) / 2)


def correct_slice_timing(
    series: Series,
    axis: int,
    times: npt.NDArray[np.float64],
    repetition_time: float,
    skip: int = 0,
) -> None:
    """Bring every slice to the middle of the acquisition, in place.

    Parameters
    ----------
    series
        (time, z, y, x).
    axis, times
        From `slice_times`.
    repetition_time
        s.
    skip
        Volumes at the start, before the steady state, that stay as they are and shape no others.
    """
    steady = series[skip:]
    for number, time in enumerate(times):
        shift = (middle_of(times) - time) / repetition_time
        if shift:
            at = (slice(None),) * axis + (number,)
            steady[at] = shift_in_time(steady[at], shift)


def shift_in_time(values: npt.NDArray[np.float32], shift: float) -> npt.NDArray[np.float32]:
    """What a series (time, ...) is `shift` samples later, by a cubic B-spline.

    Beyond its ends it goes on mirrored.
    """
    n = len(values)
    if n < 2:
        return values
    coefficients = ndimage.spline_filter1d(values, 3, axis=0, output=np.float32, mode="mirror")
    whole = int(np.floor(shift))
    f = shift - whole
    weights = ((1 - f) ** 3 / 6, 2 / 3 - f**2 + f**3 / 2, 1 / 6 + (f + f**2 - f**3) / 2, f**3 / 6)
    result = np.zeros_like(coefficients)
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        at = np.abs(np.arange(n) + whole + offset) % (2 * n - 2)
        result += np.float32(weight) * coefficients[np.minimum(at, 2 * n - 2 - at)]
    return result


# --- One interpolation ----------------------------------------------------------------------------


def resample_volumes(
    series: Series,
    affine: Affine,
    points: npt.NDArray[np.float64],
    matrices: npt.NDArray[np.float64],
    interpolation: str,
    threads: int = 1,
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """Interpolate each volume at points that move with the head.

    Parameters
    ----------
    series, affine
        (time, z, y, x) and voxel indices (x, y, z) to mm.
    points
        (voxel, 3) mm in the reference.
    matrices
        (time, 4, 4) mm of the reference to mm of the volume.
    interpolation
        `linear` or `cubic`.
    threads
        Volumes at a time.

    Yields
    ------
    (voxel,) float32 and (voxel,) bool
        Values of a volume, and which points lie in its field of view; the others are 0.
    """
    order = ORDERS[interpolation]
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1).T
    to_index = np.linalg.inv(affine)

    def one(number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        volume = np.asarray(series[number])
        indices = (to_index @ matrices[number])[2::-1] @ homogeneous
        return _interpolate(volume, indices, order)

    yield from _ordered(one, len(series), threads)


def _interpolate(
    volume: npt.NDArray[np.float32], indices: npt.NDArray[np.float64], order: Literal[1, 3]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Values of a (z, y, x) volume at (3, point) indices."""
    last = np.array(volume.shape)[:, None] - 1
    inside = np.asarray(((indices >= -0.5) & (indices <= last + 0.5)).all(axis=0))
    if order > 1:
        volume = ndimage.spline_filter(volume, 3, output=np.float32, mode="mirror")
    values = np.zeros(indices.shape[1], dtype=np.float32)
    # Within half a voxel beyond the last centre, the value is that at the centre.
    nearby = np.clip(indices[:, inside], 0, last)
    values[inside] = ndimage.map_coordinates(
        volume, nearby, output=np.float32, order=order, mode="mirror", prefilter=False
    )
    return values, inside


def _ordered(function: Any, n: int, threads: int) -> Iterator[Any]:
    """`function` of 0 to n - 1 in order, with no more than two results a thread waiting."""
    if threads == 1:
        yield from map(function, range(n))
        return
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for number in range(n):
            waiting.append(pool.submit(function, number))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- Writing --------------------------------------------------------------------------------------


@contextmanager
def open_series(
    path: Path,
    grid: Grid,
    n_volumes: int | None,
    repetition_time: float = 0.0,
    dtype: npt.DTypeLike = np.float32,
    step: float = 1.0,
) -> Iterator[igzip.IGzipFile]:
    """Open a `.nii.gz` for the bytes of its volumes, x fastest; without `n_volumes`, it is 3D.

    It appears under its name when the block ends. Neither name nor time stand in the gzip header,
    so that the same content is the same bytes.
    """
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(grid.shape if n_volumes is None else (*grid.shape, n_volumes))
    size = nibabel.affines.voxel_sizes(grid.affine).tolist()
    header.set_zooms(size if n_volumes is None else [*size, repetition_time])
    header.set_xyzt_units("mm", "sec")
    header.set_qform(grid.affine, MNI_CODE)
    header.set_sform(grid.affine, MNI_CODE)
    header.set_slope_inter(step, 0)
    header.set_data_offset(352)
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as raw,
        igzip.IGzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as stream,
    ):
        stream.write(header.binaryblock + bytes(4))
        yield stream


def write_image(path: Path, grid: Grid, data: npt.NDArray[Any]) -> None:
    """Write an (x, y, z) image of the data's type; masks as 0 and 1."""
    data = data.astype(np.uint8) if data.dtype == bool else data
    with open_series(path, grid, None, dtype=data.dtype) as stream:
        stream.write(data.tobytes(order="F"))


def storage(header: Header, highest: float) -> tuple[np.dtype[Any], float]:
    """Type and step in which the resampled run is stored.

    Floats stay floats. Integers stay 16-bit integers with the step that they came with, or a finer
    one where that is coarser than a 4000th of the highest value; all must fit.
    """
    if header.dtype.kind == "f":
        return np.dtype(np.float32), 1.0
    step = min(abs(header.slope), highest / 4000 or 1.0)
    return np.dtype(np.int16), max(step, highest / 30000)
