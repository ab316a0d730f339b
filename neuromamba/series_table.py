"""Read tables of ROI series: a column for each region, a row for each volume, `n/a` for missing.

They are read row by row, so that what is wrong can be told by its line, and memory is that of one
run's numbers.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import numpy as np
import numpy.typing as npt

from neuromamba.files import InputError

MISSING = {"n/a": np.nan, "N/A": np.nan, "NA": np.nan, "": np.nan}


def glimpse_table(path: str) -> tuple[list[str], int]:
    """The names of a table's regions, and its number of volumes.

    Raises
    ------
    InputError
        When the table cannot be read, is empty or has no names of regions.
    """
    with _opened(path) as stream:
        regions = _regions(path, csv.reader(stream, delimiter="\t"))
        return regions, sum(1 for line in stream if not line.isspace())


def read_table_of_series(path: str) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Read a table of ROI series, which may end in `.gz`.

    Returns
    -------
    regions : list of str
        The names in its first line.
    series : (time, roi) float32
        NaN where a value is missing.

    Raises
    ------
    InputError
        When the table cannot be read or is empty, has no names of regions, a row of another
        length, or a cell that is neither a number nor missing; with the line.
    """
    values = []
    with _opened(path) as stream:
        rows = csv.reader(stream, delimiter="\t")
        regions = _regions(path, rows)
        for row in rows:
            if not row:
                continue
            if len(row) != len(regions):
                raise InputError(
                    f"{path}, line {rows.line_num}: has {len(row)} cells where line 1 names "
                    f"{len(regions)} regions; repair or replace the table"
                )
            values.append(_numbers(path, rows.line_num, regions, row))
    if not values:
        raise InputError(f"{path}: has no volumes, only names of regions; replace it")
    return regions, np.stack(values)


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    """The text of a table; what cannot be read becomes an `InputError`."""
    try:
        # Some programs begin a text with a mark of its byte order, which is part of no name.
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            yield stream
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); repair or replace it") from None


def _regions(path: str, rows: Iterator[list[str]]) -> list[str]:
    """The first line of a table, checked."""
    names = [name.strip() for name in next(rows, [])]
    if not any(names):
        raise InputError(f"{path}: is empty; replace it")
    if not all(names):
        raise InputError(
            f"{path}, line 1: column {names.index('') + 1} has no name; each column must be a "
            "region: remove what is none, such as a column of row numbers"
        )
    if any(map(_is_fraction, names)):
        raise InputError(
            f"{path}, line 1: has numbers where the names of the regions must stand; add a line "
            "with the names"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}, line 1: names the region {twice!r} twice; rename or remove one")
    return names


def _is_fraction(name: str) -> bool:
    """Whether a name is a number with a point; whole numbers may be labels of an atlas."""
    try:
        float(name)
    except ValueError:
        return False
    return not name.isdigit()


def _numbers(
    path: str, line: int, regions: Sequence[str], row: Sequence[str]
) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        numbers = np.array([_number(cell.strip()) for cell in row]).astype(np.float32)
    wrong = np.flatnonzero(np.isinf(numbers))
    if len(wrong):
        first = int(wrong[0])
        raise InputError(
            f"{path}, line {line}, column {regions[first]!r}: {row[first]!r} is not a number; "
            "correct it, or write n/a where the value is missing"
        )
    return numbers


def _number(cell: str) -> float:
    """The number in a cell: NaN for a missing one, infinite for what is no number."""
    try:
        return MISSING[cell] if cell in MISSING else float(cell)
    except ValueError:
        return np.inf
