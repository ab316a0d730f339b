"""What is measured of one run's quality, from its volumes and its confounds.

The volumes are read some at a time, and what is kept of each is a few numbers and a sample of
voxels: memory does not grow with the run's length. The scan's own confounds are the only source of
motion; where they are missing, motion is unknown, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray

from neuromamba.files import InputError
from neuromamba.qc_template import Mask, Template, Volume, overlap, registration_score
from neuromamba.store import READ_VOLUMES
from neuromamba.tables import read_table

Series = npt.NDArray[np.float64]
FD, STD_DVARS = "framewise_displacement", "std_dvars"
CARPET_ROWS = 900
"""Voxels of the carpet: a picture has no more rows."""
TISSUES = ("gray matter", "white matter", "other")


@dataclass(frozen=True)
class Motion:
    """Head motion and change by the confounds, a value per volume of the scan.

    Attributes
    ----------
    fd
        Framewise displacement, mm; `None` where it is unknown.
    std_dvars
        Standardised DVARS; `None` where it is unknown.
    note
        Why `fd` is unknown; empty where it is not.
    """

    fd: Series | None = None
    std_dvars: Series | None = None
    note: str = ""


@dataclass(frozen=True)
class Course:
    """What happens over time.

    Attributes
    ----------
    seconds
        (time,) when each volume was taken; denoising may have left gaps.
    repetition_time
        In s, from one volume to the next where there is no gap.
    global_signal
        (time,) mean over the brain, in the scan's units.
    dvars
        (time,) root mean square over the brain of the change from the volume before; missing
        for the first volume and after a gap.
    carpet
        (voxel, time) float32: some voxels, in SDs from their mean, grouped by tissue.
    tissue
        (voxel,) number in `TISSUES` of each voxel of the carpet, ascending.
    """

    seconds: Series
    repetition_time: float
    global_signal: Series
    dvars: Series
    carpet: npt.NDArray[np.float32]
    tissue: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Images:
    """Maps (z, y, x) of one run: mean and SD over time and their ratio, NaN outside the mask."""

    mean: Volume
    sd: Volume
    tsnr: Volume
    mask: Mask
    affine: npt.NDArray[np.float64]

    @property
    def voxel_size(self) -> npt.NDArray[np.float64]:
        """Along z, y, x, in mm."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0)[::-1])


def read_motion(path: str | None, n_volumes: int) -> Motion:
    """Motion by a confounds table, fMRIPrep's or in its form.

    Parameters
    ----------
    path
        The table; `None` where there is none.
    n_volumes
        Volumes of the scan, before any was taken out.
    """
    if path is None:
        return Motion(note="the run has no confounds")
    try:
        table = read_table(path, usecols=lambda name: name in (FD, STD_DVARS))
    except InputError as error:
        return Motion(note=str(error))
    name = Path(path).name
    if FD not in table:
        return Motion(note=f"{name} has no column {FD}")
    if len(table) != n_volumes:
        return Motion(note=f"{name} has {len(table)} rows where the scan has {n_volumes} volumes")
    columns = {c: pd.to_numeric(table[c], errors="coerce").to_numpy(float) for c in table}
    if not np.isfinite(columns[FD]).any():
        return Motion(note=f"{name} has no number in {FD}")
    return Motion(columns[FD], columns.get(STD_DVARS))


def read_images(volumes: xarray.Dataset) -> Images:
    """The maps that the volumes' store holds."""
    mask = volumes["mask"].values.astype(bool)
    mean, sd = (np.where(mask, volumes[name].values, np.nan) for name in ("mean", "sd"))
    tsnr = np.divide(mean, sd, out=np.full_like(mean, np.nan), where=sd > 0)
    return Images(mean, sd, tsnr, mask, np.asarray(volumes.attrs["affine"], dtype=np.float64))


