"""Explain a fine-tuned model: where in the brain what it says of the test subjects comes from.

Design choices
--------------
- Attributions are integrated gradients (`attribution`); a subject's map is the mean over evenly
  spaced windows of its runs, and the group's the mean over subjects (`attribution_maps`).
- No map is written without the checks of `attribution_checks`. Each is another map for every
  network compared, so that they are made on at most `CHECK_SUBJECTS` subjects.
- A map shows what this model uses, which need not be where a difference between people lies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neuromamba.atlases import open_atlas
from neuromamba.attribution_checks import (
    compare_maps,
    judge_baseline,
    judge_completeness,
    judge_recovery,
    read_truth,
    shuffled,
)
from neuromamba.attribution_maps import (
    KINDS,
    GroupMap,
    Mask,
    Regions,
    SubjectMap,
    draw_maps,
    write_map,
)
from neuromamba.config import Config
from neuromamba.explainer import Explainer, open_explainer
from neuromamba.files import InputError, atomic_path, write_json
from neuromamba.heads import HeadedModel
from neuromamba.layout import Layout
from neuromamba.parcellation import Parcellation
from neuromamba.predictor import Predictor, open_predictor
from neuromamba.tables import write_table

STEPS, WINDOWS = 32, 2
"""Steps of the integral, and windows of each run, where none are asked for (our choice)."""
CHECK_SUBJECTS = 10
"""Subjects that other networks are compared on, at most (our choice)."""
PARCELS = "packaged:100"
"""Regions of a dataset that names no atlas."""
PARTS = {"weights": "shuffled_weights", "seed": "other_seeds", "labels": "permuted_labels"}
"""Where in `checks.json` a comparison stands, by what the other network differs in."""


@dataclass(frozen=True)
class Compared:
    """Another network: its name, and what it differs in (a key of `PARTS`)."""

    name: str
    against: str
    network: HeadedModel


def run_explain(
    config: Config,
    dataset: str,
    model: str,
    seed: int,
    target: str,
    output: Path,
    subjects: Sequence[str] | None = None,
    steps: int = STEPS,
    windows: int = WINDOWS,
    of_class: str | None = None,
    permuted: Path | None = None,
    subject_maps: bool = False,
) -> None:
    """Write the attribution map of a fine-tuned model, its checks and its figure to a new folder.

    `group_attribution.nii.gz` and `.json`, `regions.tsv`, `checks.json`, `attribution.png`, and
    `subjects/{subject}.nii.gz` where these are asked for: all of it or nothing.

    Parameters
    ----------
    output
        A folder that is not there yet.
    subjects
        By default the test subjects.
    steps, windows
        Of the integral, and of each run.
    of_class
        The class that is explained; by default the positive one.
    permuted
        Folder of a fine-tuning of the same model on permuted labels, to be compared with.
    subject_maps
        Write the map of each subject.

    Raises
    ------
    InputError
        When there is no such model, an option does not serve, or a subject has no usable run.
    """
    if output.exists():
        raise InputError(f"--output {output} exists already; remove it, or choose another name")
    layout, settings = Layout.of(config, dataset), config.datasets[dataset]
    predictor = open_predictor(layout.finetune(model, seed, target), config.compute.device)
    explainer = open_explainer(config, dataset, predictor, subjects, steps, windows, of_class)
    seeds = {n: layout.finetune(model, n, target) for n in config.seeds if n != seed}
    others = list(_networks(config, predictor, seed, seeds, permuted))
    atlas = open_atlas(settings.atlas or PARCELS, predictor.space)
    truth = read_truth(Path(settings.derivatives), settings.targets[target].column)
    about = _about(explainer, model, seed)
    with atomic_path(output) as folder:
        folder.mkdir()
        checks = _write(folder, explainer, others, atlas, truth, about, subject_maps)
    print("\n".join([f"{output}: maps of {len(explainer.subjects)} subjects", *_verdicts(checks)]))


def _write(
    folder: Path,
    explainer: Explainer,
    others: Sequence[Compared],
    atlas: Parcellation,
    truth: Sequence[str] | None,
    about: dict[str, Any],
    subject_maps: bool,
) -> dict[str, Any]:
    """Make and write everything; returns the checks."""
    affine, seed = explainer.affine, about["seed"]
    regions = Regions(atlas, explainer.shape, affine)
    save = folder / "subjects" if subject_maps else None
    group, checked, found = _explain_all(explainer, regions, about, save)
    maps, about = group.maps(), {**about, "subjects": group.n}
    write_map(folder / "group_attribution.nii.gz", group.volumes(), affine, about)
    write_table(folder / "regions.tsv", regions.table(group.brain, maps.get("between"), seed))
    checks = {**found, **_compare(explainer, checked, others, group.brain)}
    if truth:
        scored = {kind: maps[kind] for kind in ("strength", "between") if kind in maps}
        checks["truth"] = {
            kind: judge_recovery(kind, values, truth, affine, group.brain)
            for kind, values in scored.items()
        }
    facts = {
        "seen_in_training": len(explainer.predictor.seen & set(explainer.subjects)),
        "atlas": atlas.name,
        "share_in_no_region": regions.outside,
    }
    write_json(folder / "checks.json", {**about, **facts, **checks})
    title = f"{about['explains']} ({group.n} subjects)"
    draw_maps(folder / "attribution.png", maps, affine, title)
    return checks


def _explain_all(
    explainer: Explainer, regions: Regions, about: dict[str, Any], save: Path | None
) -> tuple[GroupMap, dict[str, SubjectMap], dict[str, Any]]:
    """The group's map, those of the subjects that other networks are compared on, and two checks.

    Regions are filled in, and the maps of all subjects are written to `save` where that is given.
    """
    group, checked = GroupMap(explainer.shape), {}
    change: list[list[float]] = []
    total: list[float] = []
    every = -(-len(explainer.subjects) // CHECK_SUBJECTS)
    bar = tqdm(explainer.subjects, desc="explain", unit="subject", mininterval=1.0)
    for number, name in enumerate(bar):
        one = explainer.explain(explainer.predictor.network, name)
        group.add(one)
        regions.add(one)
        change.append(one.change)
        total += one.total
        if number % every == 0:
            checked[name] = one
        if save is not None:
            save.mkdir(exist_ok=True)
            maps = {kind: getattr(one, kind) for kind in KINDS}
            write_map(save / f"{name}.nii.gz", maps, explainer.affine, {**about, "subject": name})
    checks = {
        "completeness": judge_completeness([value for of in change for value in of], total),
        "baseline": judge_baseline([sum(of) / len(of) for of in change]),
    }
    return group, checked, checks


def _networks(
    config: Config,
    predictor: Predictor,
    seed: int,
    seeds: dict[int, Path],
    permuted: Path | None,
) -> Iterator[Compared]:
    """The networks that the explained one is compared with."""
    own = predictor.network
    yield Compared("head", "weights", shuffled(own, own.head, seed))
    yield Compared("all", "weights", shuffled(own, None, seed))
    folders = [(str(n), "seed", path) for n, path in seeds.items()]
    for name, against, folder in [*folders, *([("given", "labels", permuted)] if permuted else [])]:
        if against == "seed" and not (folder / "model.json").exists():
            continue
        other = open_predictor(folder, config.compute.device)
        parts = ("model", "tokens", "volumes", "classes")
        unlike = [part for part in parts if getattr(other, part) != getattr(predictor, part)]
        if not unlike:
            yield Compared(name, against, other.network.requires_grad_(False))
            continue
        text = f"{folder} was made under another {', '.join(unlike)} than the explained model"
        if against == "labels":
            raise InputError(f"--permuted: {text}; train it again")
        tqdm.write(f"{text}, and is not compared with it", sys.stderr)


def _compare(
    explainer: Explainer,
    checked: dict[str, SubjectMap],
    others: Sequence[Compared],
    brain: Mask,
) -> dict[str, Any]:
    """How like the map is to those of other networks on the same subjects."""
    found: dict[str, Any] = {"compared_on": list(checked)}
    found |= {part: {} for part in PARTS.values()}
    own, total = GroupMap(explainer.shape), len(others) * len(checked)
    for one in checked.values():
        own.add(one)
    with tqdm(total=total, desc="checks", unit="subject", mininterval=1.0) as bar:
        for other in others:
            group = GroupMap(explainer.shape)
            for name in checked:
                group.add(explainer.explain(other.network, name))
                bar.update()
            result = compare_maps(own.maps(), group.maps(), brain, other.against)
            found[PARTS[other.against]][other.name] = result
    return found


def _about(explainer: Explainer, model: str, seed: int) -> dict[str, Any]:
    """What a map is a map of, for the files beside it."""
    predictor = explainer.predictor
    explains = f"predicted {predictor.target}"
    if predictor.classes:
        others = [name for k, name in enumerate(predictor.classes) if k != explainer.positive]
        mean = "the mean of those of " if len(others) > 1 else "that of "
        own = predictor.classes[explainer.positive]
        explains = f"logit of {own} minus {mean}{', '.join(others)}"
    of_voxels = "a voxel's sum over the volumes of a window, mean over windows"
    return {
        "method": "integrated gradients (arXiv 1703.01365)",
        "explains": explains,
        "baseline": "each voxel's mean over the run",
        "strength": f"of absolute attributions: {of_voxels}",
        "signed": f"of attributions: {of_voxels}",
        "between": "share of the variance over subjects of the sum of `signed`; sums to 1",
        "dataset": predictor.dataset,
        "model": model,
        "seed": seed,
        "target": predictor.target,
        "space": predictor.space,
        "resolution_mm": predictor.tokens.patch * predictor.volumes.voxel_size,
        "steps": explainer.steps,
        "windows_per_run": explainer.count,
        "window_volumes": predictor.model.volumes,
    }


def _verdicts(checks: Any, where: str = "") -> Iterator[str]:
    """Every verdict, with where it stands."""
    if isinstance(checks, dict):
        if "verdict" in checks:
            yield f"{where}: {checks['verdict']}"
        for name, below in checks.items():
            yield from _verdicts(below, f"{where}.{name}".lstrip("."))
