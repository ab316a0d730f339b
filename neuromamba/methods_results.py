"""The methods section's paragraphs on baselines, statistics and further analyses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuromamba.baseline_notes import BASELINES, describe_baselines, join
from neuromamba.collect import Evaluation
from neuromamba.config import Config
from neuromamba.metrics import class_names

CITED = {
    "fc-regress": "@snoek2019confounds",
    "fc-combat": "@johnson2007combat; @yu2018combat",
    "fc-tangent": "@varoquaux2010tangent; @abraham2014nilearn",
    "fc-kernel-ridge": "@he2020kernel",
}
"""What a baseline's method is cited by, beside scikit-learn."""


def describe_references(evaluations: Sequence[Evaluation]) -> list[str]:
    """Which baselines predicted the same subjects, and how they were made."""
    if not evaluations:
        return []
    found = dict.fromkeys(name for one in evaluations for name in one.notes["baselines"])
    cites = [CITED[name] for name in found if name in CITED]
    named = join([BASELINES.get(name, name) for name in found])
    sentences = [
        f"On the same subjects, models were compared with {named}, made in scikit-learn "
        f"[{'; '.join(['@pedregosa2011sklearn', *cites])}], and with the constant that the "
        "training labels suggest."
    ]
    first: dict[str, Evaluation] = {}
    for one in evaluations:
        first.setdefault(f"{one.dataset}, {one.target}", one)
    for where, one in first.items():
        told = describe_baselines(one.notes, bool(class_names(one.predictions)))
        folds = " (of a cross-validation, in its first fold)" if "fold" in one.predictions else ""
        sentences.append(f"{where}{folds}: {'; '.join(told)}.")
    return sentences


def describe_statistics(config: Config, evaluations: Sequence[Evaluation]) -> list[str]:
    """Who was tested, and how figures were made of it."""
    if not evaluations:
        return []
    settings, folds = config.evaluate, any("fold" in one.predictions for one in evaluations)
    classes = any(class_names(one.predictions) for one in evaluations)
    states = any("state" in one.predictions for one in evaluations)
    sentences = [
        _protocol(config),
        f"Intervals ({settings.confidence:.0%}) are percentiles of {settings.bootstrap:,} "
        "bootstrap resamples of the test subjects [@efron1993bootstrap]"
        + (", drawn within each true class." if classes and not states else "."),
        f"p values against chance are by {settings.permutations:,} permutations of the labels, and "
        "of differences by as many swaps of two predictions within subjects; the observed "
        "arrangement counts as one [@phipson2010permutation].",
    ]
    if states:
        sentences.append(
            "States were predicted from the windows that were taken in them; subjects were drawn "
            "and swapped with all their states, and labels were permuted within subjects."
        )
    if classes:
        sentences.append(
            "Scores were turned to ranks before swapping for the AUROC [@bandos2005auc]. "
            "Calibration is told by the expected calibration error [@guo2017calibration]."
        )
    if folds:
        sentences.append(
            "Metrics are means over folds. A difference was claimed only where the corrected "
            "resampled t-test over folds agreed [@nadeau2003inference]. p against chance is too "
            "small over folds, whose models share subjects; whether a model is better than chance "
            "was told by its comparison with the majority class or the mean of the training labels."
        )
    sentences.append(
        "p values of models were corrected by Holm [@holm1979] over the models, seeds and targets "
        "of a dataset that were compared with the same baseline; those of means over seeds by "
        "themselves, over the models and targets."
    )
    seen = {name for one in evaluations for name in one.notes.get("seen_subjects", [])}
    if seen:
        sentences.append(
            f"{len(seen)} test subjects had been used to train a model, so the figures are not "
            "those of unseen subjects."
        )
    else:
        sentences.append("No model was tested on a subject that it was trained or chosen on.")
    return sentences


def _protocol(config: Config) -> str:
    splits = config.splits
    chosen = f"{splits.validation:.0%} of the subjects chose the step of each training"
    if any(model.finetune.mode == "probe" for model in config.models.values()):
        chosen += (
            ", but nothing of linear probes, whose penalty inner folds of the training subjects "
            "chose"
        )
    if splits.protocol == "holdout":
        return (
            "Subjects were split once, stratified by label and site, all runs of one subject in "
            f"one part: {splits.test:.0%} for testing, and {chosen}."
        )
    if splits.protocol == "k-fold":
        repeats = f", repeated {splits.repeats} times" if splits.repeats > 1 else ""
        return (
            f"Models were tested by {splits.folds}-fold cross-validation over subjects{repeats}, "
            f"stratified by label and site; pretraining, fine-tuning and baselines were done anew "
            f"in each fold, where {chosen}."
        )
    return (
        f"Whole sites were left out for testing, in {splits.folds} groups, and all was trained "
        f"anew on the others, where {chosen}."
    )


def describe_analyses(
    maps: Sequence[dict[str, Any]],
    forecasts: bool,
    identified: bool,
    scaled: bool,
    retrieved: bool = False,
) -> list[str]:
    """Attributions, forecasts, identification, retrieval and scaling, where they were done."""
    sentences = []
    if maps:
        subjects = sorted({int(one["subjects"]) for one in maps if "subjects" in one})
        of = f" of {' or '.join(map(str, subjects))} subjects" if subjects else ""
        sentences.append(
            f"Where predictions come from was told by integrated gradients{of} "
            "[@sundararajan2017integrated], and the maps were compared with those of networks with "
            "shuffled weights [@adebayo2018sanity]."
        )
    if forecasts:
        sentences.append(
            "Pretrained models forecast the rest of windows of the test subjects' runs, fed with "
            "their own forecasts, beside persistence, means and an autoregression."
        )
    if identified:
        sentences.append(
            "Test subjects were told apart by their embeddings, and by FC and anatomy beside them "
            "[@finn2015fingerprint]."
        )
    if retrieved:
        sentences.append(
            "Networks of test subjects were retrieved by their images, and the other way round; "
            "classes were predicted from images by prompts of the networks of some training "
            "subjects [@hu2025cinp], and by support vector machines on the embeddings."
        )
    if scaled:
        sentences.append(
            "Loss against compute was fitted by a power law over trainings of several sizes and "
            "shares of the subjects [@kaplan2020scaling; @hoffmann2022scaling]."
        )
    return sentences
