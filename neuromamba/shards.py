"""Write sharded Zarr v3 arrays chunk by chunk, and read uncompressed ones straight into memory.

Only arrays that are cut along their first axis. zarr-python makes the arrays and reads all of them,
and the tests hold this module to what it reads; but for these arrays it is slow:

- It writes a shard at once, with several copies of it in memory. Here each chunk is compressed and
  appended as it comes, and the shard's index at the end.
- It takes ten times as long to read a few uncompressed chunks. They need no decoding, only their
  places, which the index tells; the bytes go from the page cache into the output in one copy.
  Mapping the files into memory measured no faster, and thousands of open runs would exhaust the
  limits on mappings and open files; reading also turns a file that is too short into an error
  instead of a crash.

Source: Zarr v3 sharding codec, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from neuromamba.files import InputError, read_json

ABSENT = np.uint64(2**64 - 1)
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


@dataclass(frozen=True)
class Layout:
    """How an array is stored.

    Attributes
    ----------
    path
        Folder of the array, with `zarr.json`.
    shape, dtype, attrs
        Shape, type of the values and attributes of the array.
    chunk_shape
        Shape of a chunk: whole but for the first axis.
    chunks
        Chunks in a shard.
    level
        Level of the zstd compression, `None` without.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    attrs: dict[str, Any]
    chunk_shape: tuple[int, ...]
    chunks: int
    level: int | None

    @classmethod
    def read(cls, path: Path | str) -> Layout:
        """Read an array's metadata; `InputError` when it is absent or of another layout."""
        path = Path(path)
        meta = read_json(path / "zarr.json")
        try:
            shape, attrs = tuple(meta["shape"]), meta["attributes"]
            dtype = np.dtype(meta["data_type"]).newbyteorder("<")
            shard_shape = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
            (sharding,) = meta["codecs"]
            settings = sharding["configuration"]
            chunk_shape = tuple(settings["chunk_shape"])
            first, *compression = settings["codecs"]
            level = compression[0]["configuration"]["level"] if compression else None
            known = (
                sharding["name"] == "sharding_indexed"
                and settings["index_codecs"] == [LITTLE, {"name": "crc32c"}]
                and settings["index_location"] == "end"
                and first == LITTLE
                and [codec["name"] for codec in compression] in ([], ["zstd"])
                and shard_shape[1:] == chunk_shape[1:] == shape[1:]
                and meta["chunk_key_encoding"]["configuration"]["separator"] == "."
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: unreadable array metadata ({error})") from None
        if not known:
            raise InputError(f"{path}: is not stored in shards as expected; make it again")
        return cls(path, shape, dtype, attrs, chunk_shape, shard_shape[0] // chunk_shape[0], level)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.path / ".".join(["c", str(number), *["0"] * (len(self.shape) - 1)])


class ShardWriter:
    """Write an array from its first chunk to its last. A context manager.

    Parameters
    ----------
    path
        Folder of an array that zarr has created.
    """

    def __init__(self, path: Path | str):
        self.layout = Layout.read(path)
        level = self.layout.level
        self._compressor = None if level is None else Zstd(level=level)
        self._number = 0
        self._places: list[tuple[int, int]] = []
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            with self._stream:
                if error is None:
                    self._write_index(self._stream)

    def append(self, chunk: npt.NDArray[Any]) -> None:
        """Write the next chunk, whole and C-contiguous also where the array ends inside of it."""
        if chunk.shape != self.layout.chunk_shape or chunk.dtype != self.layout.dtype:
            raise ValueError(f"{chunk.dtype} {chunk.shape} is no chunk of {self.layout}")
        if self._stream is None:
            path = self.layout.shard(self._number)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("wb")
        content = chunk.reshape(-1).view(np.uint8).data
        if self._compressor is not None:
            content = self._compressor.encode(content)
        start = sum(self._places[-1]) if self._places else 0
        self._places.append((start, len(content)))
        self._stream.write(content)
        if len(self._places) == self.layout.chunks:
            with self._stream:
                self._write_index(self._stream)
            self._stream = None
            self._places = []
            self._number += 1

    def _write_index(self, stream: IO[bytes]) -> None:
        index = np.full((self.layout.chunks, 2), ABSENT, dtype="<u8")
        index[: len(self._places)] = self._places
        content = index.tobytes()
        stream.write(content + google_crc32c.value(content).to_bytes(4, "little"))


class ShardedArray:
    """Read an uncompressed array whose chunks are single rows.

    Parameters
    ----------
    path
        Folder of the array.

    Attributes
    ----------
    layout
        Its shape, type and attributes.

    Raises
    ------
    InputError
        When the array is absent or stored in another way.
    """

    def __init__(self, path: Path | str):
        self.layout = Layout.read(path)
        if self.layout.level is not None or self.layout.chunk_shape[0] != 1:
            raise InputError(f"{path}: is not stored as uncompressed rows; make it again")
        self._row_bytes = int(np.prod(self.layout.chunk_shape)) * self.layout.dtype.itemsize
        self._places: dict[int, list[int]] = {}

    def read(self, start: int, out: npt.NDArray[Any]) -> None:
        """Read the rows from `start` on into `out`.

        Parameters
        ----------
        start
            First row.
        out
            (row, ...) C-contiguous array of `dtype`, filled in place.

        Raises
        ------
        IndexError
            When the array has no such rows.
        InputError
            When a shard is missing or damaged.
        """
        n_rows = self.layout.shape[0]
        if start < 0 or start + len(out) > n_rows:
            raise IndexError(f"rows {start} to {start + len(out)} of {n_rows}")
        flat = out.reshape(len(out), -1).view(np.uint8)
        row = start
        while row < start + len(out):
            shard, first = divmod(row, self.layout.chunks)
            stop = min((shard + 1) * self.layout.chunks, start + len(out))
            self._read_shard(shard, first, flat[row - start : stop - start])
            row = stop

    def _read_shard(self, shard: int, first: int, out: npt.NDArray[np.uint8]) -> None:
        path = self.layout.shard(shard)
        try:
            with path.open("rb", buffering=0) as stream:
                if shard not in self._places:
                    self._places[shard] = self._read_index(path, stream, shard)
                places = self._places[shard][first : first + len(out)]
                done = 0
                while done < len(out):
                    # Rows that lie next to each other in the file are one read.
                    count = 1
                    while (
                        done + count < len(out)
                        and places[done + count] == places[done] + count * self._row_bytes
                    ):
                        count += 1
                    stream.seek(places[done])
                    wanted = out[done : done + count].reshape(-1)
                    _fill(path, stream, wanted.data)
                    done += count
        except FileNotFoundError:
            raise _damaged(path, "is missing") from None

    def _read_index(self, path: Path, stream: Any, shard: int) -> list[int]:
        """Byte offsets of a shard's rows, after checking the index."""
        index_bytes = 16 * self.layout.chunks
        size = stream.seek(0, 2)
        if size < index_bytes + 4:
            raise _damaged(path, "is truncated")
        stream.seek(size - index_bytes - 4)
        tail = bytearray(index_bytes + 4)
        _fill(path, stream, memoryview(tail))
        if google_crc32c.value(bytes(tail[:-4])) != int.from_bytes(tail[-4:], "little"):
            raise _damaged(path, "has an index that does not match its checksum")
        present = min(self.layout.chunks, self.layout.shape[0] - shard * self.layout.chunks)
        index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)[:present]
        offset, length = index[:, 0], index[:, 1]
        # An absent row has ABSENT for both.
        if (length != self._row_bytes).any() or (offset > size - index_bytes - 4 - length).any():
            raise _damaged(path, "lacks rows, or has rows of another size")
        return [int(place) for place in offset]


def _fill(path: Path, stream: Any, out: memoryview) -> None:
    done = 0
    while done < len(out):
        step = stream.readinto(out[done:])
        if not step:
            raise _damaged(path, "is truncated")
        done += step


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; delete the store and make it again")
