r"""T1-weighted images of the demo's subjects, whose anatomy tells part of their connectivity.

For voxel `v` in network `k`, with the template's intensity `m_v`:

    t_v = 1000 I m_v exp(FIELD f_v) [1 + TISSUE d_k + SMOOTH s_v + NOISE w_v]
    d_k = sqrt(SHARE) z_k + sqrt(1 - SHARE) e_k

`z_k` is the subject's deviation of `logit c_k` (see `demo_signal`) in units of its SD over
subjects, so that it holds the effects of sex and age and what is the subject's own; `e_k` are
independent normal deviations that no BOLD signal knows of, `s_v` is smooth, `w_v` white, and `I`
the site's scale. `f_v` is what the coil's receive field leaves: a sum of the slowest cosines over
the brain's box with normal weights, of unit variance, other in each subject. It is the largest
source of variance and tells nothing of a subject. `SHARE` is therefore the share of the variance
of anatomy, by network, that connectivity explains, and its square root the correlation of both.

It is there for models that bring images and connectivity together. No anatomy of people is so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neuromamba.demo_brain import NETWORKS, Brain
from neuromamba.demo_run import SPACE, TEMPLATE, open_nifti, paint, with_suffix
from neuromamba.demo_signal import (
    AGE,
    BASE_COHERENCE,
    SEX,
    SITES,
    SUBJECT_SD,
    Connectivity,
    Subject,
)
from neuromamba.files import write_json

SHARE = 0.7
TISSUE = 0.2
SMOOTH = 0.1
NOISE = 0.05
FIELD = 0.3
SLOWEST = 2
"""Half waves, in sum over the three axes, of the fastest cosine of the receive field."""


def deviations(connectivity: Connectivity) -> NDArray[np.float64]:
    """`z_k` (network,): how far the coherences are from the mean subject's, in SD."""
    coherence = connectivity.coherence
    logit = np.log(coherence / (1 - coherence)) - np.log(BASE_COHERENCE / (1 - BASE_COHERENCE))
    # Sexes are balanced at -1/2 and 1/2; ages are uniform from -1 to 1.
    variance = [
        SUBJECT_SD**2 + SEX.get(k, 0.0) ** 2 / 4 + AGE.get(k, 0.0) ** 2 / 3 for k in NETWORKS
    ]
    return np.asarray(logit / np.sqrt(variance))


def draw_t1w(
    brain: Brain, subject: Subject, connectivity: Connectivity, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The image (voxel,) of a subject, and the deviations `d_k` (network,) of its anatomy."""
    own = rng.standard_normal(len(NETWORKS))
    tissue = np.sqrt(SHARE) * deviations(connectivity) + np.sqrt(1 - SHARE) * own
    smooth = brain.smoother @ rng.standard_normal(brain.smoother.shape[1]).astype(np.float32)
    white = rng.standard_normal(brain.n_voxels).astype(np.float32)
    change = TISSUE * tissue[brain.network][brain.parcel] + SMOOTH * smooth + NOISE * white
    waves = _slow_waves(brain)
    field = waves @ rng.standard_normal(waves.shape[1]) / np.sqrt(waves.shape[1])
    level = 1000 * SITES[subject.site].scale * brain.intensity * np.exp(FIELD * field)
    return (level * (1 + change)).astype(np.float32), tissue


def _slow_waves(brain: Brain) -> NDArray[np.float64]:
    """(voxel, wave) products of cosines over the brain's box, each of zero mean and unit SD."""
    low, high = brain.mm.min(axis=0), brain.mm.max(axis=0)
    angle = np.pi * (brain.mm - low) / (high - low)
    counts = [n for n in np.ndindex((SLOWEST + 1,) * 3) if 0 < sum(n) <= SLOWEST]
    waves = np.stack([np.cos(angle * n).prod(axis=1) for n in counts], axis=1)
    return np.asarray((waves - waves.mean(axis=0)) / waves.std(axis=0))


def write_t1w(folder: Path, name: str, brain: Brain, image: NDArray[np.float32]) -> None:
    """Write the image, its brain mask and their sidecars into `folder`, named as fMRIPrep does."""
    t1w = folder / f"{name}_space-{SPACE}_desc-preproc_T1w"
    with open_nifti(with_suffix(t1w, ".nii.gz"), brain, np.int16) as stream:
        stream.write(paint(brain, np.rint(np.clip(image, 0, None)).astype(np.int16)))
    sidecar = {
        "SkullStripped": True,
        "Description": "Synthetic T1-weighted image",
        "Sources": [],
        "SpatialReference": TEMPLATE,
    }
    write_json(with_suffix(t1w, ".json"), sidecar)
    mask = folder / f"{name}_space-{SPACE}_desc-brain_mask"
    with open_nifti(with_suffix(mask, ".nii.gz"), brain, np.uint8) as stream:
        stream.write(paint(brain, np.ones(brain.n_voxels, np.uint8)))
    about = {"Type": "Brain", "Description": "Outline of the MNI152 template", "Sources": []}
    write_json(with_suffix(mask, ".json"), {**about, "SpatialReference": TEMPLATE})
