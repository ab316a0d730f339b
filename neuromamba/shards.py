"""Read chunks of an uncompressed, sharded Zarr v3 array straight into an array.

zarr-python reads such an array too, but takes ten times as long for a few chunks. An uncompressed
chunk needs no decoding, only its place: the index at the end of the shard tells it. The bytes go
from the page cache into the output in one copy. Mapping the files into memory measured no faster,
and thousands of open runs would exhaust the limits on mappings and open files; reading also turns
a file that is too short into an error instead of a crash.

Source: Zarr v3 sharding codec, https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from neuromamba.files import InputError, read_json


class ShardedArray:
    """An array that is chunked and sharded along its first axis, one row a chunk.

    Parameters
    ----------
    path
        Folder of the array, with `zarr.json`.

    Attributes
    ----------
    shape
        Shape of the array.
    dtype
        Type of its values.
    attrs
        Its attributes.

    Raises
    ------
    InputError
        When the array is absent or stored in another way.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        meta = read_json(self.path / "zarr.json")
        try:
            self.shape: tuple[int, ...] = tuple(meta["shape"])
            self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
            self.attrs: dict[str, Any] = meta["attributes"]
            shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
            (codec,) = meta["codecs"]
            little = {"name": "bytes", "configuration": {"endian": "little"}}
            expected = {
                "chunk_shape": [1, *self.shape[1:]],
                "codecs": [little],
                "index_codecs": [little, {"name": "crc32c"}],
                "index_location": "end",
            }
            known = codec["name"] == "sharding_indexed" and codec["configuration"] == expected
            separator = meta["chunk_key_encoding"]["configuration"]["separator"]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: unreadable array metadata ({error})") from None
        if not known or shard[1:] != list(self.shape[1:]) or separator != "/":
            raise InputError(
                f"{self.path}: is not stored as uncompressed rows in shards; make it again"
            )
        self._rows: int = shard[0]
        self._row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
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
        if start < 0 or start + len(out) > self.shape[0]:
            raise IndexError(f"rows {start} to {start + len(out)} of {self.shape[0]}")
        flat = out.reshape(len(out), -1).view(np.uint8)
        row = start
        while row < start + len(out):
            shard = row // self._rows
            stop = min((shard + 1) * self._rows, start + len(out))
            self._read_shard(shard, row - shard * self._rows, flat[row - start : stop - start])
            row = stop

    def _read_shard(self, shard: int, first: int, out: npt.NDArray[np.uint8]) -> None:
        path = self.path.joinpath("c", str(shard), *["0"] * (len(self.shape) - 1))
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
        index_bytes = 16 * self._rows
        size = stream.seek(0, 2)
        if size < index_bytes + 4:
            raise _damaged(path, "is truncated")
        stream.seek(size - index_bytes - 4)
        tail = bytearray(index_bytes + 4)
        _fill(path, stream, memoryview(tail))
        if google_crc32c.value(bytes(tail[:-4])) != int.from_bytes(tail[-4:], "little"):
            raise _damaged(path, "has an index that does not match its checksum")
        present = min(self._rows, self.shape[0] - shard * self._rows)
        index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)[:present]
        offset, length = index[:, 0], index[:, 1]
        # An absent row has 2**64 - 1 for both.
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
