"""The reference of a rigid alignment at one scale: look-up, and Gauss-Newton with Tukey's weights.

Sources: Gauss-Newton with a gain, Friston et al. 1995 (doi:10.1002/hbm.460030303); its weights,
Nestares and Heeger 2000 (doi:10.1002/(SICI)1522-2594(200005)43:5<705::AID-MRM13>3.0.CO;2-R).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial.transform import Rotation

from neuromamba.files import InputError

Floats = npt.NDArray[np.float32]
Pose = npt.NDArray[np.float64]

HEAD_RADIUS = 50.0
"""mm; a rotation counts as what it moves at this distance from the centre."""
TUKEY = 4.685
"""In robust SDs: residuals beyond have no weight."""
MAD_TO_SD = 1.4826
FWHM_TO_SD = 1 / np.sqrt(8 * np.log(2))
INFORMATION = 0.98
"""Share of the sum of squared gradients; voxels are taken from the steepest that hold it."""
MIN_POINTS = 100
MAX_STEPS = 30
SPREAD_EVERY = 4
"""The spread of residuals is that of every so many, which is as good and sooner found."""
UNSETTLED = 0.02
"""mm; where the last step was larger (and ten times the tolerance), there is no convergence."""


class NotAligned(Exception):
    """Why a volume could not be aligned."""


@dataclass(frozen=True)
class Scale:
    """How finely the images are looked at.

    `fwhm` (mm) is the smoothing, `spacing` (mm) the distance of the voxels that may take part,
    `n_points` how many do, and a step below `tolerance` (mm) is the last.
    """

    fwhm: float
    spacing: float
    n_points: int
    tolerance: float


class Level:
    """The reference at one scale, and the points of the volumes that are compared with it.

    Arrays are indexed (z, y, x); points and gradients are (x, y, z), in mm from the centre.
    """

    def __init__(self, image: Floats, linear: Pose, region: npt.NDArray[np.bool_], scale: Scale):
        self.scale = scale
        sizes = np.array(image.shape[::-1])
        voxel = np.linalg.norm(linear, axis=0)
        every = np.maximum(1, np.round(scale.spacing / voxel)).astype(int)
        if scale.fwhm:
            sds = scale.fwhm * FWHM_TO_SD / voxel
            self.smoothers = [_smoother(*axis) for axis in zip(sizes, sds, every, strict=True)]
            image = ndimage.gaussian_filter(image, sds[::-1], mode="nearest", truncate=3)
        self.unit = np.float32(1 / np.std(image[region]))
        self.shape = image.shape
        self.table = _values_and_gradients(image * self.unit)
        row, plane = image.shape[2], image.shape[1] * image.shape[2]
        self.steps = np.array([0, row, plane, plane + row], dtype=np.int32)
        self.region = region.ravel().astype(np.float32)
        self.to_index = np.linalg.inv(linear).astype(np.float32)
        self.centre = ((sizes - 1) / 2).astype(np.float32)[:, None]
        self.last = (sizes - 1).astype(np.float32)[:, None]
        self._choose(sizes, every, linear)

    def _choose(self, sizes: npt.NDArray[np.intp], every: npt.NDArray[np.intp], linear: Pose):
        """Take voxels with steep gradients, away from the edges of the grid.

        Evenly from all that tell something: the very steepest are those that interpolation serves
        worst.
        """
        grid = [np.arange(0, n, step) for n, step in zip(sizes, every, strict=True)]
        z, y, x = (at.ravel() for at in np.meshgrid(*grid[::-1], indexing="ij"))
        index = np.stack([x, y, z])
        number = np.ravel_multi_index((z, y, x), self.shape)
        inner = ((index > 0) & (index < sizes[:, None] - 1)).all(axis=0)
        steep = np.linalg.norm(self.table[number, 1:4] @ self.to_index, axis=1)
        steep *= inner * self.region[number]
        order = np.argsort(-steep, kind="stable")
        held = np.cumsum(np.square(steep[order], dtype=np.float64))
        telling = np.sort(order[: np.count_nonzero(held < INFORMATION * held[-1])])
        self.place = telling[:: max(1, round(len(telling) / self.scale.n_points))]
        if len(self.place) < MIN_POINTS:
            raise InputError(
                f"the reference of the motion has {len(self.place)} voxels with structure at "
                f"{self.scale.spacing:g} mm; {MIN_POINTS} are needed: is it (or its mask) empty?"
            )
        self.slices = z[self.place]
        self.points = (linear @ (index[:, self.place] - self.centre)).astype(np.float32)
        if not self.scale.fwhm:
            self.place = number[self.place]

    def take(self, image: Floats) -> Floats:
        """The values of a volume at the points."""
        if self.scale.fwhm:
            x, y, z = self.smoothers
            rows = (z @ image.reshape(len(image), -1)).reshape(-1, image.shape[2]) @ x.T
            image = np.asarray(y @ rows.reshape(len(z), -1, len(x)), dtype=np.float32)
        return image.ravel()[self.place] * self.unit

    def look_up(self, inverse: Pose) -> tuple[Floats, Floats, Floats, Floats]:
        """The reference where the points come from.

        Returns (point,) values, (3, point) gradients a mm, (3, point) places, and (point,) whether
        these are in the region (0 or 1).
        """
        motion = inverse.astype(np.float32)
        at = motion[:3, :3] @ self.points + motion[:3, 3:]
        index = self.to_index @ at + self.centre
        low = np.clip(np.floor(index), 0, self.last - 1)
        part = index - low
        inside = ((part >= 0) & (part <= 1)).all(axis=0)
        x, y, z = low.astype(np.int32)
        number = x + self.shape[2] * (y + self.shape[1] * z)
        low_low, high_low, low_high, high_high = (
            self._pair(number + step, part[0]) for step in self.steps
        )
        below = _between(low_low, high_low, part[1], 2)
        above = _between(low_high, high_high, part[1], 2)
        values, *gradients = _between(below, above, part[2], 3)
        return values, self.to_index.T @ np.stack(gradients), at, inside * self.region.take(number)

    def _pair(self, number: npt.NDArray[np.int32], part: Floats) -> Floats:
        """(4, point) between voxels and their neighbours along x."""
        both = np.ascontiguousarray(self.table.take(number, axis=0).T)
        return _between(both[:4], both[4:], part, 1)

    def likeness(self, points: Floats, used: npt.NDArray[np.bool_], inverse: Pose) -> float:
        """Correlation of a volume's points with the reference, of those that are used."""
        values, _, _, inside = self.look_up(inverse)
        return _correlation(points, values, inside * used)

    def solve(
        self, points: Floats, used: npt.NDArray[np.bool_], inverse: Pose
    ) -> tuple[Pose, float]:
        """Gauss-Newton from a first guess of the motion from the volume to the reference.

        Returns the motion, and the correlation of the images before the last step.
        """
        jacobian = np.empty((8, len(points)), dtype=np.float32)
        jacobian[7] = 1
        gain, offset, size = 0.0, 0.0, np.inf
        for _ in range(MAX_STEPS):
            values, gradients, at, inside = self.look_up(inverse)
            keep = inside * used
            if np.count_nonzero(keep) < MIN_POINTS:
                raise NotAligned("leaves the field of view")
            if not gain:
                gain = _first_gain(points[keep > 0], values[keep > 0])
            weight = keep * _tukey(points - np.float32(gain) * values - np.float32(offset), keep)
            jacobian[:3] = gradients
            jacobian[3:6] = _cross(at, gradients)
            jacobian[6] = values
            *step, gain, offset = _least_squares(jacobian, weight, points)
            if not (np.isfinite(gain) and gain > 0):
                raise NotAligned("does not follow the reference")
            move = np.array(step) / gain
            size = float(np.linalg.norm(move[:3]) + HEAD_RADIUS * np.linalg.norm(move[3:]))
            move *= min(1.0, max(self.scale.fwhm, 4.0) / size) if size else 1.0
            inverse = _motion(move) @ inverse
            if size < self.scale.tolerance:
                break
        if size > max(UNSETTLED, 10 * self.scale.tolerance):
            raise NotAligned(f"moves on after {MAX_STEPS} steps")
        return inverse, _correlation(points, values, keep)


