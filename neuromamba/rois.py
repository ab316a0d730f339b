"""ROI series: the mean signal of each region of an atlas (or of a cube grid) and their correlation.

Design choices
--------------
- Every run of a dataset has the same ROIs in the same order. One without a voxel in a run's brain
  mask is NaN there; who compares subjects leaves such ROIs out.
- The atlas meets the grid through the two affines, nearest neighbour, so that it may have any
  resolution and any orientation, as long as it is in the run's space.
- Without an atlas the ROIs are cubes of the grid, so that no dataset needs one.
- The volumes are read some at a time: memory does not grow with the run's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import scipy.sparse
import xarray
import zarr

import neuromamba
from neuromamba.config import Config
from neuromamba.contents import Contents
from neuromamba.files import InputError, digest_file, digest_json
from neuromamba.layout import Layout
from neuromamba.source_code import code_of
from neuromamba.stage import process_runs, usable_runs
from neuromamba.store import READ_VOLUMES, finish, finished, new_store


@dataclass(frozen=True)
class Parcellation:
    """Which voxels make up a ROI.

    Attributes
    ----------
    name
        File name of the atlas, or what the cubes are.
    sha256
        Digest of the atlas file; `None` for cubes.
    labels
        One name per ROI, in the order of the `roi` axis.
    index
        (x, y, z) int32 on the atlas's own grid: number of the ROI, counted from 0, or -1 outside.
    affine
        (4, 4) voxel indices of `index` to mm.
    """

    name: str
    sha256: str | None
    labels: list[str]
    index: npt.NDArray[np.int32]
    affine: npt.NDArray[np.float64]

    @property
    def key(self) -> str:
        """Changes when the ROIs do."""
        return digest_json([self.name, self.sha256, self.labels, list(self.index.shape)])


def read_atlas(path: Path | str) -> Parcellation:
    """Read a labelled NIfTI: whole numbers, 0 for background.

    Raises
    ------
    InputError
        When the file is absent or unreadable, is not one 3D image, or holds no whole numbers
        (a probabilistic atlas), or no label at all.
    """
    path = Path(path)
    try:
        image: Any = nibabel.load(path)
        data = np.asanyarray(image.dataobj)
    except FileNotFoundError:
        raise InputError(
            f"{path}: the atlas does not exist; correct the dataset's `atlas`"
        ) from None
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{path}: the atlas is not a readable NIfTI ({error})") from None
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputError(
            f"{path}: the atlas has shape {data.shape}; give one 3D image of labels, "
            "not one map per region"
        )
    if not np.isfinite(data).all() or (data != np.round(data)).any() or (data < 0).any():
        raise InputError(f"{path}: an atlas holds whole numbers, 0 for background; this does not")
    values = np.unique(data)
    values = values[values > 0]
    if not len(values):
        raise InputError(f"{path}: the atlas holds no label above 0")
    index = np.searchsorted(values, data).astype(np.int32)
    index[data == 0] = -1
    labels = [str(int(value)) for value in values]
    return Parcellation(path.name, digest_file(path), labels, index, np.asarray(image.affine))


def make_cubes(
    shape: tuple[int, int, int], affine: npt.NDArray[np.float64], edge: float
) -> Parcellation:
    """Cut a grid of `shape` voxels into cubes of `edge` mm that start at its first voxel.

    Where the voxel size does not divide `edge`, neighbouring cubes differ by one voxel.
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    cells = [
        np.floor(np.arange(n) * size / edge + 1e-6) for n, size in zip(shape, sizes, strict=True)
    ]
    counts = [int(cell[-1]) + 1 for cell in cells]
    x, y, z = np.meshgrid(*cells, indexing="ij")
    index = ((x * counts[1] + y) * counts[2] + z).astype(np.int32)
    labels = [f"x{i}-y{j}-z{k}" for i, j, k in np.ndindex(*counts)]
    return Parcellation(f"cubes of {edge:g} mm", None, labels, index, affine)


def resample_labels(
    parcellation: Parcellation, shape: tuple[int, int, int], affine: npt.NDArray[np.float64]
) -> npt.NDArray[np.int32]:
    """Carry the ROI numbers to another grid, nearest neighbour, through both affines.

    Returns
    -------
    (x, y, z) int32
        ROI number of each voxel of the grid, -1 outside every ROI.
    """
    to_atlas = np.linalg.inv(parcellation.affine) @ affine
    voxels = np.indices(shape).reshape(3, -1)
    nearest = np.round(to_atlas[:3, :3] @ voxels + to_atlas[:3, 3:]).astype(np.int64)
    inside = ((nearest >= 0) & (nearest < np.array(parcellation.index.shape)[:, None])).all(axis=0)
    labels = np.full(voxels.shape[1], -1, dtype=np.int32)
    labels[inside] = parcellation.index[tuple(nearest[:, inside])]
    return labels.reshape(shape)


