"""Samples of Brainmarks as tokens: what the stages `volumes` and `tokens` make of a run, in memory.

A sample is one run in Brainmarks' space `mni`: `bold` (T, V), each voxel in units of its own SD,
with `mean` and `std` (1, V) that lead back to original units, the repetition time, and no mask.

- **Grid.** The V voxels are those of TemplateFlow's brain mask of MNI152NLin6Asym on a grid of 2 mm
  and 91 x 109 x 91 voxels, axes to R, A, S. From there they go through the affine to the model's.
- **Mask.** The template's takes the place of the run's own, which Brainmarks does not give. As in
  `volumes`, voxels that do not vary leave it, so patches that a run did not cover are dropped.
- **Edge of the brain.** Outside the mask nothing is known. Where interpolation would reach there,
  the voxels that are known share its weight; with 0 instead the whole surface would be dimmed.
- **Normalisation** is by the run's own statistics, over all volumes of the sample.
- **Time.** No stage resamples in time, so neither is it done here: volumes are fed at the sample's
  repetition time, which Brainmarks sets for each dataset (2 s for ABIDE, 0.72 s for HCP).
- **Short runs.** Clips shorter than a window (16 volumes in NSD) are filled up with each voxel's
  mean, as by Brainmarks' other models. Our own stages would leave such a run out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from neuromamba.config import NeuroMamba
from neuromamba.embed import WINDOWS
from neuromamba.files import InputError
from neuromamba.moments import Floats, Moments
from neuromamba.pretrained import Pretrained
from neuromamba.resample import Resampler, resample_mask, target_affine
from neuromamba.spacing import spaced
from neuromamba.store import FLOAT16_MAX, READ_VOLUMES, Code
from neuromamba.tokens import PatchIndex, index_patches
from neuromamba.volumes import PROBE_VOLUMES

Mask = npt.NDArray[np.bool_]

SPACE = "MNI152NLin6Asym"
AFFINE = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
"""Grid of Brainmarks' volumes, voxel indices (x, y, z) to mm: `MNI152_2MM_AFFINE` of its `nisc`."""

SIGNAL = ("bold", "mean", "std")
"""What a sample tells of the signal; the tokens take their place."""


@dataclass(frozen=True)
class _Run:
    """A run at the voxels of the model's grid; `stored` (volume, voxel) in the units of `code`."""

    stored: npt.NDArray[np.float16]
    code: Code
    mean: npt.NDArray[np.float64]
    sd: npt.NDArray[np.float64]

    @property
    def varies(self) -> Mask:
        """(voxel,) whether a voxel has a signal, as `volumes` tells it."""
        return np.asarray(self.sd > self.code.half_step(self.mean))

    def normalized(self, start: int, n_volumes: int, by_voxel: bool) -> Floats:
        """Some volumes in units of SD, 0 where nothing varies: (volume, voxel) float32."""
        varies = self.varies
        mean, sd = self.mean[varies], self.sd[varies]
        if not by_voxel:
            mean, sd = mean.mean(), np.sqrt(np.mean(sd**2) + np.var(mean))
        stored = self.stored[start : start + n_volumes, varies].astype(np.float64)
        out = np.zeros((n_volumes, len(varies)), dtype=np.float32)
        out[:, varies] = (stored * self.code.scale + self.code.offset - mean) / sd
        return out


