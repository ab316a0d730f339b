"""ROI series: the mean signal of each region of an atlas (or of a cube grid) and their correlation.

Design choices
--------------
- Every run of a dataset has the same ROIs in the same order. One of which nothing, or less than
  `rois.min_coverage`, lies in a run's brain mask is NaN there, never 0; how much of each ROI
  does is stored as `coverage`. Who compares subjects has to deal with such gaps.
- The atlas meets the grid through the two affines, nearest neighbour, so that it may have any
  resolution and any orientation, as long as it is in the run's space or one near it
  (`neuromamba.atlases`), which is stored.
- Without an atlas the ROIs are cubes of the grid, so that no dataset needs one.
- The volumes are read some at a time: memory does not grow with the run's length.
"""

from __future__ import annotations

import errno
import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import xarray

import neuromamba
from neuromamba.atlases import compare_spaces, is_named, open_atlas
from neuromamba.config import Config, Rois
from neuromamba.contents import Contents
from neuromamba.files import InputError, digest_json
from neuromamba.layout import Layout
from neuromamba.parcellation import Parcellation, count_voxels, make_cubes, resample_labels
from neuromamba.roi_store import tabulate, write_rois
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.store import READ_VOLUMES, finished

MANIFEST_FACTS = ("key", "n_rois", "n_missing", "tsnr")


