"""Attributions as maps: of a subject, of a group, and as NIfTI in MNI space.

A subject has two maps: `signed`, the sum of a voxel's attributions over the volumes of a window,
whose sum over voxels is what the output changes by from the baseline; and `strength`, the sum of
their absolute values. A voxel that a run has no patch for is not read by the model and therefore 0.
Maps of a model that reads regions have regions where this text says voxels.

A group's maps are the means over subjects, with the mean's interval by Student's t and the share of
the subjects whose sign is that of the mean. Most of what an output changes by from a brain without
a signal may be the same for everybody. So a group has a third map, `between`: the covariance over
subjects of a voxel's signed attribution and the sum of all, divided by the variance of that sum. It
sums to 1 over voxels, exactly, and tells where the model sees what it tells people apart by.

The finest thing that such maps show is a patch: inside of one, values repeat the pattern of the
weights that the model reads every patch by.

A group holds sums alone, however many subjects there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import scipy.stats

from neuromamba.attribution import Attributed
from neuromamba.attribution_maskers import Floats, Grid, Mask, Masker
from neuromamba.batches import Batch
from neuromamba.files import atomic_path, write_json
from neuromamba.moments import Moments

KINDS = ("strength", "signed")
CONFIDENCE = 0.95
"""Of all intervals (our choice)."""
MNI_CODE = 4
"""NIfTI's code of an affine that leads to MNI space."""
OF_VOXELS = "a voxel's sum over the volumes of a window, mean over windows"
MEANING = {
    "strength": f"of absolute attributions: {OF_VOXELS}",
    "signed": f"of attributions: {OF_VOXELS}",
    **{
        f"{kind}_{end}": f"{CONFIDENCE:.0%} interval of the mean over subjects, by Student's t"
        for kind in KINDS
        for end in ("low", "high")
    },
    "signed_t": "mean over subjects divided by its standard error",
    "signed_agreement": "share of the subjects whose sign is that of the mean",
    "between": "share of the variance over subjects of the sum of `signed`; sums to 1",
}
"""What the volumes of a map hold."""


@dataclass(frozen=True)
class SubjectMap:
    """Attributions of one subject, mean over its windows.

    Attributes
    ----------
    strength, signed
        float32 of the masker's shape, in units of the output, of the volumes of a window together.
    brain
        Bool of that shape: where the model sees a signal, one that differs from its baseline.
    change, total
        Of each window: what the output changes by, and the sum of its attributions.
    """

    subject: str
    strength: Floats
    signed: Floats
    brain: Mask
    change: list[float]
    total: list[float]


class Summed:
    """Attributions of a subject's windows, from a stream of batches of one run each."""

    def __init__(self, masker: Masker) -> None:
        self._masker = masker
        self._sums = {kind: np.zeros(masker.shape) for kind in KINDS}
        self._brain = np.zeros(masker.shape, dtype=bool)
        self._change: list[float] = []
        self._total: list[float] = []

    def add(self, found: Attributed, batch: Batch) -> None:
        values = found.values[self._masker.need]
        for kind, of in (("strength", values.abs()), ("signed", values)):
            self._sums[kind] += self._masker.collapse(of, batch)
        seen = found.seen[self._masker.need].double()
        self._brain |= self._masker.collapse(seen, batch) > 0
        self._change += found.change.tolist()
        self._total += found.total.tolist()

    def map(self, subject: str) -> SubjectMap:
        """The mean over the windows so far."""
        mean = {k: (of / len(self._change)).astype(np.float32) for k, of in self._sums.items()}
        return SubjectMap(
            subject, **mean, brain=self._brain, change=self._change, total=self._total
        )


class GroupMap:
    """Maps of a group, and how sure they are, from a stream of subjects.

    Attributes
    ----------
    n
        Subjects so far.
    """

    def __init__(self, shape: Grid) -> None:
        self.n = 0
        self._shape = shape
        self._moments = {kind: Moments() for kind in KINDS}
        self._held, self._above, self._below = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        self._sums: list[float] = []
        self._products = np.zeros(shape)

    def add(self, one: SubjectMap) -> None:
        for kind, moments in self._moments.items():
            moments.add(getattr(one, kind).reshape(1, -1).astype(np.float32))
        self._held += one.brain
        self._above += one.signed > 0
        self._below += one.signed < 0
        self._sums.append(float(one.signed.sum(dtype=np.float64)))
        # Differences to the first subject keep the digits that plain products would lose.
        self._products += (self._sums[-1] - self._sums[0]) * one.signed.astype(np.float64)
        self.n += 1

    @property
    def brain(self) -> Mask:
        """Voxels that at least half of the subjects have."""
        return 2 * self._held >= max(self.n, 1)

    def mean(self, kind: str) -> Floats:
        """Mean over subjects of `strength` or `signed`."""
        return self._moments[kind].mean().reshape(self._shape)

    def between(self) -> Floats | None:
        """Share of the variance over subjects; `None` where there is no variance."""
        sums = np.array(self._sums) - self._sums[0]
        variance = float(sums.var())
        if variance <= 1e-12 * float(np.square(self._sums).mean()):
            return None
        covariance = self._products / self.n - sums.mean() * self.mean("signed")
        return np.asarray(covariance / variance)

    def maps(self) -> dict[str, Floats]:
        """The maps: `strength`, `signed` and, where subjects differ, `between`."""
        maps = {kind: self.mean(kind) for kind in KINDS}
        between = self.between()
        return maps if between is None else {**maps, "between": between}

    def volumes(self) -> dict[str, Floats]:
        """The maps and, of two or more subjects, how sure they are (see `MEANING`)."""
        maps = self.maps()
        if self.n < 2:
            return maps
        for kind, moments in self._moments.items():
            mean = maps[kind]
            error = moments.sd().reshape(self._shape) / np.sqrt(self.n - 1)
            half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1) * error
            maps |= {f"{kind}_low": mean - half, f"{kind}_high": mean + half}
            if kind == "signed":
                sure = error > 1e-9 * np.abs(mean)
                maps["signed_t"] = np.divide(mean, error, out=np.zeros_like(mean), where=sure)
                alike = np.where(mean > 0, self._above, np.where(mean < 0, self._below, 0))
                maps["signed_agreement"] = alike / self.n
        return maps


def write_map(
    path: Path, volumes: dict[str, Floats], affine: Floats, about: dict[str, Any]
) -> None:
    """Write named maps (x, y, z) as one NIfTI, a volume each, and a JSON beside it.

    It has the maps' names in order (`volumes`), what those of `MEANING` mean, and `about`. It goes
    last, so that where it is, all is.
    """
    data = np.stack(list(volumes.values()), axis=-1).astype(np.float32)
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, MNI_CODE)
    image.set_qform(affine, MNI_CODE)
    sidecar = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
    sidecar.unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        nibabel.save(image, temporary)
    meaning = {name: MEANING[name] for name in volumes if name in MEANING}
    write_json(sidecar, {"volumes": list(volumes), "meaning": meaning, **about})


def map_name(entities: str, space: str) -> str:
    """File name of the map of a subject or run with these entities, as BIDS derivatives have it."""
    return f"{entities}_space-{space}_desc-attribution_statmap.nii.gz"