def _smoother(n: int, sd: float, every: int) -> Floats:
    """(point, voxel) a Gaussian along one axis, at every so many voxels."""
    matrix = ndimage.gaussian_filter1d(np.eye(n), sd, axis=0, mode="nearest", truncate=3)
    return np.ascontiguousarray(matrix[::every], dtype=np.float32)


def _values_and_gradients(image: Floats) -> Floats:
    """(voxel, 8) value and three derivatives of each voxel, and those of the next one along x.

    Derivatives are those of the cubic spline, by index.
    """
    table = np.empty((*image.shape, 8), dtype=np.float32)
    table[..., 0] = image
    for axis in range(3):
        spline = ndimage.spline_filter1d(image, 3, axis=axis, mode="mirror")
        slope = ndimage.correlate1d(spline, [-0.5, 0, 0.5], axis=axis, mode="mirror")
        table[..., 3 - axis] = slope
    table[:, :, :-1, 4:] = table[:, :, 1:, :4]
    table[:, :, -1, 4:] = table[:, :, -1, :4]
    return table.reshape(-1, 8)


def _between(low: Floats, high: Floats, part: Floats, axis: int) -> Floats:
    """(4, point) values and derivatives part of the way along an axis.

    Linear, and for the values the slopes' difference takes off the error of second order, so that
    eight voxels do what a cubic spline needs 64 for.
    """
    between = high - low
    correction = np.float32(0.5) * part * (1 - part) * between[axis]
    between *= part
    between += low
    between[0] -= correction
    return between


def _first_gain(points: Floats, values: Floats) -> float:
    if np.ptp(points) == 0:
        raise NotAligned("is constant")
    return float(np.median(points) / np.median(values))


def _correlation(points: Floats, values: Floats, keep: Floats) -> float:
    ours, theirs = (of[keep > 0] for of in (points, values))
    if len(ours) < MIN_POINTS:
        return 0.0
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    norms = np.linalg.norm(ours) * np.linalg.norm(theirs)
    return float(ours @ theirs / norms) if norms > 0 else 0.0


def _tukey(residual: Floats, keep: Floats) -> Floats:
    size = np.abs(residual)
    sd = MAD_TO_SD * float(np.median(size[keep > 0][:: SPREAD_EVERY if len(size) > 4000 else 1]))
    share = np.minimum(size / np.float32(TUKEY * sd + 1e-6), 1)
    return (1 - share * share) ** 2


def _cross(a: Floats, b: Floats) -> Floats:
    return np.stack(
        [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]
    )


def _least_squares(rows: Floats, weight: Floats, values: Floats) -> npt.NDArray[np.float64]:
    weighted = rows * weight
    normal = (weighted @ rows.T).astype(np.float64)
    unit = 1 / np.sqrt(np.diag(normal) + 1e-12)
    # A direction that nothing is known about stays where it is.
    scaled = normal * unit[:, None] * unit + 1e-6 * np.eye(len(rows))
    return unit * np.linalg.solve(scaled, unit * (weighted @ values))


def _motion(move: npt.NDArray[np.float64]) -> Pose:
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(move[3:]).as_matrix()
    pose[:3, 3] = move[:3]
    return pose
