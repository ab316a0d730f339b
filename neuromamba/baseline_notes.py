"""Say in words how each baseline was made, from what `evaluate` noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BASELINES = {
    "fc": "FC baseline",
    "fc-regress": "FC without confounds",
    "fc-combat": "FC, sites harmonised",
    "fc-partial": "FC, partial correlation",
    "fc-tangent": "FC, tangent space",
    "fc-svm": "FC, support vector machine",
    "fc-kernel-ridge": "FC, kernel ridge",
    "roi-mean": "ROI means and SDs",
    "confounds": "confound model",
    "majority": "majority class",
    "mean": "mean of training labels",
}
CONFOUNDS = {
    "age": "age",
    "sex": "sex",
    "site": "site",
    "mean_fd": "head motion",
    "tsnr": "tSNR",
    "n_volumes": "number of volumes",
    "n_voxels": "brain size",
    "std_dvars": "standardised DVARS",
}
METHODS = {
    "fc-svm": ("a linear support vector machine", "linear support vector regression"),
    "fc-kernel-ridge": ("kernel ridge classification", "kernel ridge regression"),
}


def join(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def describe_baselines(notes: dict[str, Any], classes: bool) -> list[str]:
    """How each baseline was made, a sentence each."""
    told = []
    for name, facts in notes["baselines"].items():
        if name == "confounds":
            features = (
                f"{join([CONFOUNDS[column] for column in facts['columns']])} and nothing else"
            )
        else:
            features = _describe_features(facts)
        method = METHODS.get(name, ("logistic regression", "ridge regression"))[not classes]
        chosen = "chosen by cross-validation within them"
        if facts["folds"] < 2:
            chosen = "not chosen, because the rarest class has one subject among them"
        told.append(
            f"{BASELINES[name]}: {method} on {features}, trained on {_learnt_from(notes)} of the "
            f"training and validation parts; inverse penalty {facts['inverse_penalty']:g}, {chosen}"
        )
    if left_out := notes.get("baselines_left_out"):
        why = "it would take the target, which is the site, out of the features"
        if "samples" in notes:
            why = "nothing that it would be told by is known to differ between a subject's states"
        told.append(f"{join([BASELINES[name] for name in left_out])}: left out, because {why}")
    return told


def _learnt_from(notes: dict[str, Any]) -> str:
    if "samples" not in notes:
        return f"the {notes['n_train']} labelled subjects"
    samples = notes["samples"]["train"]
    return f"{samples} samples (subjects in a state) of the {notes['n_train']} labelled subjects"


def _describe_features(facts: dict[str, Any]) -> str:
    what = {
        "pearson": "the Fisher z of {} pairs of {} ROIs",
        "partial": "the Fisher z of the partial correlations of {} pairs of {} ROIs",
        "tangent": "{} values of the tangent space of {} ROIs",
    }.get(facts["kind"], "{} means and SDs of the series of {} ROIs")
    text = what.format(f"{facts['n_features']:,}", facts["n_rois"])
    text += (
        f" ({facts['n_rois_dropped']} ROIs left out because more than a tenth of the training "
        "subjects lack them)"
    )
    if regressed := facts["confounds_regressed"]:
        text += f", with {join([CONFOUNDS[column] for column in regressed])} regressed out of them"
    if harmonised := facts.get("harmonised"):
        text += f", the effects of {harmonised['sites']} sites taken out of them by ComBat"
        parts = {"training": harmonised["train_left"], "test": harmonised["test_left"]}
        left = [f"{n} {part}" for part, n in parts.items() if n]
        if left:
            text += (
                f" (not of {join(left)} subjects, whose sites have too few training subjects or "
                "none)"
            )
    return text
