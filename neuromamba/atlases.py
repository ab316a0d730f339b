"""Atlases: labelled images by file or by name, the names of their regions, and their space.

What a dataset's `atlas` may say
--------------------------------
- a file: a labelled NIfTI, whose regions are named by a table beside it, if there is one;
- `nilearn:FETCHER?option=value&...`: one of `FETCHERS` with the options of nilearn's function, such
  as `nilearn:schaefer_2018?n_rois=400&resolution_mm=2`;
- `templateflow:ATLAS?desc=...&resolution=...`: from TemplateFlow, in the dataset's space unless
  `template` names another: `templateflow:Schaefer2018?desc=400Parcels7Networks&resolution=2`;
- `packaged:COUNT`: parcels of nilearn's packaged brain mask (`parcellation.make_parcels`).

Fetched files are kept where these packages keep theirs (`NILEARN_DATA`, `TEMPLATEFLOW_HOME`). What
is there already needs no network.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import nibabel
import numpy as np

from neuromamba.atlas_files import find_names, from_labels, read_atlas
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.parcellation import Parcellation, make_parcels

SCHEMES = ("nilearn", "templateflow", "packaged")
MNI_FAMILY = ("MNI152", "MNIColin27", "MNI305")
"""Adult MNI spaces, by how their names begin. They differ from each other by a few millimetres."""


@dataclass(frozen=True)
class Fetcher:
    """A fetcher of nilearn (`fetch_atlas_*`) that gives labels, and the types of its options.

    `space` is that of the volumes, `None` where their source does not tell it.
    """

    options: dict[str, type]
    space: str | None
    fixed: dict[str, Any] = field(default_factory=dict)


_FSL = "MNI152NLin6Asym"
FETCHERS = {
    "aal": Fetcher({"version": str}, "MNIColin27"),
    "basc_multiscale_2015": Fetcher({"resolution": int, "version": str}, "MNI152NLin2009aSym"),
    "destrieux_2009": Fetcher({"lateralized": bool}, None),
    "harvard_oxford": Fetcher({"atlas_name": str, "symmetric_split": bool}, _FSL),
    "juelich": Fetcher({"atlas_name": str, "symmetric_split": bool}, _FSL),
    "pauli_2017": Fetcher({}, None, {"atlas_type": "deterministic"}),
    "schaefer_2018": Fetcher({"n_rois": int, "yeo_networks": int, "resolution_mm": int}, _FSL),
    "yeo_2011": Fetcher({"n_networks": int, "thickness": str}, _FSL),
}

TEMPLATEFLOW = {"template": str, "cohort": str, "desc": str, "resolution": int}
"""Options of `templateflow:`, which would ignore one that it does not know."""


def is_named(atlas: str) -> bool:
    """Whether an `atlas` is a name (`nilearn:...`), not a file."""
    return atlas.partition(":")[0] in SCHEMES and ":" in atlas


def atlas_digest(atlas: str) -> str:
    """What tells an `atlas` from another without fetching: of a file, its digest and its names'."""
    if is_named(atlas):
        return digest_json(atlas)
    table = find_names(Path(atlas))
    return digest_json([digest_file(file) for file in (Path(atlas), table) if file])


def open_atlas(atlas: str, space: str) -> Parcellation:
    """The atlas that a dataset in the standard `space` names.

    Raises
    ------
    InputError
        When it cannot be had or read, an option is unknown, or it is in no space near that one.
    """
    scheme, _, rest = atlas.partition(":")
    if not is_named(atlas):
        found = read_atlas(atlas)
    elif scheme == "packaged":
        if not rest.isdecimal():
            raise InputError(f"atlas {atlas!r}: give a number of parcels, such as packaged:100")
        found = make_parcels(int(rest))
    else:
        name, _, query = rest.partition("?")
        options = _parse_options(atlas, query)
        get = _from_nilearn if scheme == "nilearn" else _from_templateflow
        found = get(atlas, name, options, space)
    if note := compare_spaces(found, space):
        warnings.warn(note, stacklevel=2)
    return found


