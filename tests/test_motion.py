"""Motion: what moved the head is found again, in spite of noise, jumps and lost signal."""

from __future__ import annotations

import weakref

import nibabel
import numpy as np
import pytest
from moving_head import move_head, oblique, random_walk, straight

from neuromamba.files import InputError
from neuromamba.motion import (
    count_non_steady_state,
    framewise_displacement,
    make_reference,
    motion_matrices,
    rotation_centre,
    track_motion,
)

SHAPE = (52, 60, 34)
VOXEL = (4.0, 4.0, 4.4)
GRIDS = {
    "straight": (straight(VOXEL, SHAPE), SHAPE),
    "oblique, x to the left": (oblique(VOXEL, SHAPE), SHAPE),
    "thick slices": (straight((3.0, 3.0, 6.0), (64, 76, 26)), (64, 76, 26)),
}
AFFINE = GRIDS["oblique, x to the left"][0]
STEP = np.array([5, -4, 3, *np.deg2rad([5, -4, 3])])


def errors(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(t, 6) mm and degrees, against the first volume, which lies where the reference lies."""
    return np.abs(found - true) * np.array([1, 1, 1, *np.rad2deg([1, 1, 1])])


def displacement(found: np.ndarray, true: np.ndarray, affine: np.ndarray = AFFINE) -> np.ndarray:
    """(t,) mm: by how much points at 50 mm from the centre are misplaced, on average."""
    centre = rotation_centre(SHAPE, affine)
    points = np.concatenate([centre + 50 * np.eye(3), centre - 50 * np.eye(3)])
    points = np.concatenate([points, np.ones((6, 1))], axis=1).T
    apart = (motion_matrices(found, centre) - motion_matrices(true, centre)) @ points
    return np.linalg.norm(apart[:, :3], axis=1).mean(axis=1)


@pytest.fixture(scope="module")
def still() -> np.ndarray:
    """A volume of a head that lies where it should, without noise."""
    return move_head(np.zeros((1, 6)), AFFINE, SHAPE, tsnr=1e6)[0]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("tsnr", [50.0, 100.0])
def test_drift_and_walk_are_found(name: str, tsnr: float) -> None:
    affine, shape = GRIDS[name]
    true = random_walk(16)
    true[:, 1] += np.linspace(0, 2, 16)
    true[:, 3] -= np.linspace(0, np.deg2rad(2), 16)
    volumes = move_head(true, affine, shape, tsnr)
    found = track_motion(volumes, volumes[0], affine).parameters
    wrong = errors(found, true)
    assert wrong.mean() < 0.03
    assert wrong.max() < 0.15
    fd, true_fd = framewise_displacement(found)[1:], framewise_displacement(true)[1:]
    assert np.corrcoef(fd, true_fd)[0, 1] > 0.95
    assert abs(fd.mean() - true_fd.mean()) < 0.05


@pytest.mark.parametrize("axis", range(6))
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_jump_along_any_axis_is_found_without_a_start_nearby(
    still: np.ndarray, axis: int, sign: int
) -> None:
    true = np.zeros((1, 6))
    true[0, axis] = sign * (5 if axis < 3 else np.deg2rad(5))
    found = track_motion(move_head(true, AFFINE, SHAPE), still, AFFINE).parameters
    assert errors(found, true).max() < 0.1


def test_steps_and_jumps_there_and_back() -> None:
    true = random_walk(14, seed=1)
    true[5:] += STEP
    true[9] -= 1.5 * STEP
    volumes = move_head(true, AFFINE, SHAPE)
    wrong = errors(track_motion(volumes, volumes[0], AFFINE).parameters, true)
    assert wrong.mean() < 0.03
    assert wrong.max() < 0.15


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
def test_no_part_of_a_voxel_is_preferred(still: np.ndarray, part: float) -> None:
    true = np.zeros((4, 6))
    true[:, :3] = AFFINE[:3, :3] @ (part * np.ones(3))
    found = track_motion(move_head(true, AFFINE, SHAPE), still, AFFINE).parameters
    assert np.abs((found - true).mean(axis=0)[:3]).max() < 0.08  # mm, with voxels of 4 mm


def test_no_motion_is_none(still: np.ndarray) -> None:
    found = track_motion(np.stack([still, 3 * still]), still, AFFINE).parameters
    np.testing.assert_allclose(found, 0, atol=1e-5)


CHANGES = {
    "brighter": lambda volume: 1.4 * volume + 50,
    "a slab without signal": lambda volume: _slices(volume, range(9, 17), 0.0),
    "every other slice at a third": lambda volume: _slices(volume, range(0, 34, 2), 0.3),
    "a bright blob": lambda volume: _blob(volume, 4.0),
    "a hole": lambda volume: _blob(volume, 0.0),
    "slices with a gradient": lambda volume: volume * np.linspace(0.97, 1.03, SHAPE[2]),
}


def _slices(volume: np.ndarray, which: range, factor: float) -> np.ndarray:
    changed = volume.copy()
    changed[:, :, list(which)] *= factor
    return changed


def _blob(volume: np.ndarray, factor: float) -> np.ndarray:
    changed = volume.copy()
    changed[12:24, 20:36, 12:24] *= factor
    return changed


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_changes_of_the_signal_are_no_motion(still: np.ndarray, change: str, share: float) -> None:
    true = share * STEP[None]
    volume = CHANGES[change](move_head(true, AFFINE, SHAPE)[0]).astype(np.float32)
    found = track_motion([volume], still, AFFINE)
    assert found.unaligned == {}
    assert displacement(found.parameters, true)[0] < 0.2


def test_a_volume_does_not_depend_on_its_neighbours() -> None:
    true = random_walk(8, step=0.4, seed=2)
    volumes = move_head(true, AFFINE, SHAPE)
    forwards = track_motion(volumes, volumes[0], AFFINE).parameters
    backwards = track_motion(volumes[::-1], volumes[0], AFFINE).parameters[::-1]
    alone = np.concatenate([track_motion(v[None], volumes[0], AFFINE).parameters for v in volumes])
    # As near as the iteration comes to its end.
    assert displacement(forwards, backwards).max() < 0.01
    assert displacement(forwards, alone).max() < 0.01
    stream = track_motion(iter(volumes), volumes[0], AFFINE).parameters
    np.testing.assert_array_equal(forwards, stream)
    ordered = track_motion(np.asfortranarray(volumes), volumes[0], AFFINE).parameters
    np.testing.assert_array_equal(forwards, ordered)


def test_a_stream_is_not_held(still: np.ndarray) -> None:
    alive: set[int] = set()
    most = 0

    def stream(n: int):
        nonlocal most
        for number in range(n):
            volume = still + np.float32(number)
            alive.add(number)
            weakref.finalize(volume, alive.discard, number)
            most = max(most, len(alive))
            yield volume

    assert len(track_motion(stream(9), still, AFFINE).parameters) == 9
    assert most <= 2
    make_reference(stream(20), AFFINE, n_volumes=2)
    assert most <= 2  # it keeps copies, and of those at most 5


def test_only_the_mask_takes_part() -> None:
    true = 0.3 * STEP * np.array([[0], [1], [0]])
    volumes = move_head(true, AFFINE, SHAPE)
    mask = np.zeros(SHAPE, bool)
    mask[:, 30:] = True
    # Another object, that stays where it is and would pull, lies outside.
    bar = np.random.default_rng(0).uniform(0, 3000, (48, 12, 30))
    volumes[:, 2:-2, 2:14, 2:-2] = bar
    found = track_motion(volumes, volumes[0], AFFINE, mask).parameters
    assert displacement(found, true).max() < 0.1


def test_volumes_that_cannot_be_aligned_keep_the_last_motion_and_are_listed() -> None:
    true = random_walk(8, seed=3)
    volumes = move_head(true, AFFINE, SHAPE)
    volumes[0] = 5
    volumes[3, 20, 20, 20] = np.nan
    volumes[4] = np.random.default_rng(0).normal(500, 100, SHAPE)
    volumes[6] = 0
    motion = track_motion(volumes, volumes[1], AFFINE)
    assert set(motion.unaligned) == {0, 3, 4, 6}
    assert motion.unaligned[0] == "is constant"
    assert "not finite" in motion.unaligned[3]
    np.testing.assert_array_equal(motion.parameters[0], 0)
    np.testing.assert_array_equal(motion.parameters[3], motion.parameters[2])
    np.testing.assert_array_equal(motion.parameters[4], motion.parameters[2])
    np.testing.assert_array_equal(motion.parameters[6], motion.parameters[5])
    np.testing.assert_allclose(motion.parameters[7] - motion.parameters[1], true[7] - true[1],
                               atol=0.1)  # fmt: skip


def test_bad_input_raises_with_a_reason(still: np.ndarray) -> None:
    with pytest.raises(InputError, match="has shape"):
        track_motion(still[None, :-1], still, AFFINE)
    with pytest.raises(InputError, match="mask"):
        track_motion(still[None], still, AFFINE, np.ones((3, 3, 3), bool))
    with pytest.raises(InputError, match="empty"):
        track_motion(still[None], np.full(SHAPE, 7.0), AFFINE)
    with pytest.raises(InputError, match="not finite"):
        track_motion(still[None], np.full(SHAPE, np.nan), AFFINE)
    with pytest.raises(InputError, match="too thin"):
        track_motion(still[None, ..., :2], still[..., :2], AFFINE)
    with pytest.raises(InputError, match="none of 2 volumes"):
        track_motion(np.ones((2, *SHAPE)), still, AFFINE)
    with pytest.raises(InputError, match="no volume"):
        make_reference(np.full((2, *SHAPE), np.nan), AFFINE)
    assert track_motion(iter([]), still, AFFINE).parameters.shape == (0, 6)


def test_the_reference_is_sharp_and_robust(still: np.ndarray) -> None:
    true = random_walk(40, step=0.3, seed=4)
    true[10] += STEP
    volumes = move_head(true, AFFINE, SHAPE)
    volumes[:2] *= 1.5  # before the steady state
    volumes[20] = 0
    reference = make_reference(iter(volumes), AFFINE, n_volumes=8)
    assert reference.dtype == np.float32
    lies = track_motion(reference[None], still, AFFINE).parameters
    assert displacement(lies, true).min() < 0.1
    matching = move_head(lies, AFFINE, SHAPE, tsnr=1e6)[0]
    brain = matching > 400
    # A median without alignment is as far off as the noise of one volume, and more.
    assert np.abs(reference - matching)[brain].mean() < 8
    assert np.abs(np.median(volumes[2:], axis=0) - matching)[brain].mean() > 12
    found = track_motion(np.delete(volumes, 20, axis=0), reference, AFFINE).parameters
    kept = np.delete(true, 20, axis=0)
    fd, true_fd = framewise_displacement(found)[3:], framewise_displacement(kept)[3:]
    assert np.corrcoef(fd, true_fd)[0, 1] > 0.99


def test_non_steady_state_volumes_are_those_at_the_start() -> None:
    means = 100 + np.random.default_rng(0).standard_normal(80)
    assert count_non_steady_state(means) == 0
    means[:3] += [60, 30, 12]
    means[30] += 50
    assert count_non_steady_state(means) == 3
    assert count_non_steady_state(np.ones(9)) == 0


def test_matrices_are_as_documented() -> None:
    centre = np.array([10.0, -20.0, 30.0])
    quarter = np.pi / 2
    parameters = np.array([[1, 2, 3, 0, 0, 0], [0, 0, 0, 0, 0, quarter], [1, 0, 0, quarter, 0, 0]])
    moved = motion_matrices(parameters, centre) @ np.array([11, -20, 30, 1.0])
    np.testing.assert_allclose(moved[0, :3], [12, -18, 33])
    # Counter-clockwise about z, seen from above: from the right of the centre to its front.
    np.testing.assert_allclose(moved[1, :3], [10, -19, 30])
    np.testing.assert_allclose(moved[2, :3], [12, -20, 30])
    both = motion_matrices(np.array([[0, 0, 0, 0.1, 0.2, 0.3]]), np.zeros(3))[0, :3, :3]
    one = [motion_matrices(np.eye(6)[[3 + k]] * 0.1 * (k + 1), np.zeros(3))[0] for k in range(3)]
    np.testing.assert_allclose(both, (one[0] @ one[1] @ one[2])[:3, :3])


def test_framewise_displacement_is_powers() -> None:
    parameters = np.array([[0, 0, 0, 0, 0, 0], [1, -2, 0, 0, 0.01, 0], [1, -2, 0.5, 0, 0, 0]])
    np.testing.assert_allclose(framewise_displacement(parameters), [np.nan, 3.5, 1.0])
    assert framewise_displacement(parameters, radius=80)[1] == pytest.approx(3.8)
    assert framewise_displacement(np.zeros((0, 6))).shape == (0,)


def test_tiny_real_scans_are_aligned(real_data) -> None:
    (path,) = real_data.glob("haxby_25mm/sub-001_task-objectviewing_run-01_bold.nii.gz")
    scan = nibabel.load(path)
    volumes = np.moveaxis(np.asarray(scan.dataobj), -1, 0)
    motion = track_motion(volumes, make_reference(volumes, scan.affine), scan.affine)
    assert motion.unaligned == {}
    assert np.abs(motion.parameters).max() < 1


def test_a_real_scan_is_steadier_afterwards(real_data) -> None:
    (path,) = real_data.glob("studyforrest_sub02_bids/sub-02/func/*_bold.nii.gz")
    scan = nibabel.load(path)
    volumes = np.moveaxis(np.asarray(scan.dataobj[..., ::8]), -1, 0)
    motion = track_motion(volumes, make_reference(volumes, scan.affine), scan.affine)
    assert motion.unaligned == {}
    assert 0.05 < np.nanmean(framewise_displacement(motion.parameters)) < 0.5
    again = make_reference(volumes[:3], scan.affine)
    assert (
        displacement(track_motion(again[None], again, scan.affine).parameters, np.zeros((1, 6)))[0]
        < 0.01
    )
