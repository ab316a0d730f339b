"""A fine-tuned model as it lies on disk, with all it takes to predict a run of somebody new.

Nothing but its folder is needed, so that it can be copied to where the scans are. One that was
trained before there were calibrations also needs the `config.yaml` of its results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from neuromamba.atlases import open_atlas
from neuromamba.calibration_file import Arrays, Calibration, load_calibration
from neuromamba.checkpoint import load_model_info, load_weights
from neuromamba.config import Codes, Compute, Config, Finetune, Model, Tokens, Volumes, load_config
from neuromamba.files import InputError
from neuromamba.heads import HeadedModel, NumberHead, make_unscaled
from neuromamba.models import build_model
from neuromamba.novelty import Cloud
from neuromamba.observe import Grid, patch_grid
from neuromamba.parcellation import Parcellation
from neuromamba.pretrain import n_rois_of
from neuromamba.record import seen_subjects
from neuromamba.runtime import choose_device
from neuromamba.slice_encoders import SliceEncoder, load_encoder


@dataclass(frozen=True)
class Predictor:
    """A fine-tuned model.

    Attributes
    ----------
    network
        With its head, in evaluation mode, on its device.
    model, finetune, tokens, volumes
        How it was made, and how scans have to be prepared for it.
    dataset, target, classes, space
        What it was trained on; no classes for a number.
    seen
        Names of the subjects that it, or what it started from, was trained or chosen on.
    calibration, arrays
        What it knows of itself; `None` and empty for an older model.
    regions, atlas
        Of a model of ROI series: what is known of them (see `neuromamba.pretrain.regions_of`), and
        the atlas by which new scans are summed over them, once `with_atlas` has been given it.
    codes, encoder
        Of a model of codes: what they are (see `neuromamba.code_windows.code_facts`), and the
        autoencoder that makes them of new scans, once `with_tokenizer` has been given it.
    """

    network: HeadedModel
    model: Model
    finetune: Finetune
    tokens: Tokens
    volumes: Volumes
    dataset: str
    target: str
    classes: list[str]
    space: str
    seen: frozenset[str]
    calibration: Calibration | None
    arrays: Arrays
    regions: Mapping[str, Any] | None = None
    atlas: Parcellation | None = None
    codes: Mapping[str, Any] | None = None
    encoder: SliceEncoder | None = None

    @property
    def grid(self) -> Grid:
        """Patches along x, y, z."""
        return patch_grid(self.volumes, self.tokens.patch)

    def cloud(self, level: str) -> Cloud | None:
        """The training subjects' features by `run` or `subject`, where they were enough."""
        if f"{level}.mean" not in self.arrays:
            return None
        names = [part.name for part in fields(Cloud)]
        return Cloud(*(self.arrays[f"{level}.{name}"].astype(np.float64) for name in names))

    @property
    def patch_shares(self) -> np.ndarray | None:
        """(patch,) share of the training runs that has each patch."""
        shares = self.arrays.get("patches")
        return None if shares is None else shares.astype(np.float64).ravel()

    @property
    def training_scale(self) -> tuple[float, float] | None:
        """Mean and SD of a number over training subjects; `None` for classes."""
        task = self.network.task
        return (task.mean.item(), task.sd.item()) if isinstance(task, NumberHead) else None


def open_predictor(folder: Path, device: str = "auto") -> Predictor:
    """Load the finished fine-tuning in a folder, `results/.../finetune/{target}` or a copy of it.

    Raises
    ------
    InputError
        When it holds no fine-tuned model, or one that is not whole or of another version.
    """
    info = _read(folder)
    settings = info["settings"]
    try:
        model: Model = TypeAdapter(Model).validate_python(settings["model"])
        finetune = Finetune.model_validate(settings["finetune"])
        tokens = Tokens.model_validate(settings["tokens"])
    except (KeyError, ValidationError) as error:
        raise InputError(
            f"{folder / 'model.json'}: its settings are not of this version "
            f"({' '.join(str(error).split())}); train the model again"
        ) from None
    if settings["target"]["kind"] == "state":
        raise InputError(
            f"{folder} predicts {info['target']!r}, which is a state: events tell it of parts of a "
            "run, and of a whole scan it says nothing; see the predictions of the test subjects in "
            "evaluate/"
        )
    classes = [name for name, _ in settings["target"].get("classes", [])]
    found = load_calibration(folder, info)
    calibration, arrays = (None, {}) if found is None else found
    if calibration is None:
        config = _config_beside(folder, info, tokens)
        volumes, space = config.volumes, config.datasets[info["dataset"]].space
    else:
        volumes, space = calibration.volumes, calibration.space
    return Predictor(
        network=_load(folder, model, settings, tokens, classes, device),
        model=model,
        finetune=finetune,
        tokens=tokens,
        volumes=volumes,
        dataset=info["dataset"],
        target=info["target"],
        classes=classes,
        space=space,
        seen=frozenset(seen_subjects(info, info["dataset"])),
        calibration=calibration,
        arrays=arrays,
        regions=settings.get("regions"),
        codes=settings.get("codes"),
    )