def roi_series(
    volumes: xarray.Dataset, parcellation: Parcellation, step: int
) -> npt.NDArray[np.float32]:
    """Mean signal of each ROI's brain voxels, in the scan's original units.

    Parameters
    ----------
    volumes
        One run, opened with `mask_and_scale=False`; see `neuromamba.volumes`.
    parcellation, step
        The ROIs, and the number of volumes to read at a time.

    Returns
    -------
    (time, roi) float32
        NaN for a ROI without a brain voxel.

    Raises
    ------
    InputError
        When no ROI has any brain voxel: the atlas is in another space.
    """
    mask = volumes["mask"].values.astype(bool)
    affine = np.asarray(volumes.attrs["affine"], dtype=np.float64)
    grid = resample_labels(parcellation, mask.T.shape, affine).T
    voxels = np.flatnonzero(mask & (grid >= 0))
    if not len(voxels):
        raise InputError(
            f"atlas {parcellation.name}: no region lies in the brain mask of "
            f"{volumes.attrs.get('run', 'this run')}; is the atlas in the space "
            f"{volumes.attrs.get('space', 'of the run')}?"
        )
    roi = grid.ravel()[voxels]
    count = np.bincount(roi, minlength=len(parcellation.labels))
    weight = (1 / np.maximum(count, 1))[roi].astype(np.float32)
    mean = scipy.sparse.csr_array(
        (weight, (roi, np.arange(len(voxels)))), shape=(len(count), len(voxels))
    )
    bold = volumes["bold"]
    series = np.empty((bold.sizes["time"], len(count)), dtype=np.float32)
    for start in range(0, len(series), step):
        frames = bold[start : start + step].values
        brain = frames.reshape(len(frames), -1)[:, voxels].astype(np.float32)
        series[start : start + step] = (mean @ brain.T).T
    # The mean commutes with the affine code of the stored values, so only the means are decoded.
    series *= np.float32(bold.attrs.get("scale_factor", 1.0))
    series += np.float32(bold.attrs.get("add_offset", 0.0))
    series[:, count == 0] = np.nan
    return series


def connectivity(series: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Pearson correlation of ROI series: (time, roi) -> (roi, roi) float32.

    Rows and columns of a ROI that is missing or constant are NaN, its diagonal too.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(series, rowvar=False)).astype(np.float32)


def make_rois(source: Path, target: Path, parcellation: Parcellation, step: int) -> dict[str, Any]:
    """Write the ROI series and FC of one run's volumes, unless they are there already.

    Returns
    -------
    dict
        `key`, which tells what the store was made from; `n_rois`, ROIs with a brain voxel in this
        run; `n_missing`, those without; `tsnr`, the median of mean / SD over the brain's voxels.

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
        key = digest_json([code_of("rois"), volumes.attrs["key"], parcellation.key])
        attributes = finished(target, key)
        if attributes is None:
            series = roi_series(volumes, parcellation, step)
            missing = int(np.isnan(series[0]).sum())
            attributes = {
                "atlas": parcellation.name,
                "atlas_sha256": parcellation.sha256,
                **{name: volumes.attrs.get(name) for name in ("run", "subject", "space")},
                "repetition_time": float(volumes.attrs["repetition_time"]),
                "n_rois": series.shape[1] - missing,
                "n_missing": missing,
                "tsnr": _tsnr(volumes),
                "neuromamba_version": neuromamba.__version__,
                "key": key,
            }
            _write(target, series, parcellation.labels, attributes)
    return {name: attributes[name] for name in ("key", "n_rois", "n_missing", "tsnr")}


def _tsnr(volumes: xarray.Dataset) -> float:
    mask = volumes["mask"].values.astype(bool)
    mean, sd = volumes["mean"].values[mask], volumes["sd"].values[mask]
    return float(np.median(mean[sd > 0] / sd[sd > 0]))


def _write(
    target: Path,
    series: npt.NDArray[np.float32],
    labels: list[str],
    attributes: dict[str, Any],
) -> None:
    # `object` becomes Zarr's text of any length; numpy's fixed length has no specification.
    names = np.array(labels, dtype=object)
    time = np.arange(len(series)) * attributes["repetition_time"]
    rois = xarray.Dataset(
        {
            "timeseries": (("time", "roi"), series, {"long_name": "mean signal of the ROI"}),
            "fc": (("roi", "roi_2"), connectivity(series), {"long_name": "Pearson correlation"}),
        },
        coords={"time": ("time", time, {"units": "s"}), "roi": names, "roi_2": names},
    )
    whole = {name: {"chunks": rois[name].shape} for name in ("timeseries", "fc")}
    with new_store(target, attributes["key"]) as temporary:
        rois.to_zarr(temporary, zarr_format=3, consolidated=False, encoding=whole)
        finish(zarr.open_group(temporary), attributes)


def run_rois(config: Config, dataset: str, batch: int) -> None:
    """Make `rois/{run}.zarr` for each run of a batch whose volumes were made, and the manifest.

    Raises
    ------
    InputError
        When the atlas is unusable, or too many runs are (`compute.max_excluded`).
    """
    layout = Layout.of(config, dataset)
    atlas = config.datasets[dataset].atlas
    runs = usable_runs([layout.manifest("volumes", batch)])
    known: list[Parcellation] = [read_atlas(atlas)] if atlas else []
    manifest = layout.manifest("rois", batch)
    contents = Contents(layout, "rois", batch)

    def make(run: str) -> dict[str, Any]:
        source = layout.array("volumes", run)
        if not known:
            known.append(_cubes_of(source, config))
        target = layout.array("rois", run)
        facts = make_rois(source, target, known[0], READ_VOLUMES)
        return contents.add(run, facts)

    process_runs("rois", runs, make, manifest, config.compute.max_excluded)


def _cubes_of(source: Path, config: Config) -> Parcellation:
    with xarray.open_zarr(source, chunks=None, mask_and_scale=False) as volumes:
        affine = np.asarray(volumes.attrs["affine"], dtype=np.float64)
    return make_cubes(config.volumes.shape, affine, config.rois.cube)
