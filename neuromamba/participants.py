"""The table of subjects: their site and the values of the targets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from neuromamba.bids_scan import subject_name
from neuromamba.config import Classification, Dataset, Participants, Regression
from neuromamba.files import InputError
from neuromamba.tables import read_table

MISSING = ["n/a", "N/A", "NA", "NaN", "nan", ""]


def read_participants(dataset: Dataset) -> pd.DataFrame:
    """Read the participants table and look up the dataset's targets in it.

    Returns
    -------
    pandas.DataFrame
        Indexed by subject (`sub-01`). Column `site` (text), and one column for each target that
        is no state: the class's name for a classification, a float for a regression. Missing where
        the cell is empty or, with a warning, where it is the value of no class.

    Raises
    ------
    InputError
        When there is no table for the targets, a column is missing, a subject has no id or two
        rows, or the cell of a regression target is not a number.
    """
    settings = dataset.participants
    if settings is None:
        if dataset.subject_targets:
            raise InputError(
                f"the targets {', '.join(dataset.subject_targets)} need a table of subjects: set "
                "participants.file in the dataset YAML"
            )
        return pd.DataFrame({"site": pd.Series(dtype="string")}, index=pd.Index([], name="subject"))
    table = read_rows(settings)
    subjects = table.index.to_series()
    site = (
        _column(table, settings.site_column, "participants.site_column", settings.file)
        if settings.site_column
        else pd.Series([None] * len(table), dtype="string")
    )
    columns = {"site": site.str.strip().array}
    for name, target in dataset.subject_targets.items():
        if name in columns:
            raise InputError(f"target {name!r} has the name of a reserved column; rename it")
        cells = _column(table, target.column, f"targets.{name}.column", settings.file)
        columns[name] = (
            _class_names(cells, name, target, settings.file)
            if isinstance(target, Classification)
            else _numbers(cells, subjects, target, settings.file)
        ).array
    return pd.DataFrame(columns, index=table.index)


def read_rows(settings: Participants) -> pd.DataFrame:
    """All that the table says, as text indexed by subject (`sub-01`).

    Raises
    ------
    InputError
        When there is no such table, or a subject has no id or two rows.
    """
    table = read_table(settings.file, dtype=str, na_values=MISSING)
    table.columns = table.columns.str.strip()
    return table.set_index(pd.Index(_subjects(table, settings), name="subject"))


def check_participants(dataset: Dataset, subjects: Sequence[str]) -> None:
    """Read the table, and compare it with the subjects that have runs, before hours of work.

    Raises
    ------
    InputError
        When the table is wrong or has none of the subjects; of some it warns.
    """
    participants = read_participants(dataset)
    if dataset.participants is None:
        return
    absent = [subject for subject in subjects if subject not in participants.index]
    if not absent:
        return
    file, counts = dataset.participants.file, f"{len(absent)} of {len(subjects)} subjects"
    if len(absent) == len(subjects):
        raise InputError(
            f"{file} has a row for none of the {len(subjects)} subjects that have runs "
            f"({_some(absent)}); its subjects are {_some(list(participants.index))}; make the "
            "labels agree (leading zeros?)"
        )
    warnings.warn(
        f"{file} has no row for {counts}: {_some(absent)}; they have no site and no labels",
        stacklevel=2,
    )


def _column(table: pd.DataFrame, column: str, key: str, file: str) -> pd.Series:
    if column not in table:
        raise InputError(
            f"{file} has no column {column!r} ({key} in the dataset YAML); it has: "
            f"{', '.join(table.columns)}"
        )
    return table[column]


def _subjects(table: pd.DataFrame, settings: Participants) -> pd.Series:
    labels = _column(table, settings.id_column, "participants.id_column", settings.file)
    if labels.isna().any():
        row = int(np.flatnonzero(labels.isna())[0]) + 2
        raise InputError(
            f"{settings.file}, line {row}: {settings.id_column!r} is empty; fill it in or delete "
            "the line"
        )
    subjects = labels.map(subject_name)
    double = subjects[subjects.duplicated()].unique()
    if len(double):
        raise InputError(
            f"{settings.file} has more than one row for {_some(double)}; keep one row a subject"
        )
    return subjects


def _class_names(cells: pd.Series, name: str, target: Classification, file: str) -> pd.Series:
    by_cell: dict[str, str] = {}
    for class_name, cell in target.classes.items():
        other = by_cell.setdefault(comparable(cell), class_name)
        if other != class_name:
            raise InputError(
                f"targets.{name}.classes: {other!r} and {class_name!r} have the same cell value "
                f"{cell!r}"
            )
    known = cells.map(comparable, na_action="ignore")
    unknown = cells[known.notna() & ~known.isin(list(by_cell))]
    if len(unknown):
        counts = ", ".join(f"{cell!r} ({n} x)" for cell, n in unknown.value_counts().items())
        warnings.warn(
            f"{file}, column {target.column!r}: {counts} is no class of targets.{name}.classes "
            f"({', '.join(map(repr, target.classes.values()))}); these subjects have no label",
            stacklevel=3,
        )
    return known.map(by_cell)


def comparable(cell: str) -> str:
    """Text that is equal for `1`, `1.0` and ` 1`, as programs that write tables differ in it."""
    cell = cell.strip()
    try:
        return repr(float(cell))
    except ValueError:
        return cell


def _numbers(cells: pd.Series, subjects: pd.Series, target: Regression, file: str) -> pd.Series:
    numbers = pd.to_numeric(cells.str.strip(), errors="coerce").astype(float)
    wrong = np.flatnonzero((numbers.isna() & cells.notna()) | np.isinf(numbers))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{file}, line {row + 2} ({subjects.iloc[row]}), column {target.column!r}: "
            f"{cells.iloc[row]!r} is not a number ({len(wrong)} such cells); correct it, or write "
            "n/a where the value is not known"
        )
    return numbers


def _some(names: Sequence[str] | np.ndarray) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" * (len(names) > 5))
