"""The methods section's paragraph on models: what they are, and how they were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuromamba.collect import Training

MODES = {
    "full": "all weights learnt",
    "adapters": "low-rank adapters of the linear layers [@hu2022lora] and the head learnt",
    "head": "only the head learnt, on the frozen model",
    "probe": "a linear probe was fitted to the frozen model's features",
}
OBJECTIVES = {"mse": "squared error", "mae": "absolute error", "huber": "Huber loss"}


def describe_models(trainings: Sequence[Training]) -> list[str]:
    """Sentences on each model that was pretrained, and on each fine-tuning, as far as recorded."""
    trainings = [training for training in trainings if "settings" in training.info]
    sentences: list[str] = []
    for name in dict.fromkeys(training.model for training in trainings):
        own = [training for training in trainings if training.model == name]
        pretrained = [training for training in own if training.stage == "pretrain"]
        if pretrained:
            sentences.append(_architecture(name, pretrained[0]))
            sentences.append(_pretrained(pretrained))
        sentences += _finetuned(name, own)
    return sentences


def _architecture(name: str, training: Training) -> str:
    model = training.info["settings"]["model"]
    count = training.info.get("parameters")
    size = f"{count:,} parameters, " if count else ""
    match model["family"]:
        case "neuromamba":
            return _neuromamba(name, model, size)
        case "lmae":
            return _lmae(name, model, size) + _regions(training)
        case "cinp":
            return _cinp(name, model, size) + _networks(training)
        case "roi_transformer":
            return _roi_transformer(name, model, size) + _regions(training)
        case "tablet":
            return _tablet(name, model, size) + _codes(training)
    return f"{name} is a model of the family {model['family']}."


def _regions(training: Training) -> str:
    """Which series a model reads."""
    regions, model = training.info["settings"]["regions"], training.info["settings"]["model"]
    pace = model["repetition_time"]
    text = f" It read the series of the {regions['n_rois']} regions of {regions['atlas']}"
    text += ", each minus its mean over the run and over its standard deviation"
    return text + (f", at a repetition time of {pace:g} s." if pace else ".")


def _networks(training: Training) -> str:
    """Which networks, and which weights, a model of images and networks began with."""
    regions, weights = training.info["settings"]["regions"], training.info.get("image_weights")
    text = (
        f" The networks were Pearson correlations of the {regions['n_rois']} regions of "
        f"{regions['atlas']}; the images were scaled between two percentiles of their brains."
    )
    if not weights:
        return text
    count = len(weights["loaded"])
    return text + f" The image encoder began with published weights ({count} tensors fitted)."


def _codes(training: Training) -> str:
    """Whose codes a model reads."""
    codes = training.info["settings"]["codes"]
    made_by = {
        "dc-ae": "the published deep compression autoencoder of natural images [@chen2025dcae]",
        "slices": "an autoencoder of slices that was trained on the training subjects",
    }[codes["tokenizer"]["kind"]]
    scaled = {
        "maximum": "volumes over the scan's maximum",
        "voxel": "volumes in units of each voxel's SD about its mean",
    }[codes["normalization"]]
    return (
        f" The tokens are codes of slices along three axes by {made_by}, which stayed as it was: "
        f"of {scaled}, {codes['n_tokens']} a volume of {codes['code_width']} values each."
    )


def _tablet(name: str, model: dict[str, Any], size: str) -> str:
    hidden = {
        "tube": "the tokens of a volume, the same at all times,",
        "time": "the volumes",
        "random": "the tokens",
    }[model["mask"]]
    placed = {
        "rope": " with rotary positions [@su2024roformer]",
        "grid": " with learnt places in the volume and rotary times [@su2024roformer]",
        "none": " without positions",
    }[model["position"]]
    target = {
        "normed": "each minus its mean over its SD",
        "raw": "as they are",
        "changes": "each minus its mean over the window",
    }[model["target"]]
    read = {
        "codes": "",
        "split": ", of which it reads the mean over the window and the changes apart",
    }
    return (
        f"{name} follows TABLeT [@kim2026tablet] ({size}width {model['width']}, {model['depth']} "
        f"blocks): a Transformer [@vaswani2017attention] with grouped-query attention "
        f"[@ainslie2023gqa]{placed} over the tokens of {model['volumes']} "
        f"volumes{read[model['input']]}. It learnt to tell hidden ones, "
        f"{model['mask_share']:.0%} of {hidden} {target}."
    )


def _cinp(name: str, model: dict[str, Any], size: str) -> str:
    losses = ["a symmetric contrast of both [@radford2021clip]"]
    if model["mim"]:
        losses.append(
            f"masked image modelling (L1, {model['mask_share']:.0%} of the voxels, weight "
            f"{model['mim']:g})"
        )
    if model["inm"]:
        losses.append(
            f"the matching of pairs against hard negatives [@li2021albef] (weight {model['inm']:g})"
        )
    last = f"{', '.join(losses[:-1])} and {losses[-1]}" if losses[1:] else losses[0]
    return (
        f"{name} follows CINP [@hu2025cinp] ({size}width {model['width']}): a 3D Swin Transformer "
        "[@tang2022swin], by MONAI [@cardoso2022monai], of T1w images and a Brain Network "
        f"Transformer [@kan2022bnt] of functional connectivity, which learnt by {last}."
    )


def _lmae(name: str, model: dict[str, Any], size: str) -> str:
    mixture = "no mixture of experts"
    if model["experts"]:
        mixture = (
            f"a mixture of {model['experts']} experts over random walks of up to "
            f"{model['walk_steps']} steps between regions, on the graph of the "
            f"{model['neighbors']} strongest correlations of each in the window"
        )
    predictors = {
        "ssm": "a Mamba-2 state-space model [@dao2024mamba2] over time",
        "mean": "a mean over time",
        "gru": "a recurrent network over time",
        "attention": "self-attention over time",
    }
    return (
        f"{name} is our reading of the abstract of [@cao2025bridging] ({size}width "
        f"{model['width']}, {model['depth']} blocks): a masked autoencoder [@he2022mae] of region "
        f"series, of which stretches of {model['mask_seconds']:g} s, {model['mask_share']:.0%} of "
        "the values, were "
        f"hidden; {mixture}; and {predictors[model['predictor']]} for prediction."
    )


def _roi_transformer(name: str, model: dict[str, Any], size: str) -> str:
    hidden = "patches" if model["mask"] == "patches" else "times"
    return (
        f"{name} is a Transformer [@vaswani2017attention] of the kind of BrainLM "
        f"[@ortegacaro2024brainlm] ({size}width {model['width']}, {model['depth']} blocks): a "
        f"masked autoencoder [@he2022mae] over patches of {model['patch']} volumes of region "
        f"series, of which {model['mask_share']:.0%} of the {hidden} were hidden."
    )


def _neuromamba(name: str, model: dict[str, Any], size: str) -> str:
    text = (
        f"{name} follows NeuroMamba [@choi2025neuromamba] ({size}width {model['width']}, "
        f"{model['depth']} blocks, state {model['state']}): Mamba-2 blocks [@dao2024mamba2] over "
        "the tokens of a window, which learn to predict each next patch in time, told where a "
        f"patch lies by sines and cosines of its centre in {model['bands']} octaves "
        "[@mildenhall2020nerf]."
    )
    if model.get("parametrization") == "mup":
        text += " Learning rates follow the width by maximal update parametrization [@yang2022mup]."
    return text


def _pretrained(group: Sequence[Training]) -> str:
    first = group[0].info
    model, settings = first["settings"]["model"], first["settings"]["pretrain"]
    seeds = sorted({training.seed for training in group})
    loss = OBJECTIVES.get(model.get("objective", "mse"), "its loss")
    what = f"{loss}, windows of {model['volumes']} volumes"
    if model["family"] == "cinp":
        what = "each window a subject's image and the network of a whole run"
    return (
        f"It was pretrained without labels ({what}, "
        f"{_optimised(settings, first)}; {_subjects(group)}; seeds {', '.join(map(str, seeds))})."
    )


def _optimised(settings: dict[str, Any], info: dict[str, Any]) -> str:
    windows = settings["batch_size"] * settings["accumulate"]
    return (
        f"{info['step']} steps of {windows} windows by AdamW [@loshchilov2019adamw] with a peak "
        f"learning rate of {settings['learning_rate']:g}, weight decay "
        f"{settings['weight_decay']:g}, {settings['warmup_steps']} steps of warm-up and cosine "
        f"decay, in {settings['precision']}"
    )


def _subjects(group: Sequence[Training], mode: str = "full") -> str:
    """Numbers of subjects, as a range where folds differ, and what they were for."""
    counts = {
        part: sorted({len(training.info["subjects"][part]) for training in group})
        for part in ("train", "validation")
    }
    train, validation = (
        f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"
        for found in counts.values()
    )
    if mode == "probe":
        return (
            f"{train} subjects, whose inner folds chose the penalty; {validation} others had no "
            "part in it"
        )
    return f"{train} subjects, and {validation} to choose the step by its validation loss"


def _finetuned(name: str, own: Sequence[Training]) -> list[str]:
    """A sentence for each way in which a model was fine-tuned, naming its targets."""
    ways: dict[tuple[str, str], list[Training]] = {}
    for training in own:
        if training.stage != "pretrain":
            settings = training.info["settings"].get("finetune", {})
            mode = settings.get("mode", "full")
            fresh = ", from random weights" if settings.get("start") == "fresh" else ""
            how = "" if mode == "probe" or not settings else _optimised(settings, training.info)
            begun = ", its head starting as a linear probe" if "head_start" in training.info else ""
            way = (mode, fresh + begun + (f" ({how})" if how else ""))
            ways.setdefault(way, []).append(training)
    sentences = []
    for (mode, how), group in ways.items():
        targets = ", ".join(dict.fromkeys(training.stage for training in group))
        kinds = {one.stage: one.info["settings"].get("target", {}).get("kind") for one in group}
        states = ", ".join(target for target, kind in kinds.items() if kind == "state")
        of_states = f" (of {states}, of those that were taken in the state)" if states else ""
        sentences.append(
            f"{name} was fine-tuned to predict {targets}: {MODES[mode]}{how}; "
            f"{_subjects(group, mode)}. A subject's prediction is the mean over evenly spaced "
            f"windows of all its runs{of_states}."
        )
    return sentences
