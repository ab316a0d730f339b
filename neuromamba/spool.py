"""A run's volumes after denoising over time, with memory that does not grow with its length.

A filter needs all of a voxel's time course, and a run may not fit into memory: its volumes are
spooled to a file without a name beside the store, denoised there by blocks of voxels, and read back
as volumes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from neuromamba.brain import BrainStream
from neuromamba.denoise import Denoiser

SPOOL_BYTES = 4 * 2**20
"""Of the time courses (float32) that are denoised together; in float64 and with what the filter and
the splines need, some twenty times as much is in use."""
READ_VOLUMES = 16


class DenoisedStream:
    """A run's volumes after `Denoiser`, read like a `BrainStream`. A context manager.

    Parameters
    ----------
    stream
        The run as it is.
    denoiser
        What is to be done to it.
    folder
        Where the spool lies: `max(volumes before, after) * voxels * 4` bytes, without a name, so
        that it is gone with the process.

    Raises
    ------
    InputError
        When the run cannot be read (see `BrainStream.blocks`).
    """

    def __init__(self, stream: BrainStream, denoiser: Denoiser, folder: Path):
        self.path, self.voxels = stream.path, stream.voxels
        self._n_volumes = len(denoiser.times)
        folder.mkdir(parents=True, exist_ok=True)
        rows = max(stream.header.n_volumes, self._n_volumes)
        self._spool = Spool(folder, rows, len(self.voxels))
        try:
            self._fill(stream, denoiser)
        except BaseException:
            self._spool.close()
            raise

    def __enter__(self) -> DenoisedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._spool.close()

    def blocks(self, ahead: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        """Yield all volumes in blocks: (volume, voxel) float32. `ahead` is without effect."""
        for first in range(0, self._n_volumes, READ_VOLUMES):
            yield self._spool.read_volumes(first, min(READ_VOLUMES, self._n_volumes - first))

    def _fill(self, stream: BrainStream, denoiser: Denoiser) -> None:
        done = 0
        for block in stream.blocks():
            self._spool.write_volumes(done, block)
            done += len(block)
        shown = tqdm(
            range(self._spool.n_blocks),
            "denoise",
            unit="block",
            leave=False,
            delay=10,
            mininterval=1,
        )
        for number in shown:
            series = self._spool.read_voxels(number, done)
            self._spool.write_voxels(number, denoiser.apply(series))


class Spool:
    """(volume, voxel) float32 values on disk, by volumes and by blocks of voxels.

    A block of voxels is one piece of the file. It is read and written, not mapped, because pages
    of a mapping count as the process's memory.

    Parameters
    ----------
    folder
        Where the file lies, without a name.
    rows
        Volumes that there is room for.
    n_voxels
        Voxels of each.
    """

    def __init__(self, folder: Path, rows: int, n_voxels: int):
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, until `close`
        self._rows, self._n_voxels = rows, n_voxels
        self._width = max(1, SPOOL_BYTES // (4 * rows))
        self.n_blocks = -(-n_voxels // self._width)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def write_volumes(self, first: int, values: npt.NDArray[np.float32]) -> None:
        """Write (volume, voxel) from row `first` on."""
        for number in range(self.n_blocks):
            self._seek(number, first)
            self._file.write(np.ascontiguousarray(values[:, self._columns(number)]).data)

    def read_volumes(self, first: int, count: int) -> npt.NDArray[np.float32]:
        """Read `count` rows of all voxels from row `first` on."""
        values = np.empty((count, self._n_voxels), dtype=np.float32)
        for number in range(self.n_blocks):
            values[:, self._columns(number)] = self._read(number, first, count)
        return values

    def write_voxels(self, number: int, values: npt.NDArray[np.float32]) -> None:
        """Write a block of voxels from its first row on."""
        self._seek(number, 0)
        self._file.write(np.ascontiguousarray(values).data)

    def read_voxels(self, number: int, count: int) -> npt.NDArray[np.float32]:
        """Read the first `count` rows of a block of voxels."""
        return self._read(number, 0, count)

    def _columns(self, number: int) -> slice:
        return slice(number * self._width, min((number + 1) * self._width, self._n_voxels))

    def _seek(self, number: int, row: int) -> None:
        columns = self._columns(number)
        width = columns.stop - columns.start
        self._file.seek(4 * (columns.start * self._rows + row * width))

    def _read(self, number: int, first: int, count: int) -> npt.NDArray[np.float32]:
        columns = self._columns(number)
        values = np.empty((count, columns.stop - columns.start), dtype=np.float32)
        self._seek(number, first)
        content = self._file.read(values.nbytes)
        values.reshape(-1).view(np.uint8)[:] = np.frombuffer(content, dtype=np.uint8)
        return values
