"""Whether a scan is one that a model can speak of: reasons to refuse it, and warnings.

Limits are ours: a scan is refused where a prediction would be meaningless, and there is a warning
where it is merely unlike what the model was trained on.
"""

from __future__ import annotations

from pathlib import Path

from neuromamba.calibration_file import Level
from neuromamba.config import RoiModel
from neuromamba.files import InputError
from neuromamba.new_scans import NewScan
from neuromamba.novelty import choose_reference, is_outside, percentile, place
from neuromamba.observe import Floats, Observed
from neuromamba.predictor import Predictor
from neuromamba.resample_time import times_of

FAR = 1.5
"""A repetition time that is as many times longer or shorter than any of the training is refused."""
NEAR = 1.05
"""The same for a warning."""
LEAST_COVERAGE = 0.75
"""Of the least coverage of a training run."""
MOST_STRAY = 0.2
"""Share of patches outside of all training brains, above the largest of a training run."""


def as_read(predictor: Predictor, n_volumes: int, repetition_time: float) -> int:
    """How many volumes a model reads of a run, whose series it may bring to another pace."""
    model = predictor.model
    if not isinstance(model, RoiModel) or model.repetition_time is None:
        return n_volumes
    return len(times_of(n_volumes, repetition_time, model.repetition_time))


def refuse_short(predictor: Predictor, n_volumes: int, repetition_time: float, what: str) -> None:
    """Raise `InputError` when a run has fewer volumes than one window, or than training runs."""
    window, least = predictor.model.volumes, predictor.volumes.min_volumes
    if n_volumes < least or as_read(predictor, n_volumes, repetition_time) < window:
        raise InputError(
            f"{what}: has {n_volumes} volumes, and the model reads windows of {window} volumes"
            + (f" of runs of at least {least}" if least > window else "")
            + "; a longer scan is needed"
        )


def judge_length(predictor: Predictor, n_volumes: int) -> list[str]:
    """A warning when a run is shorter than all of the training."""
    calibration = predictor.calibration
    least = calibration.ranges["n_volumes"][0] if calibration else 0
    if n_volumes >= least:
        return []
    return [f"{n_volumes} volumes, trained on runs of at least {least:.0f}"]


def judge_repetition_time(predictor: Predictor, scan: NewScan, any_time: bool) -> list[str]:
    """A warning when the repetition time is not one of the training; `InputError` when it is far.

    Parameters
    ----------
    any_time
        Only warn.
    """
    calibration, model = predictor.calibration, predictor.model
    pace = predictor.volumes.denoise.repetition_time
    pace = pace or (model.repetition_time if isinstance(model, RoiModel) else None)
    if calibration is None or scan.source is None or pace:
        return []
    low, high = calibration.ranges["repetition_time"]
    time = scan.source.repetition_time
    if low / NEAR <= time <= high * NEAR:
        return []
    trained = f"{low:g} s" if low == high else f"{low:g} to {high:g} s"
    text = f"repetition time {time:g} s, trained on {trained}"
    if not low / FAR <= time <= high * FAR and not any_time:
        raise InputError(
            f"{scan.source.bold}: {text}: a window lasts a different time; correct it if it is "
            "wrong, or give --any-repetition-time to predict all the same"
        )
    return [text]


def judge_place(predictor: Predictor, observed: Observed, path: Path) -> list[str]:
    """A warning when the brain lies otherwise than in training; `InputError` when it is elsewhere.

    Raises
    ------
    InputError
        When too much of the brain is missing, or much of it is where no training run has any.
    """
    calibration, shares = predictor.calibration, predictor.patch_shares
    if calibration is None or shares is None or observed.held is None:
        return []
    if "coverage" not in calibration.ranges:  # of a single training run
        return []
    found = place(observed.held, shares)
    coverage, least = found["coverage"], calibration.ranges["coverage"][0]
    stray, most = found["stray"], calibration.ranges["stray"][1]
    if coverage < LEAST_COVERAGE * least:
        raise InputError(
            f"{path}: covers {coverage:.0%} of the brain as training runs do, of which the least "
            f"covers {least:.0%}; look at the scan's field of view, its mask and its space"
        )
    if stray > most + MOST_STRAY:
        raise InputError(
            f"{path}: {stray:.0%} of its brain lies where training runs have none; is it in "
            f"{predictor.space}, and is its mask right?"
        )
    warnings = []
    if coverage < least:
        warnings.append(f"covers {coverage:.0%} of the brain, training runs at least {least:.0%}")
    if stray > most:
        warnings.append(f"{stray:.0%} of its brain lies where training runs have none")
    return warnings


def judge_subject(predictor: Predictor, scan: NewScan) -> list[str]:
    """A warning when a subject of this name was trained on."""
    if scan.subject not in predictor.seen:
        return []
    return [
        f"{predictor.dataset} has a subject of this name that the model was trained or chosen on"
    ]


def judge_distance(
    predictor: Predictor, level: Level, features: Floats
) -> tuple[float | None, float | None, list[str]]:
    """Distance of (feature,) from training subjects in SD, its percentile, and warnings.

    The first two are `None` where training subjects were too few, or the model is an older one.
    """
    cloud, calibration = predictor.cloud(level), predictor.calibration
    if cloud is None or calibration is None:
        return None, None, []
    distance = float(cloud.distances(features[None])[0])
    known = calibration.levels[level].distances
    part, reference = choose_reference(known["training"], known["validation"])
    rank = percentile(reference, distance)
    if not is_outside(reference, distance):
        return distance, rank, []
    return (
        distance,
        rank,
        [f"unlike the training: further from it than {rank:.0f} % of {part} subjects"],
    )