def compare_spaces(atlas: Parcellation, space: str) -> str | None:
    """What to know about an atlas whose space is not the dataset's; `None` if it is, or is unknown.

    Raises
    ------
    InputError
        When the two are no neighbours: not both an adult MNI space.
    """
    if atlas.space in (None, space):
        return None
    if not (atlas.space.startswith(MNI_FAMILY) and space.startswith(MNI_FAMILY)):
        raise InputError(
            f"atlas {atlas.name} is in {atlas.space}, the scans are in {space}, and the two do not "
            "overlap; name an atlas in the scans' space in the dataset's `atlas`"
        )
    return (
        f"atlas {atlas.name} is in {atlas.space}, the scans are in {space}: MNI spaces differ by a "
        "few mm, so small regions and borders are less exact than with an atlas in the same space"
    )


def _parse_options(atlas: str, query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, strict_parsing=bool(query)))
    except ValueError:
        raise InputError(f"atlas {atlas!r}: options have the form ?key=value&key=value") from None


def _from_nilearn(atlas: str, name: str, options: dict[str, str], space: str) -> Parcellation:
    if name not in FETCHERS:
        known = ", ".join(FETCHERS)
        raise InputError(f"atlas {atlas!r}: there is no {name!r}; nilearn's atlases here: {known}")
    fetcher = FETCHERS[name]
    values = {key: _typed(atlas, key, text, fetcher.options) for key, text in options.items()}
    from nilearn import datasets  # here, because most runs need none of what it loads

    try:
        with warnings.catch_warnings():
            # That the background is no region of the image is no news.
            warnings.filterwarnings("ignore", message=r"\s*The following regions are present")
            found = getattr(datasets, f"fetch_atlas_{name}")(**values, **fetcher.fixed, verbose=0)
    except OSError as error:
        raise InputError(_unreachable(atlas, "NILEARN_DATA", error)) from None
    except (TypeError, ValueError) as error:
        raise InputError(f"atlas {atlas!r}: {' '.join(str(error).split())}") from None
    is_file = isinstance(found.maps, (str, os.PathLike))
    image: Any = nibabel.load(found.maps) if is_file else found.maps
    lut = found.lut[["index", "name"]].to_numpy() if "lut" in found else []
    names = {int(number): str(region) for number, region in lut}
    made = from_labels(atlas, np.asanyarray(image.dataobj), np.asarray(image.affine), names)
    of_space = fetcher.space
    if name == "basc_multiscale_2015" and values.get("version") == "asym":
        of_space = "MNI152NLin2009aAsym"
    digest = digest_file(found.maps) if is_file else made.sha256
    return replace(made, sha256=digest, space=of_space, names_from="nilearn")


def _typed(atlas: str, key: str, text: str, types: dict[str, type]) -> Any:
    if key not in types:
        known = ", ".join(types) or "none"
        raise InputError(f"atlas {atlas!r}: unknown option {key!r}; known here: {known}")
    if types[key] is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"atlas {atlas!r}: {key} must be true or false")
        return text.lower() == "true"
    try:
        return types[key](text)
    except ValueError:
        raise InputError(f"atlas {atlas!r}: {key} must be a whole number") from None


def _from_templateflow(atlas: str, name: str, options: dict[str, str], space: str) -> Parcellation:
    try:
        from templateflow import api
    except ModuleNotFoundError:
        raise InputError(
            f"atlas {atlas!r} needs the package templateflow; install it: "
            'pip install "neuromamba[atlases]"'
        ) from None
    values = {key: _typed(atlas, key, text, TEMPLATEFLOW) for key, text in options.items()}
    template, query = values.pop("template", space), {"atlas": name, "suffix": "dseg", **values}
    try:
        files = api.ls(template, **query, extension=".nii.gz")
        if len(files) != 1:
            names = sorted(file.name for file in files)
            there = ", ".join([*names[:8], *["..."][: len(names) > 8]]) or f"none in {template}"
            raise InputError(f"atlas {atlas!r} must name one file; there are: {there}")
        found = api.get(template, **query, extension=".nii.gz")
        # Its names, which `read_atlas` finds beside it.
        api.get(template, **{**query, "resolution": None}, extension=".tsv")
    except (OSError, RuntimeError) as error:
        raise InputError(_unreachable(atlas, "TEMPLATEFLOW_HOME", error)) from None
    return replace(read_atlas(found), name=atlas)


def _unreachable(atlas: str, folder: str, error: Exception) -> str:
    why, now = " ".join(str(error).split())[:200], os.environ.get(folder, "its default")
    return (
        f"atlas {atlas!r} is not in the folder {folder} ({now}) and could not be fetched ({why}); "
        "run `neuromamba rois` once where there is a network, copy that folder here, or name a "
        "file or packaged:100"
    )
