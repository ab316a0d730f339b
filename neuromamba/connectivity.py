"""Functional connectivity (FC) of ROI series: Pearson and partial correlation, as r or Fisher's z.

Design choices
--------------
- Pearson correlation is the plain estimate, not a shrunk one.
- Partial correlation needs an inverse, which the plain covariance of 400 ROIs and 150 volumes has
  not: the precision is that of the Ledoit-Wolf covariance, as nilearn estimates it. Series are
  standardised first, so that how much is shrunk does not depend on a ROI's amplitude.
- A ROI that is missing (NaN) or constant has no correlation: its row and column are NaN, its
  diagonal too, and partial correlation conditions on the other ROIs alone.
- Fisher's z of 1 is infinite, so r is clipped to +-`LARGEST_R` first: the diagonal is 6.1 then.

Sources: Ledoit and Wolf 2004 (doi:10.1016/S0047-259X(03)00096-4), by
`nilearn.connectome.ConnectivityMeasure`; Varoquaux and Craddock 2013
(doi:10.1016/j.neuroimage.2013.04.007).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import xarray

from neuromamba.excerpts import Excerpt, varies
from neuromamba.files import InputError

VARIABLES = {"pearson": "fc", "partial": "fc_partial"}
"""What each kind of connectivity is called in a ROI store."""
ESTIMATORS = {
    "pearson": "Pearson correlation",
    "partial": "partial correlation, precision of the Ledoit-Wolf shrunk covariance",
}
LARGEST_R = 0.99999


def connectivity(
    series: npt.NDArray[np.floating], kind: str = "pearson"
) -> npt.NDArray[np.float32]:
    """Correlation of ROI series: (time, roi) -> (roi, roi) float32.

    Parameters
    ----------
    series
        NaN in the columns of missing ROIs.
    kind
        A key of `VARIABLES`.

    Returns
    -------
    (roi, roi) float32
        Rows and columns of a ROI that is missing or constant are NaN, its diagonal too.
    """
    present = varies(series)
    matrix = np.full((series.shape[1],) * 2, np.nan, dtype=np.float32)
    if present.any():
        found = {"pearson": _pearson, "partial": _partial}[kind](series[:, present])
        matrix[np.ix_(present, present)] = found
    return matrix


def fisher_z(correlation: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Fisher's z of correlations, which are clipped to +-`LARGEST_R`; NaN stays."""
    return np.arctanh(np.clip(correlation, -LARGEST_R, LARGEST_R))


def read_z(store: Path | Excerpt, kind: str | None = None) -> tuple[str, npt.NDArray[np.float64]]:
    """A kind of connectivity of a ROI store (the first by default), and its Fisher z.

    That of an excerpt is computed from its series.

    Raises
    ------
    InputError
        When the store is unreadable, of an older version, or without this kind.
    """
    if isinstance(store, Excerpt):
        found = kind or store.connectivity
        return found, np.asarray(fisher_z(connectivity(store.read(), found)), dtype=np.float64)
    try:
        with xarray.open_zarr(store, chunks=None) as rois:
            found = kind or str(rois.attrs["connectivity"][0])
            fc = rois[VARIABLES[found]]
            values = fc.values.astype(np.float64)
            z = values if fc.attrs["fisher_z"] else fisher_z(values)
            return found, np.asarray(z, dtype=np.float64)
    except (FileNotFoundError, ValueError, KeyError) as error:
        if kind is not None:
            raise InputError(
                f"{store}: holds no {kind} connectivity ({error}); add {kind} to rois.connectivity "
                "and run rois"
            ) from None
        raise InputError(f"{store}: not a readable ROI store ({error}); run rois") from None


def _pearson(series: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    return np.atleast_2d(np.corrcoef(series.astype(np.float64), rowvar=False))


def _partial(series: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    if series.shape[1] == 1:
        return np.ones((1, 1))
    # Loading it takes seconds, which only those who ask for it are to wait for.
    from nilearn.connectome import ConnectivityMeasure

    values = series.astype(np.float64)
    scaled = (values - values.mean(axis=0)) / values.std(axis=0)
    return np.asarray(ConnectivityMeasure(kind="partial correlation").fit_transform([scaled])[0])