class BrainmarksTransform:
    """From a sample of Brainmarks to the windows that a model reads.

    Parameters
    ----------
    pretrained
        The model.
    mask
        (z, y, x) voxels of a sample.
    windows
        Windows of a run, fewer where it has fewer starts.

    Attributes
    ----------
    n_patches
        Patches that count as brain by `mask`; those of a run are among them.

    Raises
    ------
    InputError
        When `windows` is below 1.
    """

    def __init__(self, pretrained: Pretrained, mask: Mask, windows: int = WINDOWS) -> None:
        if windows < 1:
            raise InputError(f"windows = {windows}: a run is embedded by at least 1 window")
        self._model, self._tokens, self._windows = pretrained.model, pretrained.tokens, windows
        self._voxelwise = cast(NeuroMamba, pretrained.model).normalization == "voxel"
        self._shape, affine = pretrained.volumes.shape, target_affine(pretrained.volumes)
        self._voxels = resample_mask(mask.T, AFFINE, self._shape, affine)
        resampler = Resampler(mask.T.shape, AFFINE, self._shape, affine, self._voxels)
        self._matrix = known_part(resampler, mask.ravel())
        self._every = _numbers(self._patches(np.ones(len(self._voxels), dtype=bool)))
        self.n_patches = len(self._every)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Put windows in the place of `bold`, `mean` and `std`; what else there is stays.

        Returns
        -------
        dict
            - ``tokens`` (window, N, T, V) float32 and ``centers`` (N, 3) float32, N being
              `n_patches`: the run's patches first, zeros after them;
            - ``patches`` int64: how many patches the run has;
            - ``places`` (N,) int64: the number of each among those of the mask.

        Raises
        ------
        InputError
            When the sample has other voxels than the mask, values that are not finite or cannot be
            stored, or no patch with enough voxels that vary.
        """
        name = str(sample.get("path", "a sample without path"))
        run = self._store(sample, name)
        patches = self._patches(run.varies)
        n = len(patches.center)
        if not n:
            raise InputError(f"{name}: no patch has enough brain voxels that vary in time")
        return {
            **{key: value for key, value in sample.items() if key not in SIGNAL},
            "tokens": torch.from_numpy(self._cut(run, patches)),
            "centers": self._padded(patches.center),
            "patches": torch.tensor(n),
            "places": self._padded(np.searchsorted(self._every, _numbers(patches))),
        }

    def _store(self, sample: Mapping[str, Any], name: str) -> _Run:
        """Resample a run and round it as `volumes` does; fill up one that is too short."""
        moments, stored = Moments(), list[npt.NDArray[np.float16]]()
        for values in self._resampled(sample, name):
            if not stored:
                first = values[:PROBE_VOLUMES].astype(np.float64)
                code = Code(scale=float(first.std()) or 1.0, offset=float(first.mean()))
            coded = code.encode(values)
            if not np.abs(coded).max() < FLOAT16_MAX:
                raise InputError(f"{name}: there are artefacts in volume {moments.n} or after it")
            moments.add(values)
            stored.append(coded.astype(np.float16))
        missing = self._model.volumes - moments.n
        if missing > 0:
            warnings.warn(
                f"runs of {moments.n} volumes are filled up with their mean to the "
                f"{self._model.volumes} that the model reads",
                stacklevel=2,
            )
            rest = code.encode(moments.mean().astype(np.float32)).astype(np.float16)
            stored.append(np.tile(rest, (missing, 1)))
        return _Run(np.concatenate(stored), code, moments.mean(), moments.sd())

    def _resampled(self, sample: Mapping[str, Any], name: str) -> Iterator[Floats]:
        """Yield a run's volumes at the voxels of the model's grid, in blocks: (volume, voxel)."""
        bold, mean, std = (np.asarray(sample[key]) for key in SIGNAL)
        if bold.ndim != 2 or bold.shape[1] != self._matrix.shape[1] or not len(bold):
            raise InputError(
                f"{name}: bold has the shape {bold.shape}, where (volumes, "
                f"{self._matrix.shape[1]}) was expected: the voxels of the brain mask of {SPACE}"
            )
        for first in range(0, len(bold), READ_VOLUMES):
            known = bold[first : first + READ_VOLUMES].astype(np.float32) * std + mean
            if not np.isfinite(known).all():
                raise InputError(f"{name}: there is NaN or infinity in volume {first} or after it")
            yield np.stack([self._matrix @ volume for volume in known])

    def _patches(self, brain: Mask) -> PatchIndex:
        """The patches of a run, of which `brain` (voxel,) tells the voxels of its mask."""
        mask = np.zeros(np.prod(self._shape), dtype=bool)
        mask[self._voxels[brain]] = True
        grid = mask.reshape(self._shape[::-1])
        return index_patches(grid, self._tokens.patch, self._tokens.brain_fraction)

    def _cut(self, run: _Run, patches: PatchIndex) -> Floats:
        """The tokens of evenly spaced windows: (window, `n_patches`, T, V)."""
        time_patch, length = self._tokens.time_patch, self._model.volumes
        column = np.full(np.prod(self._shape), len(self._voxels))
        column[self._voxels] = np.arange(len(self._voxels))
        columns = column[patches.voxels]
        starts = spaced(len(run.stored) // time_patch - length // time_patch, self._windows)
        shape = (len(starts), self.n_patches, length // time_patch, time_patch * columns.shape[1])
        tokens = np.zeros(shape, dtype=np.float32)
        for window, start in zip(tokens, starts * time_patch, strict=True):
            values = run.normalized(start, length, self._voxelwise)
            # One more column, for voxels of a patch that are not brain.
            taken = np.pad(values, ((0, 0), (0, 1)))[:, columns]
            taken = taken.reshape(shape[2], time_patch, *columns.shape).transpose(2, 0, 1, 3)
            window[: len(columns)] = taken.reshape(len(columns), *shape[2:])
        return tokens

    def _padded(self, values: npt.NDArray[Any]) -> Tensor:
        """(patch, ...) of a run -> (`n_patches`, ...): samples of a batch are of one shape."""
        out = np.zeros((self.n_patches, *values.shape[1:]), dtype=values.dtype)
        out[: len(values)] = values
        return torch.from_numpy(out)


def known_part(resampler: Resampler, known: Mask) -> scipy.sparse.csr_array:
    """The resampling as a matrix over those source voxels that are known: (voxel, known).

    Where an interpolation reaches beyond them, the weights that remain are raised to a sum of 1.

    Parameters
    ----------
    resampler
        From the whole source grid; each of its voxels has a known one nearest to it.
    known
        (source voxel,) which are known, x fastest.
    """
    whole = resampler.matrix
    rows = np.repeat(np.arange(whole.shape[0]), np.diff(whole.indptr))
    kept = known[resampler.touched][whole.indices]
    weights, of_row = whole.data[kept], rows[kept]
    counts = np.bincount(of_row, minlength=whole.shape[0])
    reduced = (counts < np.diff(whole.indptr))[of_row]
    total = np.bincount(of_row, weights, minlength=whole.shape[0])[of_row]
    number = np.cumsum(known, dtype=np.int32) - 1
    return scipy.sparse.csr_array(
        (
            np.where(reduced, weights / total, weights).astype(np.float32),
            number[resampler.touched][whole.indices[kept]],
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        ),
        shape=(whole.shape[0], int(known.sum())),
    )


def _numbers(patches: PatchIndex) -> npt.NDArray[np.intp]:
    """One number for each patch, ascending in the order of the patches."""
    return np.ravel_multi_index(tuple(patches.grid_index.T.astype(np.intp)), patches.patch_grid)