def roi_series(
    volumes: xarray.Dataset, parcellation: Parcellation, step: int, min_coverage: float = 0.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Mean signal of each ROI's brain voxels, in the scan's original units.

    Parameters
    ----------
    volumes
        One run, opened with `mask_and_scale=False`; see `neuromamba.volumes`.
    parcellation, step
        The ROIs, and the number of volumes to read at a time.
    min_coverage
        Share of a ROI's voxels that must lie in the brain mask.

    Returns
    -------
    series : (time, roi) float32
        NaN for a ROI that the brain mask covers too little, or not at all.
    coverage : (roi,) float32
        Share of each ROI's voxels that lie in the brain mask; 0 also for a ROI that is smaller than
        the grid can show.

    Raises
    ------
    InputError
        When no ROI has any brain voxel (the atlas is in another space), or none has enough.
    """
    mask = volumes["mask"].values.astype(bool)
    affine = np.asarray(volumes.attrs["affine"], dtype=np.float64)
    grid = resample_labels(parcellation, mask.T.shape, affine).T
    voxels = np.flatnonzero(mask & (grid >= 0))
    run = volumes.attrs.get("run", "this run")
    if not len(voxels):
        raise InputError(
            f"atlas {parcellation.name}: no region lies in the brain mask of {run}; is the atlas "
            f"in the space {volumes.attrs.get('space', 'of the run')}?"
        )
    roi = grid.ravel()[voxels]
    count = np.bincount(roi, minlength=len(parcellation.labels))
    whole = count_voxels(parcellation, affine)
    coverage = np.minimum(count / np.maximum(whole, 1), 1).astype(np.float32)
    absent = (count == 0) | (coverage < min_coverage)
    if absent.all():
        raise InputError(
            f"atlas {parcellation.name}: the brain mask of {run} covers at most "
            f"{coverage.max():.0%} of a region, less than rois.min_coverage = {min_coverage:g}; "
            "lower that setting, or leave the run out"
        )
    series = _means(volumes["bold"], voxels, roi, count, step)
    series[:, absent] = np.nan
    return series, coverage


def _means(
    bold: xarray.DataArray,
    voxels: npt.NDArray[np.intp],
    roi: npt.NDArray[np.int32],
    count: npt.NDArray[np.int_],
    step: int,
) -> npt.NDArray[np.float32]:
    """Mean signal of the `voxels` of each `roi`, which has `count` of them: (time, roi)."""
    weight = (1 / np.maximum(count, 1))[roi].astype(np.float32)
    mean = scipy.sparse.csr_array(
        (weight, (roi, np.arange(len(voxels)))), shape=(len(count), len(voxels))
    )
    series = np.empty((bold.sizes["time"], len(count)), dtype=np.float32)
    for start in range(0, len(series), step):
        frames = bold[start : start + step].values
        brain = frames.reshape(len(frames), -1)[:, voxels].astype(np.float32)
        series[start : start + step] = (mean @ brain.T).T
    # The mean commutes with the affine code of the stored values, so only the means are decoded.
    series *= np.float32(bold.attrs.get("scale_factor", 1.0))
    series += np.float32(bold.attrs.get("add_offset", 0.0))
    return series


def make_rois(
    source: Path, target: Path, parcellation: Parcellation, step: int, rois: Rois
) -> dict[str, Any]:
    """Write the ROI series and FC of one run's volumes, unless they are there already.

    Returns
    -------
    dict
        `key`, which tells what the store was made from; `n_rois`, ROIs with a signal in this run;
        `n_missing`, those without; `tsnr`, the median of mean / SD over the brain's voxels.

    Raises
    ------
    InputError
        When the atlas does not meet the brain, or the volumes cannot be read.
    """
    try:
        volumes = xarray.open_zarr(source, chunks=None, mask_and_scale=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{source}: not a readable volumes store ({error})") from None
    with volumes:
        settings = rois.model_dump(mode="json", exclude={"cube"})
        key = digest_json([code_of("rois"), volumes.attrs["key"], parcellation.key, settings])
        attributes = finished(target, key)
        if attributes is None:
            series, coverage = roi_series(volumes, parcellation, step, rois.min_coverage)
            missing = int(np.isnan(series[0]).sum())
            attributes = {
                **_about_atlas(parcellation, volumes.attrs.get("space")),
                **{name: volumes.attrs.get(name) for name in ("run", "subject", "space")},
                "repetition_time": float(volumes.attrs["repetition_time"]),
                "connectivity": list(rois.connectivity),
                "min_coverage": rois.min_coverage,
                "n_rois": series.shape[1] - missing,
                "n_missing": missing,
                "tsnr": _tsnr(volumes),
                "neuromamba_version": neuromamba.__version__,
                "key": key,
            }
            data = tabulate(series, coverage, volumes["time"].values, parcellation.labels, rois)
            write_rois(target, data, attributes)
    return {name: attributes[name] for name in MANIFEST_FACTS}


def _about_atlas(parcellation: Parcellation, space: str | None) -> dict[str, Any]:
    return {
        "atlas": parcellation.name,
        "atlas_sha256": parcellation.sha256,
        "atlas_space": parcellation.space,
        "atlas_names": parcellation.names_from,
        "atlas_note": compare_spaces(parcellation, space) if space else None,
    }


def _tsnr(volumes: xarray.Dataset) -> float:
    mask = volumes["mask"].values.astype(bool)
    mean, sd = volumes["mean"].values[mask], volumes["sd"].values[mask]
    return float(np.median(mean[sd > 0] / sd[sd > 0]))


def run_rois(config: Config, dataset: str, batch: int) -> None:
    """Make `rois/{run}.zarr` for each run of a batch whose volumes were made, and the manifest.

    Raises
    ------
    InputError
        When the atlas is unusable, or too many runs are (`compute.max_excluded`).
    """
    layout = Layout.of(config, dataset)
    runs = usable_runs([layout.manifest("volumes", batch)])
    known = _atlas_of(config, dataset)
    manifest = layout.manifest("rois", batch)
    contents = Contents(layout, "rois", batch)

    def make(run: str) -> dict[str, Any]:
        source = layout.array("volumes", run)
        if not known:
            known.append(_cubes_of(source, config))
        target = layout.array("rois", run)
        facts = make_rois(source, target, known[0], READ_VOLUMES, config.rois)
        return contents.add(run, facts)

    process_runs("rois", runs, make, manifest, config.compute.max_excluded)


def _atlas_of(config: Config, dataset: str) -> list[Parcellation]:
    """The atlas that a dataset names, if it names one."""
    settings = config.datasets[dataset]
    if settings.atlas is None:
        return []
    if not is_named(settings.atlas):
        return [open_atlas(settings.atlas, settings.space)]
    # The batches are separate jobs, and two that download the same file would spoil it.
    with _one_at_a_time(Layout.of(config, dataset).atlas_lock):
        return [open_atlas(settings.atlas, settings.space)]


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Hold a file's lock, which ends with this process; a file system without locks is told of."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            warnings.warn(
                f"{lock}: this file system has no locks; should the atlas not be there yet, run "
                "one batch of rois before the others",
                stacklevel=2,
            )
        yield


def _cubes_of(source: Path, config: Config) -> Parcellation:
    with xarray.open_zarr(source, chunks=None, mask_and_scale=False) as volumes:
        affine = np.asarray(volumes.attrs["affine"], dtype=np.float64)
    return make_cubes(config.volumes.shape, affine, config.rois.cube)
