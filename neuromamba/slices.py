"""Volumes as slices for a 2D autoencoder, and the slices' codes as 27 tokens a volume.

Source: TABLeT ("Can Natural Image Autoencoders Compactly Tokenize fMRI Volumes for Long-Range
Dynamics Modeling?", CVPR 2026).

Design choices
--------------
- Published: values are clamped at 0, divided by the scan's maximum and mapped to [-1, 1]; a volume
  is cut into slices along each of its axes; every slice is encoded to 3 x 3 places; of each axis,
  the codes of edge / 3 consecutive slices become one vector at each place of a 3 x 3 x 3 grid; the
  vectors of the three axes are brought to common (x, y, z) and concatenated.
- Ours: rows and columns of a slice along x are z and y, along y they are z and x, along z y and x.
  Tokens are in the order (z, y, x), x fastest; values in the order (axis x, y, z; slice in its
  group; channel).
- Ours: what lies outside the brain mask is -1, in `maximum` as in `voxel`. A slice without brain is
  then the same image in every volume of every run, and is encoded once.
- `voxel` is ours. The published scaling keeps all that differs between voxels, and the
  fluctuations in time, about 1 % of the signal, are left to the last bits of a code. Units of each
  voxel's own SD over time, clipped at +- `CLIP` and mapped to [-1, 1], leave out the anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors

from neuromamba.files import InputError
from neuromamba.store import READ_VOLUMES, get_array

GRID = 3
N_TOKENS = GRID**3
BACKGROUND = -1.0
CLIP = 4.0
"""SDs of a voxel over time at which `voxel` is clipped (our choice)."""

Floats = npt.NDArray[np.float32]
Places = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]


class RunVolumes:
    """The volumes of one run, in the range that a 2D autoencoder reads.

    Parameters
    ----------
    path
        A `volumes/{run}.zarr` on a cubic grid.
    normalization
        `maximum` (published) or `voxel`, see above.

    Attributes
    ----------
    run
        Its name.
    attrs
        The store's attributes.
    n_volumes, edge
        How many volumes there are, and voxels along each of their axes.
    places
        Of each axis x, y, z the numbers of the slices that hold brain.

    Raises
    ------
    InputError
        When the store is absent or damaged, its grid is no cube that 3 divides, or no value of the
        run is above 0 (`maximum`).
    """

    def __init__(self, path: Path, normalization: Literal["maximum", "voxel"]) -> None:
        self.path, self.normalization = path, normalization
        try:
            self._group = zarr.open_group(path, mode="r")
            self.attrs: dict[str, Any] = dict(self._group.attrs)
            self._bold = get_array(self._group, "bold")
            mask = np.asarray(get_array(self._group, "mask")[...])
            self.run = str(self.attrs["run"])
            if mask.sum() != self.attrs["n_voxels"]:  # zarr fills in for files that are missing
                raise ValueError("the brain mask is not the one that was written")
        except (zarr.errors.BaseZarrError, FileNotFoundError, KeyError, ValueError) as error:
            raise self._damaged(error) from error
        self.n_volumes, *grid = self._bold.shape
        self.edge = grid[0]
        if len(set(grid)) > 1 or self.edge % GRID:
            raise InputError(
                f"{path}: its grid is {' x '.join(map(str, grid))}; codes are made of cubes whose "
                "edge is a multiple of 3: change volumes.shape"
            )
        z, y, x = (mask.any(axis=tuple({0, 1, 2} - {axis})) for axis in range(3))
        self.places: Places = (np.flatnonzero(x), np.flatnonzero(y), np.flatnonzero(z))
        self._voxels = np.flatnonzero(mask)

    @property
    def n_slices(self) -> int:
        """Slices of a volume along all three axes."""
        return 3 * self.edge

    @property
    def n_empty(self) -> int:
        """Those of them without brain."""
        return self.n_slices - sum(map(len, self.places))

    def normalized(self, start: int, stop: int) -> Floats:
        """Volumes `start` to `stop - 1`: (volume, z, y, x) float32 in [-1, 1], no brain being -1.

        Raises
        ------
        InputError
            When parts of them are missing or damaged.
        """
        out = np.full((stop - start, self.edge**3), BACKGROUND, dtype=np.float32)
        values = self._read(start, stop)
        if self.normalization == "maximum":
            np.maximum(values, 0, out=values)
            values *= np.float32(2 / self._maximum)
            values -= 1
        else:
            mean, sd = self._statistics
            values -= mean
            values *= np.float32(1 / CLIP) / sd
            np.clip(values, -1, 1, out=values)
        out[:, self._voxels] = values
        return out.reshape(-1, self.edge, self.edge, self.edge)

    @cached_property
    def _code(self) -> tuple[np.float32, np.float32]:
        """Scale and offset of the stored values."""
        attrs: dict[str, Any] = dict(self._bold.attrs)
        return np.float32(attrs["scale_factor"]), np.float32(attrs["add_offset"])

    @cached_property
    def _maximum(self) -> float:
        """The largest value of the run, in original units: of all its volumes, as published."""
        starts = range(0, self.n_volumes, READ_VOLUMES)
        stops = (min(start + READ_VOLUMES, self.n_volumes) for start in starts)
        found = max(float(self._read(*part).max()) for part in zip(starts, stops, strict=True))
        if not found > 0:
            raise InputError(
                f"{self.run}: no value is above 0, so there is nothing to scale by the maximum; if "
                "the mean was taken out by denoising, set codes.normalization to voxel"
            )
        return found

    @cached_property
    def _statistics(self) -> tuple[Floats, Floats]:
        """Mean and SD over time of the brain's voxels, in original units."""
        try:
            both = [
                np.asarray(get_array(self._group, name)[...]).reshape(-1)[self._voxels]
                for name in ("mean", "sd")
            ]
        except (zarr.errors.BaseZarrError, KeyError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from error
        return both[0], both[1]

    def _read(self, start: int, stop: int) -> Floats:
        """(volume, voxel) of the brain in original units."""
        try:
            stored = np.asarray(self._bold[start:stop]).reshape(stop - start, -1)
        except (zarr.errors.BaseZarrError, OSError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from error
        values = stored[:, self._voxels].astype(np.float32)
        # A brain voxel is NaN only where zarr has filled in.
        if np.isnan(values[:, 0]).any():
            raise self._damaged(f"parts of volumes {start} to {stop - 1} are missing")
        values *= self._code[0]
        values += self._code[1]
        return values

    def _damaged(self, why: object) -> InputError:
        return InputError(
            f"{self.path}: these volumes are damaged ({why}); delete them and make them again"
        )


def cut(volumes: Floats, axis: int) -> Floats:
    """The slices of volumes along an axis (0: x, 1: y, 2: z).

    Parameters
    ----------
    volumes
        (volume, z, y, x).
    axis
        Across which to cut.

    Returns
    -------
    numpy.ndarray
        (volume, slice, row, column), a view: see above for what rows and columns are.
    """
    return np.moveaxis(volumes, 3 - axis, 1)


def encode_volumes(
    volumes: Floats, places: Places, encode: Callable[[Floats], Floats], empty: Floats
) -> npt.NDArray[np.float32]:
    """The tokens of some volumes.

    Parameters
    ----------
    volumes
        (volume, z, y, x) in [-1, 1].
    places
        Of each axis x, y, z the numbers of the slices to encode.
    encode
        From (slice, row, column) to codes (slice, channel, 3, 3), 3 x 3 being rows and columns.
    empty
        (channel, 3, 3) code of all other slices.

    Returns
    -------
    numpy.ndarray
        (volume, 27, value) float32, value = 3 axes x edge / 3 slices x channels; see above for the
        order.
    """
    n, edge = volumes.shape[:2]
    parts = [cut(volumes, axis)[:, numbers] for axis, numbers in enumerate(places)]
    codes = encode(np.concatenate([part.reshape(-1, edge, edge) for part in parts]))
    whole = np.empty((3, n, edge, *empty.shape), dtype=np.float32)
    whole[:] = empty
    first = 0
    for of_axis, part, numbers in zip(whole, parts, places, strict=True):
        count = n * part.shape[1]
        of_axis[:, numbers] = codes[first : first + count].reshape(n, -1, *empty.shape)
        first += count
    return join(list(whole))


def join(codes: Sequence[Floats]) -> Floats:
    """Tokens of the codes of all slices.

    Parameters
    ----------
    codes
        Of the axes x, y, z: (volume, slice, channel, row, column), rows and columns being 3 places.

    Returns
    -------
    numpy.ndarray
        (volume, 27, value) float32.
    """
    found = []
    # Where group g of slices, row r and column q of each axis go to in (z, y, x).
    for of_axis, order in zip(codes, ("nrqgsc", "nrgqsc", "ngrqsc"), strict=True):
        n, edge, channels = of_axis.shape[:3]
        grouped = of_axis.reshape(n, GRID, edge // GRID, channels, GRID, GRID)
        places = grouped.transpose(["ngscrq".index(letter) for letter in order])
        found.append(places.reshape(n, N_TOKENS, -1))
    return np.concatenate(found, axis=2)
