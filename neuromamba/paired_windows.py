"""T1w images and connectivity networks, for models that bring the two together.

Design choices
--------------
- Both are of a whole run (the image is its subject's), so that a run has one window, which begins
  at 0.
- Intensities have no unit: those of an image are brought to 0 to 1 between two percentiles of its
  brain, and what lies beyond them is clipped. There is 0 where there is no brain.
- A network is the Pearson correlations of a run's ROI series. The row and column of a ROI that is
  missing or does not vary are 0, and it is not `present`.
- Who has no T1w image is not left out: the network alone is of use (see the model).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xarray

from neuromamba.connectivity import read_z
from neuromamba.files import InputError
from neuromamba.roi_windows import Sample, stack_samples

DARKEST, BRIGHTEST = "0.5", "99.5"
"""Percentiles of a brain that become 0 and 1 (our choice, after Swin UNETR's clipped ranges)."""
NO_IMAGE = (32, 32, 32)
"""Shape of what stands for images in a batch in which nobody has one."""
OPEN_IMAGES = 128
"""Images that are kept in memory, in half precision: two megabytes each, of 96 voxels an edge."""
OPEN_NETWORKS = 1024


class NetworkWindows:
    """Reader of `fc`: the connectivity of a run.

    Gives `fc` (B, R, R) float32, `present` (B, R) bool, and `has_fc` (B,) bool.

    Parameters
    ----------
    path_of
        From a run to its store of ROI series.
    n_rois
        How many ROIs each run must have.
    """

    def __init__(self, path_of: Callable[[str], Path], n_rois: int) -> None:
        self._path_of, self._n_rois = path_of, n_rois
        self._network = lru_cache(OPEN_NETWORKS)(self._read)

    def positions(self, run: str) -> int:
        self._network(run)
        return 1

    def read(self, run: str, start: int) -> Sample:
        fc, present = self._network(run)
        return {"fc": fc, "present": present, "has_fc": np.array(present.any())}

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return stack_samples(samples)

    def _read(self, run: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        path = self._path_of(run)
        r = np.tanh(read_z(path, "pearson")[1])
        if len(r) != self._n_rois:
            raise InputError(
                f"{path}: {len(r)} ROIs, where the model reads {self._n_rois}; make the ROIs again "
                "by the atlas that the model was made with"
            )
        present = ~np.isnan(np.diag(r))
        np.fill_diagonal(r, 1.0)
        fc = np.where(np.outer(present, present), r, 0.0).astype(np.float32)
        return fc, present


class NoNetworks:
    """Reader of `fc` where there are only images: nobody `has_fc`."""

    def __init__(self, n_rois: int) -> None:
        self._n_rois = n_rois

    def positions(self, run: str) -> int:
        return 1

    def read(self, run: str, start: int) -> Sample:
        n = self._n_rois
        present = np.zeros(n, dtype=bool)
        return {"fc": np.zeros((n, n), np.float32), "present": present, "has_fc": np.array(False)}

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        return stack_samples(samples)


class ImageWindows:
    """Reader of `anat`: the T1w image of a run's subject.

    Gives `anat` (B, Z, Y, X) float32 in [0, 1], `has_anat` (B,) bool, and `person` (B,) int64, the
    same for all runs of a subject. Who has no image has one of zeros.

    Parameters
    ----------
    path_of
        From a subject to the store of the image.
    """

    def __init__(self, path_of: Callable[[str], Path]) -> None:
        self._path_of = path_of
        self._image = lru_cache(OPEN_IMAGES)(self._read)

    def positions(self, run: str) -> int:
        return 1

    def read(self, run: str, start: int) -> Sample:
        subject = subject_of_run(run)
        has = self._path_of(subject).exists()
        image = self._image(subject).astype(np.float32) if has else np.zeros(0, np.float32)
        return {"anat": image, "has_anat": np.array(has), "person": np.array(number_of(subject))}

    def collate(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        shapes = {one["anat"].shape for one in samples if one["has_anat"]}
        if len(shapes) > 1:
            raise InputError(
                f"T1w images of different shapes ({', '.join(map(str, sorted(shapes)))}); make "
                "`anat` again with one volumes.shape"
            )
        nothing = np.zeros(next(iter(shapes), NO_IMAGE), np.float32)
        filled = [one if one["has_anat"] else {**one, "anat": nothing} for one in samples]
        return stack_samples(filled)

    def _read(self, subject: str) -> npt.NDArray[np.float16]:
        path = self._path_of(subject)
        try:
            with xarray.open_zarr(path, chunks=None) as anat:
                low, high = (float(anat.attrs["percentiles"][q]) for q in (DARKEST, BRIGHTEST))
                values = anat["t1w"].values.astype(np.float32)
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a readable T1w store ({error}); run anat") from None
        scaled = np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        return np.nan_to_num(scaled, nan=0.0).astype(np.float16)


def subject_of_run(run: str) -> str:
    """`dataset/sub-01` of the run `dataset/sub-01_task-rest`."""
    dataset, slash, name = run.rpartition("/")
    return dataset + slash + name.split("_")[0]


def number_of(subject: str) -> int:
    """A number of 63 bits that tells subjects apart, always the same."""
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:8], "big") >> 1