def read_course(volumes: xarray.Dataset, mask: Mask, template: Template) -> Course:
    """Go once through the volumes of a run.

    Parameters
    ----------
    volumes
        Opened with `mask_and_scale=False`; see `neuromamba.volumes`.
    mask
        (z, y, x) brain of the run.
    template
        On the same grid; it tells the tissue of a voxel.

    Raises
    ------
    ValueError
        When parts of the volumes are missing, which zarr fills with NaN.
    """
    brain = np.flatnonzero(mask)
    shown, tissue = _sample_voxels(brain, template)
    bold = volumes["bold"]
    n_volumes = bold.sizes["time"]
    global_signal, dvars = np.empty(n_volumes), np.full(n_volumes, np.nan)
    carpet = np.empty((len(shown), n_volumes), dtype=np.float32)
    last: npt.NDArray[np.float32] | None = None
    for start in range(0, n_volumes, READ_VOLUMES):
        frames = bold[start : start + READ_VOLUMES].values
        for t, frame in enumerate(frames.reshape(len(frames), -1), start):
            signal = frame[brain].astype(np.float32)
            global_signal[t] = signal.mean(dtype=np.float64)
            carpet[:, t] = signal[shown]
            if last is not None:
                last -= signal
                dvars[t] = np.sqrt(np.dot(last, last) / len(brain))
            last = signal
    if not np.isfinite(global_signal).all():
        raise ValueError("parts of the volumes are missing")
    # All of it commutes with the linear code of the stored values, so only results are decoded.
    scale = float(bold.attrs.get("scale_factor", 1.0))
    offset = float(bold.attrs.get("add_offset", 0.0))
    carpet -= carpet.mean(axis=1, keepdims=True)
    carpet /= np.maximum(carpet.std(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    seconds, step = volumes["time"].values.astype(float), float(volumes.attrs["repetition_time"])
    dvars[1:][np.diff(seconds) > 1.5 * step] = np.nan
    return Course(seconds, step, global_signal * scale + offset, dvars * scale, carpet, tissue)


def _sample_voxels(
    brain: npt.NDArray[np.intp], template: Template
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int8]]:
    """Evenly spaced voxels of each tissue, as positions in `brain`, and their tissues."""
    gray, white = (image.ravel()[brain] for image in (template.gray, template.white))
    tissue = np.select([(gray >= 0.5) & (gray >= white), white >= 0.5], [0, 1], 2).astype(np.int8)
    order = np.argsort(tissue, kind="stable")
    chosen = np.unique(np.linspace(0, len(order) - 1, min(CARPET_ROWS, len(order))).astype(int))
    return order[chosen], tissue[order[chosen]]


def find_spikes(dvars: Series) -> npt.NDArray[np.bool_]:
    """Volumes whose DVARS is far over that of the others, as `fsl_motion_outliers` finds them."""
    known = dvars[np.isfinite(dvars)]
    if not len(known):
        return np.zeros(len(dvars), dtype=bool)
    low, high = np.percentile(known, [25, 75])
    return np.nan_to_num(dvars, nan=-np.inf) > high + 1.5 * (high - low)


def image_metrics(images: Images, course: Course, template: Template) -> dict[str, float]:
    """Metrics from the volumes alone; percentages of a mean signal that is not above 0 are NaN."""
    mean_signal = float(np.nanmean(images.mean))
    percent = 100 / mean_signal if mean_signal > 0 else np.nan
    return {
        "dvars": _mean(course.dvars) * percent,
        "n_spikes": int(find_spikes(course.dvars).sum()),
        "tsnr": _median(images.tsnr),
        "temporal_sd": _median(images.sd) * percent,
        "global_sd": float(course.global_signal.std()) * percent,
        **overlap(images.mask, template),
        "correlation": registration_score(images.mean, images.mask, template, images.voxel_size),
    }


def motion_metrics(
    motion: Motion, threshold: float, repetition_time: float, minutes: float
) -> dict[str, float]:
    """Metrics from the confounds; all NaN where motion is unknown.

    Parameters
    ----------
    motion
        By the confounds.
    threshold
        FD in mm above which a volume has high motion. A volume without a value, as the first, has
        none.
    repetition_time
        Of the scan, in s.
    minutes
        Length of the run as it is stored, which may be shorter than the scan.
    """
    names = ("mean_fd", "median_fd", "max_fd", "high_motion", "minutes_low_motion", "std_dvars")
    if motion.fd is None:
        return dict.fromkeys(names, np.nan)
    high = np.nan_to_num(motion.fd) > threshold
    low_motion = float((~high).sum()) * repetition_time / 60
    values = (
        _mean(motion.fd),
        _median(motion.fd),
        float(np.nanmax(motion.fd)),
        float(high.mean()),
        min(low_motion, minutes),
        np.nan if motion.std_dvars is None else _mean(motion.std_dvars),
    )
    return dict(zip(names, values, strict=True))


def _mean(values: npt.NDArray[np.floating]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean(dtype=np.float64)) if known.size else np.nan


def _median(values: npt.NDArray[np.floating]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else np.nan
