"""Atlases that are files: labelled NIfTI images, and the tables that name their regions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pandas as pd

from neuromamba.files import InputError, digest_file
from neuromamba.parcellation import Parcellation, digest_labels

ROUNDING = 1e-4
"""A label stored with a scale is this near to a whole number."""
NOT_OF_LABELS = {"res"}
"""Entities that an atlas has and the table of its labels has not."""


def read_atlas(path: Path | str) -> Parcellation:
    """Read a labelled NIfTI: whole numbers, 0 for background.

    Its space is that of its name's `space` or `tpl` entity. Names come from a table beside it, see
    `find_names`; a region without one goes by its number.

    Raises
    ------
    InputError
        When the file is absent or unreadable, is not one 3D image, or holds no whole numbers
        (a probabilistic atlas), or no label at all.
    """
    path = Path(path)
    try:
        image: Any = nibabel.load(path)
        data = np.asanyarray(image.dataobj)
    except FileNotFoundError:
        raise InputError(
            f"{path}: the atlas does not exist; correct the dataset's `atlas`"
        ) from None
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: the atlas is not a readable NIfTI ({error})") from None
    table = find_names(path)
    names = _read_names(table) if table else {}
    made = from_labels(str(path), data, np.asarray(image.affine), names)
    entities = _entities(_stem(path))
    return replace(
        made,
        name=path.name,
        sha256=digest_file(path),
        space=entities.get("space", entities.get("tpl")),
        names_from=table.name if table and names else None,
    )


def from_labels(
    where: str,
    data: npt.NDArray[Any],
    affine: npt.NDArray[np.float64],
    names: dict[int, str],
) -> Parcellation:
    """The parcellation of an image of labels, named by `names` or else by number.

    A name that several labels share is followed by the number.

    Parameters
    ----------
    where
        The atlas, for messages and as the parcellation's name.
    data, affine
        (x, y, z) labels, and (4, 4) voxel indices to mm.
    names
        Name of each label, as far as it has one.

    Raises
    ------
    InputError
        When the image is not 3D, or holds no whole numbers or no label.
    """
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(
            f"{where}: the atlas has shape {data.shape}; give one 3D image of labels, "
            "not one map per region"
        )
    whole = np.round(data)
    if not np.isfinite(data).all() or (np.abs(data - whole) > ROUNDING).any() or (whole < 0).any():
        raise InputError(f"{where}: an atlas holds whole numbers, 0 for background; this does not")
    values = np.unique(whole)
    values = values[values > 0]
    if not len(values):
        raise InputError(f"{where}: the atlas holds no label above 0")
    index = np.searchsorted(values, whole).astype(np.int32)
    index[whole == 0] = -1
    numbers = [int(value) for value in values]
    labels = [names.get(number, str(number)) for number in numbers]
    twice = {label for label in labels if labels.count(label) > 1}
    labels = [
        f"{label} ({number})" if label in twice else label
        for label, number in zip(labels, numbers, strict=True)
    ]
    return Parcellation(where, digest_labels(index, affine), labels, index, affine)


def find_names(path: Path) -> Path | None:
    """The table of an atlas's names, in its folder; empty files, which promise one, do not count.

    The first of: the atlas's own name as .tsv or .csv; a BIDS `dseg.tsv` whose entities are all the
    atlas's, most of them first; `{start}_*labels.tsv` or .csv, where `start` is what stands before
    the first `_` of the atlas's name, in any case; `labels.tsv` or .csv, where this is the only
    NIfTI file.
    """
    if not path.parent.is_dir():
        return None
    files = sorted(path.parent.iterdir())
    images = [file for file in files if file.name.endswith((".nii", ".nii.gz"))]
    tables = [f for f in files if f.suffix in (".tsv", ".csv") and f.is_file() and f.stat().st_size]
    stem = _stem(path)
    own, start = _entities(stem).items(), stem.split("_")[0].lower()

    def rank(table: Path) -> tuple[int, int]:
        entities = _entities(table.stem)
        if table.stem == stem:
            return (0, 0)
        if table.name.endswith("_dseg.tsv") and entities and entities.items() <= own:
            return (1, -len(entities))
        parts = table.stem.lower().split("_")
        if parts[0] == start and parts[-1] == "labels":
            return (2, 0)
        return (3 if table.stem == "labels" and len(images) == 1 else 4, 0)

    best = min(tables, key=rank, default=None)
    return best if best and rank(best)[0] < 4 else None


def _read_names(table: Path) -> dict[int, str]:
    """Names by label from the BIDS columns `index` and `name`; none where one is not there."""
    try:
        rows = pd.read_csv(table, sep="\t" if table.suffix == ".tsv" else ",", dtype=str)
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(f"{table}: not a readable table of the atlas's names ({error})") from None
    rows.columns = [str(column).strip().lower() for column in rows.columns]
    if not {"index", "name"} <= {*rows.columns}:
        return {}
    rows = rows.dropna(subset=["index", "name"])
    numbers = pd.to_numeric(rows["index"], errors="coerce")
    if numbers.isna().any() or numbers.duplicated().any():
        raise InputError(f"{table}: the column `index` must hold each label once, as a number")
    return dict(zip(numbers.astype(int), rows["name"].str.strip(), strict=True))


def _stem(image: Path) -> str:
    return image.name.removesuffix(".gz").removesuffix(".nii")


def _entities(name: str) -> dict[str, str]:
    parts = (part.partition("-") for part in name.split("_"))
    return {key: value for key, dash, value in parts if dash and key not in NOT_OF_LABELS}
