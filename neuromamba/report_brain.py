"""The report's views of the brain: a mean volume with its tokens, and maps of attributions.

Maps are those that `neuromamba explain` left in a model's results. What its checks said of a map
stands beside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from PIL import Image

from neuromamba import brain_figures
from neuromamba.collect import Data, Example, example_run
from neuromamba.config import Config
from neuromamba.files import InputError, read_json
from neuromamba.layout import Layout
from neuromamba.report_viewer import PatchMap, build_viewer, patch_sums
from neuromamba.tables import read_table
from neuromamba.verdicts import interval, number

MAP = "group_attribution"
EXPLAINED = "explain.json"
"""What `run_explain` writes last."""
KINDS = {
    "between": "what tells people apart",
    "strength": "strength",
    "signed": "signed, what the output changes by",
}
"""Maps in a NIfTI of attributions that are shown, in this order, with what they are called."""
MOST_MAPS = 6
"""Models, seeds and targets whose maps are on the page: each takes a tenth of a megabyte."""
MOST_REGIONS = 10
REGIONS_OF_EXPERT = 5
WIDTH = 1000
"""Pixels of the pictures of slices."""


def describe_brain(config: Config, data: Data) -> dict[str, Any]:
    """What the page shows of a dataset's brains; its `volume` is `None` where there are none."""
    example = example_run(config, data)
    folders = list(explained(config, data.name))
    shown: list[dict[str, Any]] = []
    maps: list[PatchMap] = []
    for label, folder in folders[:MOST_MAPS]:
        facts, of_folder = _read_maps(label, folder, example, config.tokens.patch)
        shown.append(facts)
        maps += of_folder
    return {
        "volume": example and _describe_volume(example, config.tokens.patch, maps),
        "maps": shown,
        "not_shown": [str(folder) for _, folder in folders[MOST_MAPS:]],
    }


def _describe_volume(example: Example, edge: int, maps: list[PatchMap]) -> dict[str, Any]:
    return {
        "run": example.run,
        "attributes": example.attributes,
        "has_tokens": example.tokens is not None,
        "static": brain_figures.brain(example.mean, example.mask, example.tokens, example.height),
        "viewer": build_viewer(example, edge, maps),
    }


def explained(config: Config, dataset: str) -> Iterator[tuple[str, Path]]:
    """The folders of maps that there are, each with what it explains in words."""
    for fold in config.splits.names:
        layout = Layout.of(config.in_fold(fold), dataset)
        for target in config.datasets[dataset].targets:
            for model in config.models:
                for seed in config.seeds:
                    folder = layout.explain(model, seed, target)
                    if (folder / EXPLAINED).exists():
                        label = f"{target} by {model}, seed {seed}" + (f", {fold}" if fold else "")
                        yield label, folder


def _read_maps(
    label: str, folder: Path, example: Example | None, edge: int
) -> tuple[dict[str, Any], list[PatchMap]]:
    """What is said of a folder of maps, and the maps if they are on the example's grid."""
    about = read_json(folder / f"{MAP}.json")
    glass, maps, same = [], {}, example is None
    if example is not None:
        image = _open_image(folder / f"{MAP}.nii.gz")
        same = image.shape[:3] == example.mask.T.shape and np.allclose(image.affine, example.affine)
        maps = _patch_maps(image, about["volumes"], edge) if same else {}
        glass = [
            {"words": KINDS[kind], "source": _through_glass(values, example, edge, kind)}
            for kind, values in maps.items()
        ]
    facts = {
        "label": label,
        "about": about,
        "sentences": list(verdicts(read_json(folder / EXPLAINED))),
        "glass": glass,
        "slices": _as_webp(folder / "attribution.png"),
        "regions": _regions(folder / "regions.tsv"),
        "experts": describe_experts(folder),
        "experts_slices": _as_webp(folder / "experts.png"),
        "other_grid": not same,
    }
    return facts, [_for_viewer(label, kind, values) for kind, values in maps.items()]


def _open_image(path: Path) -> Any:
    try:
        return nibabel.load(path)
    except (OSError, nibabel.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path} is not a readable image ({error}); explain again") from None


def _patch_maps(image: Any, volumes: list[str], edge: int) -> dict[str, npt.NDArray[np.floating]]:
    """(z, y, x) sums over patches of each kind of map that there is."""
    return {
        kind: patch_sums(np.asarray(image.dataobj[..., volumes.index(kind)], np.float32).T, edge)
        for kind in KINDS
        if kind in volumes
    }


def _for_viewer(label: str, kind: str, values: npt.NDArray[np.floating]) -> PatchMap:
    unit = "of the variance" if kind == "between" else "in units of the output"
    return PatchMap(f"{label}: {KINDS[kind]}", values, kind != "strength", unit)


def _through_glass(values: npt.NDArray[np.floating], example: Example, edge: int, kind: str) -> str:
    voxels = np.kron(values, np.ones((edge, edge, edge), dtype=values.dtype))
    return brain_figures.glass_brain(voxels, example.mask, kind != "strength")


def verdicts(checks: Any, where: tuple[str, ...] = ()) -> Iterator[str]:
    """The sentences of an `explain.json`; where several are of one map, what each compares it with.

    `{"shuffled_weights": {"head": {"strength": {"verdict": "the map ..."}}}}` gives
    `Shuffled weights, head: the map ...`.
    """
    if not isinstance(checks, dict):
        return
    if "verdict" in checks:
        place = ", ".join(where[:-1]).replace("_", " ")
        text = f"{place}: {checks['verdict']}" if place else str(checks["verdict"])
        yield f"{text[:1].upper()}{text[1:]}."
    for name, below in checks.items():
        yield from verdicts(below, (*where, str(name)))


def _regions(path: Path) -> list[dict[str, str]]:
    """The regions with the largest share of the map."""
    if not path.exists():
        return []
    table = read_table(path, dtype={"region": str}).head(MOST_REGIONS)
    return [
        {
            "region": str(row["region"]),
            "n_voxels": number(int(row["n_voxels"])),
            "share": f"{row['share']:.1%}",
            "signed": interval(row["signed"], row["signed_low"], row["signed_high"]),
            "between": number(row.get("between", np.nan)),
        }
        for row in table.to_dict("records")
    ]


def describe_experts(folder: Path) -> list[dict[str, str]]:
    """The regions that set each expert apart, a row each; none without a mixture of experts."""
    path = folder / "experts.tsv"
    if not path.exists():
        return []
    table = read_table(path, dtype={"region": str})
    table = table.sort_values(["expert", "excess"], ascending=[True, False])
    return [
        {
            "expert": str(row["expert"]),
            "region": str(row["region"]),
            "weight": interval(row["weight"], row["weight_low"], row["weight_high"]),
            "excess": number(row["excess"]),
            "over_time": number(row["over_time"]),
        }
        for row in table.groupby("expert").head(REGIONS_OF_EXPERT).to_dict("records")
    ]


def _as_webp(path: Path) -> str | None:
    """A picture made small enough for a page, as a `data:` address."""
    if not path.exists():
        return None
    stream = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.thumbnail((WIDTH, 4 * WIDTH))
            picture.convert("RGB").save(stream, format="webp", quality=80)
    except OSError as error:
        raise InputError(f"{path} is not a readable picture ({error}); explain again") from None
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
