"""Find the preprocessed T1w image of each subject of a derivatives folder by names alone.

One image a subject. fMRIPrep's average over sessions (in `sub-*/anat`) comes first, then the first
session among those that the dataset's `entities` ask for, then the first of any.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from neuromamba.bids_scan import LONG_NAMES, MASK, NATIVE, entities_of, run_name, subject_name
from neuromamba.config import Dataset
from neuromamba.files import InputError, digest_json
from neuromamba.listing import READERS, find_excluded, sample_file

T1W = "_desc-preproc_T1w.nii.gz"


@dataclass(frozen=True)
class Anatomical:
    """The T1w image of one subject, or why there is none.

    Attributes
    ----------
    subject
        `sub-02`.
    t1w, mask
        The image and its brain mask; `None` where there is none.
    session
        Label of the session; `None` for an image of no session in particular.
    fingerprint
        16 hexadecimal digits that change with names or content of the two; empty without an image.
    note
        Which other images there are.
    reason
        Why the subject has no usable image; `None` if it has.
    """

    subject: str
    t1w: str | None = None
    mask: str | None = None
    session: str | None = None
    fingerprint: str = ""
    note: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class _Image:
    entities: dict[str, str]
    path: str
    mask: str
    has_mask: bool

    @property
    def name(self) -> str:
        return run_name(self.entities)


def find_anatomicals(dataset: Dataset) -> list[Anatomical]:
    """The T1w image of each subject of a derivatives folder, by names alone.

    `space`, `resolution` and `exclude` of the dataset are obeyed as for its runs; of `entities`,
    only sessions mean something here, and another session's image is better than none.

    Returns
    -------
    list
        One for each `sub-*` folder, sorted; those without a usable image have a `reason`.

    Raises
    ------
    InputError
        When the derivatives folder does not exist or cannot be listed.
    """
    root = dataset.derivatives.rstrip("/") or "/"
    try:
        with os.scandir(root) as entries:
            names = sorted(e.name for e in entries if e.name.startswith("sub-") and e.is_dir())
        if dataset.files is not None:
            why = f"{root} has file names of its own (`files`), which name no T1w images"
            return [Anatomical(subject_name(name), reason=why) for name in names]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda name: _choose(root, name, dataset), names))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{root} is not a folder; set derivatives in the dataset YAML to the folder that "
            "holds sub-*"
        ) from None
    except PermissionError as error:
        raise InputError(
            f"{error.filename} cannot be listed; ask for permission to read it"
        ) from None


def fingerprint_images(files: Sequence[str]) -> str:
    """16 hexadecimal digits that change with the names or the content of some images and masks."""
    return digest_json([[Path(path).name, *sample_file(path)] for path in files])[:16]


def _choose(root: str, folder: str, dataset: Dataset) -> Anatomical:
    subject = subject_name(folder)
    every = list(_images(root, folder))
    excluded, _ = find_excluded([image.name for image in every], dataset)
    kept = [image for image in every if image.name not in excluded]
    wanted = [image for image in kept if _is_version(image.entities, dataset)]
    if not wanted:
        return Anatomical(subject, reason=_nothing(f"{root}/{folder}", kept, dataset))
    asked = {
        label
        for key, labels in dataset.entities.items()
        if LONG_NAMES.get(key, key) == "ses"
        for label in labels
    }

    def preference(image: _Image) -> tuple[bool, bool, str]:
        session = image.entities.get("ses")
        return (session is not None, bool(asked) and session not in asked, image.name)

    names = list(dict.fromkeys(image.name for image in sorted(wanted, key=preference)))
    versions = sorted(image.path for image in wanted if image.name == names[0])
    first = next(image for image in wanted if image.path == versions[0])
    note = f"{names[0]} taken; there are also {', '.join(names[1:])}" if names[1:] else None
    reason = None
    if len(versions) > 1:
        reason = (
            f"several T1w images of {names[0]} ({', '.join(versions)}); choose by resolution in "
            "the dataset YAML, or keep one"
        )
    elif not first.has_mask:
        reason = f"no brain mask: {first.mask} does not exist; add it, or repeat the preprocessing"
    fingerprint = fingerprint_images([*versions, first.mask])
    session = first.entities.get("ses")
    return Anatomical(subject, first.path, first.mask, session, fingerprint, note, reason)


def _images(root: str, subject: str) -> Iterator[_Image]:
    with os.scandir(f"{root}/{subject}") as entries:
        folders = [e.name for e in entries if e.name.startswith("ses-") and e.is_dir()]
    for folder in (subject, *(f"{subject}/{session}" for session in folders)):
        try:
            with os.scandir(f"{root}/{folder}/anat") as entries:
                names = {entry.name for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name in names:
            if name.endswith(T1W):
                stem = name.removesuffix(T1W)
                entities = entities_of("_".join([*folder.split("/"), stem]))
                mask = stem + MASK
                place = f"{root}/{folder}/anat"
                yield _Image(entities, f"{place}/{name}", f"{place}/{mask}", mask in names)


def _is_version(entities: dict[str, str], dataset: Dataset) -> bool:
    resolution = entities.get("res", NATIVE).lstrip("0")
    of_resolution = dataset.resolution is None or resolution == dataset.resolution.lstrip("0")
    return entities.get("space") == dataset.space and of_resolution


def _nothing(folder: str, images: list[_Image], dataset: Dataset) -> str:
    resolution = {None: "", NATIVE: " without res"}.get(
        dataset.resolution, f" res-{dataset.resolution}"
    )
    there = sorted({Path(image.path).name for image in images})
    return (
        f"{folder} has no anat/*{T1W} with space-{dataset.space}{resolution}; "
        f"there is {', '.join(there[:5]) or 'no T1w image'}"
    )
