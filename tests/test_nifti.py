"""Streaming NIfTI files: the same numbers as nibabel, bounded memory, and no damage unnoticed."""

from __future__ import annotations

import gzip
import struct
import threading
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scans import affine_8mm, series, write_scan

from neuromamba import nifti
from neuromamba.files import InputError
from neuromamba.headers import glimpse
from neuromamba.nifti import read_blocks, read_header, read_image

SHAPE = (5, 6, 7)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "BLOCK_BYTES", 4096)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_scan(tmp_path / "bold.nii.gz", series(SHAPE, 30), affine_8mm())


def read_all(path: Path, ahead: int = 4) -> np.ndarray:
    header = read_header(path)
    stored = np.concatenate(list(read_blocks(header, ahead)))
    return stored.reshape(header.n_volumes, *header.shape[::-1]).T


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_blocks_hold_what_nibabel_reads(tmp_path: Path, kind: str, order: str, name: str) -> None:
    data = np.random.default_rng(0).integers(0, 200, (*SHAPE, 25)).astype(kind)
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(kind)
    image = nibabel.Nifti1Image(data, affine_8mm(), header)
    nibabel.save(image, tmp_path / name)
    found = read_header(tmp_path / name)
    np.testing.assert_array_equal(read_all(tmp_path / name), data)
    np.testing.assert_array_equal(found.affine, affine_8mm())
    assert (found.shape, found.n_volumes, found.is_series) == (SHAPE, 25, True)
    assert found.dtype.newbyteorder("=") == np.dtype(kind)


def test_several_blocks_are_read_and_none_is_too_large(scan: Path) -> None:
    blocks = list(read_blocks(read_header(scan)))
    assert len(blocks) > 3
    assert max(block.nbytes for block in blocks) <= nifti.BLOCK_BYTES


def test_scaling_is_read(tmp_path: Path) -> None:
    data = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    path = write_scan(tmp_path / "t1.nii.gz", data, affine_8mm(), slope=0.5, inter=-3)
    header = read_header(path)
    assert (header.slope, header.intercept, header.is_series) == (0.5, -3, False)
    np.testing.assert_array_equal(read_image(header), nibabel.load(path).get_fdata())


def test_nifti2_extensions_and_a_fifth_axis_of_one_are_read(tmp_path: Path) -> None:
    data = series(SHAPE, 10)
    image = nibabel.Nifti2Image(data[..., None], affine_8mm())
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 1000))
    nibabel.save(image, tmp_path / "two.nii.gz")
    assert read_header(tmp_path / "two.nii.gz").offset > 1000
    np.testing.assert_array_equal(read_all(tmp_path / "two.nii.gz"), data)


@pytest.mark.parametrize("ahead", [0, 4])
@pytest.mark.parametrize("missing", [1, 4, 8, 500, 5000])
def test_truncated_gzip_is_refused(scan: Path, missing: int, ahead: int) -> None:
    scan.write_bytes(scan.read_bytes()[:-missing])
    with pytest.raises(InputError, match=r"bold\.nii\.gz: is truncated.*again"):
        read_all(scan, ahead)


def test_truncated_uncompressed_file_is_refused(tmp_path: Path) -> None:
    path = write_scan(tmp_path / "bold.nii", series(SHAPE, 30), affine_8mm())
    path.write_bytes(path.read_bytes()[: -3 * 840 - 1])
    with pytest.raises(InputError, match="is truncated: it ends in volume 26"):
        read_all(path)


def test_a_flipped_bit_is_noticed(scan: Path) -> None:
    damaged = bytearray(scan.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    scan.write_bytes(bytes(damaged))
    with pytest.raises(InputError, match=r"is (damaged|truncated)"):
        read_all(scan)


def test_more_data_than_declared_is_refused(scan: Path) -> None:
    scan.write_bytes(gzip.compress(gzip.decompress(scan.read_bytes()) + b"\0"))
    with pytest.raises(InputError, match="goes on after the 30 volumes"):
        read_all(scan)


def set_field(scan: Path, offset: int, code: str, *values: float) -> None:
    raw = bytearray(gzip.decompress(scan.read_bytes()))
    struct.pack_into("<" + code, raw, offset, *values)
    scan.write_bytes(gzip.compress(bytes(raw)))


BAD_FIELDS = {
    "not a NIfTI": (0, "i", [99], "does not begin with a NIfTI header"),
    "unknown type": (70, "h", [999], "header is unusable"),
    "complex": (70, "h", [32], "stores complex64 values"),
    "pair of files": (344, "4s", [b"ni1"], "is not a single-file NIfTI"),
    "2D": (40, "8h", [2, 5, 6, 1, 1, 1, 1, 1], "a 3D image or a 4D series is needed"),
    "5D": (40, "8h", [5, 5, 6, 7, 1, 30, 1, 1], "a 3D image or a 4D series is needed"),
    "no affine": (252, "2h", [0, 0], "neither sform nor qform"),
    "flat affine": (280, "4f", [0, 0, 0, 0], "affine cannot be inverted"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_unusable_headers_are_refused(scan: Path, case: str) -> None:
    offset, code, values, message = BAD_FIELDS[case]
    set_field(scan, offset, code, *values)
    with pytest.raises(InputError, match=message) as error:
        read_header(scan)
    assert str(scan) in str(error.value)


@pytest.mark.parametrize("case", [case for case in BAD_FIELDS if case not in ("2D", "5D")])
def test_a_glimpse_refuses_the_same_headers(scan: Path, case: str) -> None:
    assert glimpse(scan).shape == (*SHAPE, 30)
    offset, code, values, message = BAD_FIELDS[case]
    set_field(scan, offset, code, *values)
    if case == "not a NIfTI":
        message = "has no readable NIfTI header"
    with pytest.raises(InputError, match=message) as error:
        glimpse(scan)
    assert str(scan) in str(error.value)


def test_files_that_are_not_what_their_name_says_are_refused(tmp_path: Path, scan: Path) -> None:
    plain = tmp_path / "plain.nii.gz"
    plain.write_bytes(gzip.decompress(scan.read_bytes()))
    with pytest.raises(InputError, match="is not gzip"):
        read_header(plain)
    zipped = scan.rename(tmp_path / "zipped.nii")
    with pytest.raises(InputError, match="is gzip"):
        read_header(zipped)
    empty = tmp_path / "empty.nii.gz"
    empty.touch()
    with pytest.raises(InputError, match="is not gzip"):
        read_header(empty)
    short = tmp_path / "short.nii"
    short.write_bytes(b"text")
    with pytest.raises(InputError, match="does not begin with a NIfTI header"):
        read_header(short)
    with pytest.raises(InputError, match="does not exist"):
        read_header(tmp_path / "absent.nii.gz")
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path)


def test_an_abandoned_stream_leaves_no_thread(scan: Path) -> None:
    before = threading.active_count()
    blocks = read_blocks(read_header(scan))
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_memory_does_not_grow_with_the_number_of_volumes(tmp_path: Path) -> None:
    def peak(n_volumes: int) -> int:
        path = write_scan(tmp_path / f"{n_volumes}.nii.gz", series(SHAPE, n_volumes), affine_8mm())
        header = read_header(path)
        tracemalloc.start()
        for _ in read_blocks(header):
            pass
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    # 1900 volumes more are 1.6 MB more to read.
    assert peak(2000) < peak(100) + 100_000
