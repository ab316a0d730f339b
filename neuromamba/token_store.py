"""Read windows of one run's tokens, as fast as memory can be copied, and normalise them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors

from neuromamba.files import InputError, read_json
from neuromamba.shards import ShardedArray
from neuromamba.store import get_array

Normalization = Literal["global", "voxel"]


class TokenStore:
    """Random windows of one run's tokens.

    Parameters
    ----------
    path
        A `tokens/{run}.zarr`.

    Attributes
    ----------
    attrs
        The store's attributes, among them `run`, `subject`, `repetition_time`, `affine`,
        `global_mean` and `global_sd`.
    n_time_patches, n_tokens, n_values
        Shape of the values.
    center
        (token, 3) float32 centre (x, y, z) of each patch in [0, 1].
    grid_index
        (token, 3) int16 number of each patch along x, y, z.
    mean, sd
        (token, patch**3) float32 statistics over time of each voxel in original units; NaN
        outside the brain mask.

    Raises
    ------
    InputError
        When the store is absent or damaged; damage to the values shows when they are read.

    Notes
    -----
    No file stays open, so that any number of stores can be kept. Reading a store costs nothing
    but its metadata until values or statistics are asked for.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.attrs: dict[str, Any] = read_json(self.path / "zarr.json")["attributes"]
        self._values = ShardedArray(self.path / "values")
        self.n_time_patches, self.n_tokens, self.n_values = self._values.layout.shape
        self.run: str = self.attrs["run"]
        self.subject: str = self.attrs["subject"]

    @cached_property
    def center(self) -> npt.NDArray[np.float32]:
        return self._read("center")

    @cached_property
    def grid_index(self) -> npt.NDArray[np.int16]:
        return self._read("grid_index")

    @cached_property
    def mean(self) -> npt.NDArray[np.float32]:
        return self._read("mean")

    @cached_property
    def sd(self) -> npt.NDArray[np.float32]:
        return self._read("sd")

    def window(self, start_patch: int, n_patches: int) -> npt.NDArray[np.float16]:
        """Copy `n_patches` time patches: (time patch, token, value) float16 in stored units.

        A value is `stored * scale_factor + add_offset`, NaN outside the brain mask.
        """
        out = np.empty((n_patches, self.n_tokens, self.n_values), dtype=np.float16)
        self._values.read(start_patch, out)
        return out

    def normalized(
        self, start_patch: int, n_patches: int, normalization: Normalization
    ) -> npt.NDArray[np.float32]:
        """Copy a window in units of SD: (time patch, token, value) float32, 0 outside the brain.

        Parameters
        ----------
        start_patch, n_patches
            The window.
        normalization
            `global`: minus the run's mean over brain and time, divided by its SD. `voxel`: minus
            each voxel's own mean over time, divided by its own SD.
        """
        stored = self.window(start_patch, n_patches)
        out = np.empty(stored.shape, dtype=np.float32)
        for row, values in zip(out, stored.view(np.uint16), strict=True):
            self._decoded.take(values, out=row, mode="clip")
            if normalization == "voxel":
                gain, shift = self._voxel_code
                row *= gain
                row += shift
        return out

    def mean_normalized(self, normalization: Normalization) -> npt.NDArray[np.float32]:
        """What predicting each voxel's mean is in these units: (token, value) float32."""
        repeats = self.n_values // self.mean.shape[1]
        if normalization == "voxel":
            return np.zeros((self.n_tokens, self.n_values), dtype=np.float32)
        mean = (self.mean - self.attrs["global_mean"]) / self.attrs["global_sd"]
        return np.tile(np.nan_to_num(mean).astype(np.float32), (1, repeats))

    @cached_property
    def _decoded(self) -> npt.NDArray[np.float32]:
        """The `global` value of each of the 65536 float16 numbers; twice as fast as arithmetic."""
        stored = np.arange(2**16).astype(np.uint16).view(np.float16).astype(np.float64)
        attrs = self._values.layout.attrs
        scale, offset = attrs["scale_factor"], attrs["add_offset"]
        finite = np.where(np.isfinite(stored), stored, 0)
        values = (finite * scale + offset - self.attrs["global_mean"]) / self.attrs["global_sd"]
        return np.where(np.isfinite(stored), values, 0).astype(np.float32)

    @cached_property
    def _voxel_code(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """What leads from `global` units to `voxel` units; 0 and 0 outside the brain."""
        repeats = self.n_values // self.mean.shape[1]
        sd = self.sd.astype(np.float64)
        gain = np.nan_to_num(self.attrs["global_sd"] / sd)
        shift = np.nan_to_num((self.attrs["global_mean"] - self.mean) / sd)
        return (
            np.tile(gain, (1, repeats)).astype(np.float32),
            np.tile(shift, (1, repeats)).astype(np.float32),
        )

    def _read(self, name: str) -> npt.NDArray[Any]:
        try:
            return np.asarray(get_array(zarr.open_group(self.path, mode="r"), name)[...])
        except (zarr.errors.BaseZarrError, OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.path}: this token store is damaged ({error}); delete it and make it again"
            ) from error