def with_atlas(predictor: Predictor, atlas: str | None) -> Predictor:
    """The predictor with what it takes to read new scans; only a model of regions takes an atlas.

    Raises
    ------
    InputError
        When there is none, one too many, or another than it was trained with.
    """
    regions = predictor.regions
    if regions is None or predictor.model.pairs:  # of new people, the image alone is read
        if atlas is not None:
            raise InputError(
                f"--atlas {atlas}: of new scans the model reads no regions; leave it out"
            )
        return predictor
    what = f"the {regions['n_rois']} regions of {regions['atlas']}"
    if atlas is None:
        raise InputError(f"the model reads the series of {what}: name that atlas by --atlas")
    found = open_atlas(atlas, predictor.space)
    if found.sha256 != regions["atlas_sha256"]:
        raise InputError(
            f"--atlas {atlas}: the model was trained on the series of {what}, and this is another "
            "file; give the one that the dataset named as its `atlas`. A model of tables of series "
            "(`series`) knows no atlas, and so no new scans"
        )
    return replace(predictor, atlas=found)


def with_tokenizer(predictor: Predictor, tokenizer: Path | None) -> Predictor:
    """The predictor with what makes codes of new scans; only a model of codes takes a tokenizer.

    Parameters
    ----------
    tokenizer
        Folder of the one that was trained with it (`results/.../tokenizer`), or of a DC-AE's
        weights.

    Raises
    ------
    InputError
        When there is none, one too many, or another than it was trained with.
    """
    codes = predictor.codes
    if codes is None:
        if tokenizer is not None:
            raise InputError(f"--tokenizer {tokenizer}: the model reads no codes; leave it out")
        return predictor
    kind, sha256 = codes["tokenizer"]["kind"], codes["tokenizer"]["sha256"]
    what = f"the tokenizer {kind} whose weights have the SHA-256 {sha256[:12]}..."
    if tokenizer is None:
        raise InputError(
            f"the model reads codes by {what}: name its folder by --tokenizer (one that was "
            "trained here lies in results/DATASET/tokenizer)"
        )
    if not tokenizer.is_dir():
        raise InputError(
            f"--tokenizer {tokenizer}: there is no such folder; the model needs {what}"
        )
    settings = Codes(
        tokenizer=kind, weights=str(tokenizer.absolute()), normalization=codes["normalization"]
    )
    device = next(predictor.network.parameters()).device.type
    own = tokenizer if settings.trained else None
    encoder = load_encoder(settings, predictor.volumes.shape[0], device, own)
    if encoder.facts["sha256"] != sha256:
        raise InputError(
            f"--tokenizer {tokenizer}: the model was trained on codes by {what}, and this is "
            f"another one ({encoder.facts['sha256'][:12]}...); give that one"
        )
    return replace(predictor, encoder=encoder)


def _read(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"{folder} is not a folder; give that of a fine-tuned model: "
            "results/DATASET/MODEL/seed-0/finetune/TARGET"
        )
    if (folder / "config.json").exists() and not (folder / "model.json").exists():
        raise InputError(
            f"{folder} was written by `neuromamba export`: such a model has no head for a target; "
            "fine-tune it, and give the folder finetune/TARGET"
        )
    info = load_model_info(folder)
    if info.get("stage") != "finetune":
        raise InputError(
            f"{folder / 'model.json'} is of the stage {info.get('stage')!r}: it has no head for a "
            "target; give a folder finetune/TARGET"
        )
    return info


def _load(
    folder: Path,
    model: Model,
    settings: Mapping[str, Any],
    tokens: Tokens,
    classes: list[str],
    device: str,
) -> HeadedModel:
    compute = Compute.model_validate({"device": device})
    # The weights drawn here are replaced: nobody else's random numbers are to change for them.
    with torch.random.fork_rng(devices=[]):
        values = tokens.patch**3 * tokens.time_patch
        n_rois, codes = n_rois_of(settings), settings.get("codes")
        backbone = build_model(model, values, compute, n_rois, codes)
        network = make_unscaled(backbone, classes, settings["finetune"]["mode"] == "probe")
    load_weights(network, folder)
    return network.to(choose_device(device)).eval()


def _config_beside(folder: Path, info: Mapping[str, Any], tokens: Tokens) -> Config:
    """The config of the results that an older model lies in, which alone tells of its volumes."""
    path = folder.resolve().parents[3] / "config.yaml"
    why = f"{folder} was trained before models recorded how their volumes were made"
    if not path.exists():
        raise InputError(f"{why}, and {path} is not there to tell; train it again")
    config = load_config([path])
    if info["dataset"] not in config.datasets or config.tokens != tokens:
        raise InputError(f"{why}, and {path} is of another run; train it again")
    return config
