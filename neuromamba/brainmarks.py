"""NeuroMamba as a model of Brainmarks, MedARC's evaluation suite for fMRI foundation models.

Brainmarks (PyPI `brainmarks`, read at 0.1.1) imports every module of its namespace package
`brainmarks.models`. Ours, `brainmarks/models/neuromamba.py`, registers `open_model`, so that

    python -m brainmarks.main_logistic neuromamba cls abide_dx --overrides model_kwargs.weights=DIR

evaluates a folder that `neuromamba export` wrote. How its data become tokens, and what of them
cannot be known, says `brainmarks_samples`. What cannot be had is refused: models that read anything
but volumes, and models of denoised runs, as few of Brainmarks' datasets have the confounds for it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from neuromamba.brainmarks_samples import SPACE, BrainmarksTransform, Mask
from neuromamba.config import Volumes
from neuromamba.embed import BATCH_SIZE, WINDOWS
from neuromamba.files import InputError
from neuromamba.models import NeuroMamba
from neuromamba.pretrained import Pretrained, from_pretrained

WEIGHTS = "NEUROMAMBA_WEIGHTS"
"""Environment variable that names a model where no argument does, as in Brainmarks' smoke test."""


def open_model(
    weights: str | None = None, revision: str | None = None, windows: int = WINDOWS
) -> tuple[BrainmarksTransform, BrainmarksModel]:
    """What Brainmarks needs of a model: its transform of samples, and the frozen model.

    The brain mask is read, or fetched, by TemplateFlow, as Brainmarks does for its own models.

    Parameters
    ----------
    weights, revision
        As in `pretrained.from_pretrained`; without, the variable `NEUROMAMBA_WEIGHTS`.
    windows
        Evenly spaced windows of a run, as in `neuromamba embed`.

    Raises
    ------
    InputError
        When there is no such model, or Brainmarks' data lack what it needs.
    """
    name = weights or os.environ.get(WEIGHTS)
    if not name:
        raise InputError(
            "which NeuroMamba is to be evaluated? Give --overrides model_kwargs.weights=FOLDER, or "
            f"set {WEIGHTS}, with a folder that `neuromamba export` wrote"
        )
    pretrained = from_pretrained(name, revision)
    refuse_other_needs(pretrained)
    transform = BrainmarksTransform(pretrained, template_mask(), windows)
    return transform, BrainmarksModel(pretrained, transform.n_patches)


def template_mask() -> Mask:
    """The brain mask whose voxels are a sample's: (z, y, x), read as Brainmarks' `mni` reader."""
    from brainmarks.nisc import read_mni152_2mm_data
    from templateflow import api

    path = api.get(SPACE, desc="brain", resolution=2, suffix="mask", extension="nii.gz")
    return np.asarray(read_mni152_2mm_data(path, interpolation="nearest") > 0)


class BrainmarksModel(nn.Module):
    """A model whose embeddings are those of `neuromamba embed`, as Brainmarks asks for them.

    Parameters
    ----------
    pretrained
        The model.
    n_patches
        Patches of the brain mask, see `BrainmarksTransform`.
    """

    __space__ = "mni"

    def __init__(self, pretrained: Pretrained, n_patches: int) -> None:
        super().__init__()
        self.network, self.n_patches = cast(NeuroMamba, pretrained.network), n_patches
        # As long as nothing has learnt the pooling, it is the mean of the hidden states.
        self._plain = not self.network.pool.weight.any()

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, None, Tensor]:
        """Embed the runs of a batch, each apart from the others.

        Returns
        -------
        tuple
            - class token (run, 1, width): the run's embedding, the mean over its windows;
            - None, for registers;
            - patches (run, `n_patches`, width): mean hidden state of each patch of the mask, over
              time and windows. Patches that a run does not have get the mean of those it has, so
              that a mean over patches is that of the run.
        """
        names = ("tokens", "centers", "patches", "places")
        runs = zip(*(batch[name] for name in names), strict=True)
        embeddings, patches = zip(*(self._embed(*run) for run in runs), strict=True)
        return torch.stack(embeddings)[:, None], None, torch.stack(patches)

    def _embed(
        self, tokens: Tensor, centers: Tensor, patches: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One run: embedding (width,) and patches (`n_patches`, width)."""
        n, of_windows, of_patches = int(patches), [], []
        for part in tokens[:, :n].split(BATCH_SIZE):
            windows = {
                "tokens": part.flatten(0, 1),
                "centers": centers[:n].repeat(len(part), 1),
                "patches": torch.full((len(part),), n),
            }
            states = self.network.encode(windows).float().mean(1).unflatten(0, (-1, n))
            of_patches.append(states)
            of_windows.append(states.mean(1) if self._plain else self.network.embed(windows))
        mean = torch.cat(of_patches).mean(0)
        every = mean.mean(0).repeat(self.n_patches, 1).index_copy(0, places[:n], mean)
        return torch.cat(of_windows).float().mean(0), every


def refuse_other_needs(pretrained: Pretrained) -> None:
    """Raise `InputError` when Brainmarks' volumes are not what a model reads; warn of the space."""
    needs = cast(NeuroMamba, pretrained.network).needs
    if needs != ("tokens",):
        raise InputError(
            f"a model of family {pretrained.model.family} reads {', '.join(needs)}; Brainmarks "
            "gives a run's volumes alone, from which nothing but tokens is made"
        )
    if pretrained.volumes.denoise != Volumes().denoise:
        raise InputError(
            "the model has learnt from denoised runs (volumes.denoise); Brainmarks' runs are as "
            "fMRIPrep or HCP left them, and most come without confounds to denoise them alike"
        )
    spaces = pretrained.facts.get("spaces", [])
    if spaces and SPACE not in spaces:
        warnings.warn(
            f"the model has learnt from runs in {', '.join(spaces)}; Brainmarks' are in {SPACE}, "
            "where the same place may lie some millimetres off",
            stacklevel=2,
        )
