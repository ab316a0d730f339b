"""Explain a fine-tuned model: where in the brain what it says of the test subjects comes from.

    explain/{target}/
        group_attribution.nii.gz, .json    the maps of the group and how sure they are, in MNI space
        regions.tsv, regions.svg           the same by region
        attribution.png                    the maps in slices
        explain.json                       what was explained, and the checks with their verdicts
        subjects/                          the map of each subject, where these are asked for

Design choices
--------------
- Attributions are integrated gradients (`attribution`); a subject's map is the mean over evenly
  spaced windows of its runs, and the group's the mean over subjects (`attribution_maps`).
- No map is written without the checks of `attribution_checks`. Each is another map for every
  network compared (`explain_networks`), so that they are made on at most `CHECK_SUBJECTS` subjects.
- Where the derivatives are the synthetic dataset's, whose `truth.json` tells which networks carry
  the effect of a target's column, `explain.json` has a part `truth`: how well the maps find them.
- A map shows what this model uses, which need not be where a difference between people lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from neuromamba.atlases import open_atlas
from neuromamba.attribution_checks import (
    compare_maps,
    judge_baseline,
    judge_completeness,
    judge_recovery,
    read_truth,
)
from neuromamba.attribution_figure import draw_maps
from neuromamba.attribution_maps import KINDS, GroupMap, SubjectMap, map_name, write_map
from neuromamba.attribution_maskers import Mask, RegionMasker, choose_masker
from neuromamba.attribution_regions import Regions, draw_regions
from neuromamba.batches import Windows
from neuromamba.config import Config
from neuromamba.expert_maps import ExpertWeights, observe_experts, write_experts
from neuromamba.explain_networks import PARTS, Compared, networks_to_compare
from neuromamba.explainer import (
    Explainer,
    choose_class,
    choose_steps,
    open_windows,
    subjects_to_explain,
)
from neuromamba.files import InputError, atomic_path, write_json
from neuromamba.layout import Layout
from neuromamba.parcellation import Parcellation, make_cubes
from neuromamba.predictor import Predictor, open_predictor
from neuromamba.resample import target_affine
from neuromamba.spacing import some_of
from neuromamba.tables import write_table

CHECK_SUBJECTS = 10
"""Subjects that other networks are compared on, at most (our choice)."""
PARCELS = "packaged:100"
"""Regions of a dataset that names no atlas."""
ROWS = {
    "strength": "strength: how much the model reads here (mean over subjects)",
    "signed": "signed: towards (red) or away from what is explained (mean over subjects)",
    "between": "between: where the model sees what it tells people apart by",
}
"""What the rows of the figure are."""


@dataclass(frozen=True)
class Study:
    """A model to be explained on some windows, with what its maps are compared to."""

    explainer: Explainer
    windows: Windows
    others: Sequence[Compared]
    atlas: Parcellation
    truth: Sequence[str] | None
    about: dict[str, Any]


def run_explain(
    config: Config,
    dataset: str,
    model: str,
    seed: int,
    target: str,
    output: Path | None = None,
    subjects: Sequence[str] | None = None,
    steps: int | None = None,
    windows: int | None = None,
    of_class: str | None = None,
    permuted: Path | None = None,
    subject_maps: bool = False,
) -> None:
    """Write the attribution maps of a fine-tuned model, their checks and their figures.

    All files of the folder are there, or none is new.

    Parameters
    ----------
    output
        A folder that is not there yet; by default the stage's own, which is replaced.
    subjects
        By default test subjects, at most as many as `explain.subjects`.
    steps
        Of the integral; by default `explain.steps`, or as many as the first subject's map takes to
        be complete.
    windows
        Of each run; by default `explain.windows`.
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
    if output is not None and output.exists():
        raise InputError(f"--output {output} exists already; remove it, or choose another name")
    layout, settings = Layout.of(config, dataset), config.datasets[dataset]
    predictor = open_predictor(layout.finetune(model, seed, target), config.compute.device)
    atlas = _atlas_of(config, dataset, predictor)
    ours = config.explain
    if subjects is None:
        subjects = subjects_to_explain(config, dataset, predictor.model.needs, ours.subjects)
    count = ours.windows if windows is None else windows
    steps = ours.steps if steps is None else steps
    explainer, opened = _open(config, dataset, predictor, atlas, subjects, steps, count, of_class)
    study = Study(
        explainer,
        opened,
        list(networks_to_compare(config, dataset, model, seed, predictor, permuted)),
        atlas,
        read_truth(Path(settings.derivatives), settings.targets[target].column),
        {**explainer.describe(), "model": model, "seed": seed, "fold": config.fold or None},
    )
    output = output or layout.explain(model, seed, target)
    with atomic_path(output) as folder:
        folder.mkdir()
        checks = _write(folder, study, subject_maps)
    count = len(study.windows.subjects)
    print("\n".join([f"{output}: maps of {count} subjects", *_verdicts(checks)]))


