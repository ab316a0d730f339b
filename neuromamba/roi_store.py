"""The stores of ROI series, `rois/{run}.zarr`: series, coverage and connectivity of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray
import zarr

from neuromamba.config import Rois
from neuromamba.connectivity import ESTIMATORS, VARIABLES, connectivity, fisher_z
from neuromamba.store import finish, new_store


def tabulate(
    series: npt.NDArray[np.float32],
    coverage: npt.NDArray[np.float32],
    time: npt.NDArray[np.floating],
    labels: list[str],
    rois: Rois,
) -> xarray.Dataset:
    """Series, coverage and connectivity of one run by name of ROI.

    Parameters
    ----------
    series
        (time, roi), NaN for a missing ROI.
    coverage
        (roi,) share of each ROI's voxels in the brain mask; NaN where it is not known.
    time
        (time,) s.
    labels
        Names of the ROIs.
    rois
        Which connectivity.
    """
    # `object` becomes Zarr's text of any length; numpy's fixed length has no specification.
    names = np.array(labels, dtype=object)
    share = "share of the ROI's voxels in the brain mask"
    variables: dict[str, Any] = {
        "timeseries": (("time", "roi"), series, {"long_name": "mean signal of the ROI"}),
        "coverage": ("roi", coverage, {"long_name": share}),
    }
    for kind in rois.connectivity:
        values = connectivity(series, kind)
        about = {"long_name": ESTIMATORS[kind], "fisher_z": rois.fisher_z}
        stored = fisher_z(values).astype(np.float32) if rois.fisher_z else values
        variables[VARIABLES[kind]] = (("roi", "roi_2"), stored, about)
    coords = {"time": ("time", time, {"units": "s"}), "roi": names, "roi_2": names}
    return xarray.Dataset(variables, coords)


def write_rois(target: Path, rois: xarray.Dataset, attributes: dict[str, Any]) -> None:
    """Write what `tabulate` has made, with attributes of which one is the `key`."""
    whole = {str(name): {"chunks": rois[name].shape} for name in rois.data_vars}
    with new_store(target, attributes["key"]) as temporary:
        rois.to_zarr(temporary, zarr_format=3, consolidated=False, encoding=whole)
        finish(zarr.open_group(temporary), attributes)
