"""What a forecast has to beat: persistence, the mean of the context, and a linear autoregression.

Design choices (ours)
---------------------
- All three are linear in the known values of the voxel itself: persistence copies the last known
  volume, the context mean averages all, and the autoregression weighs the last p and that mean.
- The autoregression has one set of weights for each volume ahead (a direct forecast, which is never
  fed back), shared by all voxels, from least squares over the training subjects. It holds the other
  two as special cases, and 0, which is each voxel's mean over the run where values are normalised
  voxel by voxel. The order p is the one with the lowest error on the validation subjects.
- A linear forecast's squared error follows from the second moments of the volumes of a window, a
  matrix with one row for each volume. So windows are read once, runs and subjects count the same
  however long or many they are, and every order is tried at no cost.
- Background voxels do not count, as forecasting them is no achievement.

Dimensions in names: N patches, T time patches, V values of a patch, K known and F future volumes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]


def brain_voxels(tokens_NTV: Tensor, time_patch: int) -> Tensor:
    """Which voxels of each patch vary or are not 0 within a window: (N, V / time_patch) bool.

    The others are background, which is 0 throughout.
    """
    return (tokens_NTV.unflatten(-1, (time_patch, -1)) != 0).any(2).any(1)


def brain_series(tokens_NTV: Tensor, time_patch: int) -> Tensor:
    """The values of each brain voxel over the volumes of windows: (voxel, volume).

    `time_patch` is the number of volumes of a time patch, which are slowest in V.
    """
    series_NTSV = tokens_NTV.unflatten(-1, (time_patch, -1))
    return series_NTSV.flatten(1, 2).transpose(1, 2)[brain_voxels(tokens_NTV, time_patch)]


def second_moments(series: Tensor, known: int) -> Floats:
    """Mean products of the volumes of a window over voxels.

    Parameters
    ----------
    series
        (voxel, volume); the first `known` volumes are the context.

    Returns
    -------
    (K + F, K + F) float64
        Rows and columns are the known volumes, the newest first, then the future ones.
    """
    ordered = torch.cat([series[:, :known].flip(1), series[:, known:]], dim=1).double()
    return (ordered.T @ ordered / len(ordered)).cpu().numpy()


def squared_error(moments: Floats, weights_KF: Floats) -> Floats:
    """Mean squared error of the linear forecast with these weights: (F,) float64."""
    known = len(weights_KF)
    among, across = moments[:known, :known], moments[:known, known:]
    truth = np.diag(moments[known:, known:])
    return truth - 2 * (weights_KF * across).sum(0) + (weights_KF * (among @ weights_KF)).sum(0)


def persistence(known: int, future: int) -> Floats:
    """Weights (K, F) that copy the last known volume."""
    return np.outer(np.arange(known) == 0, np.ones(future))


def context_mean(known: int, future: int) -> Floats:
    """Weights (K, F) that average the known volumes."""
    return np.full((known, future), 1 / known)


@dataclass(frozen=True)
class Autoregression:
    """A linear autoregression and how it was chosen.

    Attributes
    ----------
    weights
        (K, F) of the known volumes, the newest first, the context mean's share among them.
    order
        p, how many known volumes count by themselves.
    validation
        Mean squared error on the validation subjects, by order.
    """

    weights: Floats
    order: int
    validation: list[float]


def fit_autoregression(train: Floats, validation: Floats, known: int) -> Autoregression:
    """Fit every order to the moments of the training subjects, and choose by the validation ones.

    Parameters
    ----------
    train, validation
        `second_moments`, averaged over windows, then runs, then subjects.
    known
        K. The order is at most K - 1: the last known volume follows from the others and the mean.
    """
    among, across = train[:known, :known], train[:known, known:]
    tried = []
    for order in range(known):
        # What is regressed on, as weights of the known volumes: the last ones, and the mean of all.
        read = np.column_stack([np.eye(known)[:, :order], np.full(known, 1 / known)])
        tried.append(read @ np.linalg.lstsq(read.T @ among @ read, read.T @ across, rcond=None)[0])
    errors = [float(squared_error(validation, weights).mean()) for weights in tried]
    order = int(np.argmin(errors))
    return Autoregression(tried[order], order, errors)