def _open(
    config: Config,
    dataset: str,
    predictor: Predictor,
    atlas: Parcellation,
    names: Sequence[str],
    steps: int | None,
    count: int,
    of_class: str | None,
) -> tuple[Explainer, Windows]:
    """How a model is explained, and the windows of some subjects."""
    for name, value in (("--steps", steps), ("--windows", count)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    masker = choose_masker(predictor.network.needs, predictor.volumes, predictor.tokens, atlas)
    # No weight needs a gradient, which is most of what the gradients would hold.
    predictor.network.requires_grad_(False)
    positive = choose_class(predictor, of_class)
    windows = open_windows(config, dataset, predictor, names)
    explainer = Explainer(predictor, masker, positive, count=count)
    steps = steps or choose_steps(explainer, windows, windows.subjects[0])
    return replace(explainer, steps=steps), windows


def _atlas_of(config: Config, dataset: str, predictor: Predictor) -> Parcellation:
    """The regions that a model reads, or that its map is summed over."""
    atlas = config.datasets[dataset].atlas
    if atlas is None and "rois" in predictor.network.needs:
        affine = target_affine(predictor.volumes)
        return make_cubes(predictor.volumes.shape, affine, config.rois.cube)
    return open_atlas(atlas or PARCELS, predictor.space)


def _write(folder: Path, study: Study, subject_maps: bool) -> dict[str, Any]:
    """Make and write everything; returns the checks."""
    explainer, masker = study.explainer, study.explainer.masker
    regions, save = Regions(study.atlas, masker), folder / "subjects" if subject_maps else None
    group, checked, found = _explain_all(study, regions, save)
    maps, about = group.maps(), {**study.about, "subjects": group.n}
    painted = {name: masker.paint(values) for name, values in group.volumes().items()}
    write_map(folder / "group_attribution.nii.gz", painted, masker.affine, about)
    table = regions.table(group.brain, maps.get("between"), about["seed"])
    write_table(folder / "regions.tsv", table)
    checks = {**found, **_compare(study, checked, group.brain)}
    if study.truth:
        brain = masker.paint(group.brain)
        checks["truth"] = {
            kind: judge_recovery(kind, painted[kind], study.truth, masker.affine, brain)
            for kind in ("strength", "between")
            if kind in maps
        }
    weights = _observe_experts(study)
    if weights is not None and isinstance(masker, RegionMasker):
        write_experts(folder, weights, masker, about)
    title = f"{about['target']}: {about['explains']} ({group.n} subjects)"
    coarse = {ROWS[k]: masker.paint(masker.coarsen(v, group.brain)) for k, v in maps.items()}
    draw_maps(folder / "attribution.png", coarse, masker.affine, title)
    draw_regions(folder / "regions.svg", table, title)
    facts = {
        "seen_in_training": len(explainer.predictor.seen & set(study.windows.subjects)),
        "atlas": study.atlas.name,
        "share_in_no_region": regions.outside,
    }
    write_json(folder / "explain.json", {**about, **facts, **checks})
    return checks


def _observe_experts(study: Study) -> ExpertWeights | None:
    predictor, count = study.explainer.predictor, study.explainer.count
    network, size = predictor.network.backbone, predictor.finetune.batch_size
    return observe_experts(network, study.windows, count, size)


def _explain_all(
    study: Study, regions: Regions, save: Path | None
) -> tuple[GroupMap, dict[str, SubjectMap], dict[str, Any]]:
    """The group's map, those of the subjects that other networks are compared on, and two checks.

    Regions are filled in, and the maps of all subjects are written to `save` where that is given.
    """
    explainer, masker, names = study.explainer, study.explainer.masker, study.windows.subjects
    group, checked = GroupMap(masker.shape), {}
    change: list[list[float]] = []
    total: list[float] = []
    compared = set(some_of(names, CHECK_SUBJECTS))
    for name in tqdm(names, desc="explain", unit="subject", mininterval=1.0):
        one = explainer.explain(explainer.predictor.network, study.windows, name)
        group.add(one)
        regions.add(one)
        change.append(one.change)
        total += one.total
        if name in compared:
            checked[name] = one
        if save is not None:
            save.mkdir(exist_ok=True)
            maps = {kind: masker.paint(getattr(one, kind)) for kind in KINDS}
            path = save / map_name(name, explainer.predictor.space)
            write_map(path, maps, masker.affine, {**study.about, "subject": name})
    checks = {
        "completeness": judge_completeness([value for of in change for value in of], total),
        "baseline": judge_baseline([float(np.mean(of)) for of in change]),
    }
    return group, checked, checks


def _compare(study: Study, checked: dict[str, SubjectMap], brain: Mask) -> dict[str, Any]:
    """How like the map is to those of other networks on the same subjects."""
    explainer, shape = study.explainer, study.explainer.masker.shape
    found: dict[str, Any] = {"compared_on": list(checked)}
    found |= {part: {} for part in PARTS.values()}
    own, total = GroupMap(shape), len(study.others) * len(checked)
    for one in checked.values():
        own.add(one)
    with tqdm(total=total, desc="checks", unit="subject", mininterval=1.0) as bar:
        for other in study.others:
            group = GroupMap(shape)
            for name in checked:
                group.add(explainer.explain(other.network, study.windows, name))
                bar.update()
            result = compare_maps(own.maps(), group.maps(), brain, other.against)
            found[PARTS[other.against]][other.name] = result
    return found


def _verdicts(checks: Any, where: str = "") -> Iterator[str]:
    """Every verdict, with where it stands."""
    if isinstance(checks, dict):
        if "verdict" in checks:
            yield f"{where}: {checks['verdict']}"
        for name, below in checks.items():
            yield from _verdicts(below, f"{where}.{name}".lstrip("."))
