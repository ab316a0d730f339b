"""Volumes as slices and codes as tokens: against loops, and what normalisation leaves."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
import xarray
import zarr
from fabricate import GRID, write_volumes
from slice_data import EDGE, brain, write_run

from neuromamba.config import Slices
from neuromamba.files import InputError
from neuromamba.slice_autoencoder import SliceAutoencoder, lowest_frequencies, prime_factors
from neuromamba.slice_quality import cosine_transform, measure_codes, principal_components
from neuromamba.slices import CLIP, RunVolumes, cut, encode_volumes, join

CHANNELS, GROUP = 2, EDGE // 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("volumes") / "sub-01.zarr", "sub-01")


def original(store: Path) -> np.ndarray:
    """(time, z, y, x) BOLD in original units, float64."""
    bold = xarray.open_zarr(store, mask_and_scale=False)["bold"]
    return bold.values.astype(float) * bold.attrs["scale_factor"] + bold.attrs["add_offset"]


def weights() -> np.ndarray:
    """What each channel of a linear code makes of a block of GROUP x GROUP pixels."""
    return np.random.default_rng(1).standard_normal((CHANNELS, GROUP, GROUP))


def linear(images: np.ndarray) -> np.ndarray:
    blocks = images.reshape(len(images), 3, GROUP, 3, GROUP)
    return np.einsum("krpqs,cps->kcrq", blocks, weights()).astype(np.float32)


def tokens_by_loops(volume: np.ndarray) -> np.ndarray:
    """(27, value) of one volume (z, y, x), in float64, value by value."""
    found = np.zeros((27, 3 * GROUP * CHANNELS))
    kernel = weights()
    for z, y, x in product(range(3), repeat=3):
        for axis, s, c in product(range(3), range(GROUP), range(CHANNELS)):
            total = 0.0
            for i, j in product(range(GROUP), repeat=2):
                at = {  # the slice, and the row and column in it
                    0: (z * GROUP + i, y * GROUP + j, x * GROUP + s),
                    1: (z * GROUP + i, y * GROUP + s, x * GROUP + j),
                    2: (z * GROUP + s, y * GROUP + i, x * GROUP + j),
                }[axis]
                total += float(volume[at]) * kernel[c, i, j]
            found[z * 9 + y * 3 + x, (axis * GROUP + s) * CHANNELS + c] = total
    return found


def test_tokens_are_those_of_loops(store: Path) -> None:
    run = RunVolumes(store, "maximum")
    volumes = run.normalized(3, 5)
    empty = linear(np.full((1, EDGE, EDGE), -1, dtype=np.float32))[0]
    tokens = encode_volumes(volumes, run.places, linear, empty)
    assert tokens.shape == (2, 27, EDGE * CHANNELS)
    for found, volume in zip(tokens, volumes, strict=True):
        np.testing.assert_allclose(found, tokens_by_loops(volume), atol=2e-5)


def test_slices_are_taken_along_each_axis() -> None:
    volumes = np.arange(2 * EDGE**3, dtype=np.float32).reshape(2, EDGE, EDGE, EDGE)
    for axis, expected in enumerate((volumes[1, :, :, 4], volumes[1, :, 4], volumes[1, 4])):
        np.testing.assert_array_equal(cut(volumes, axis)[1, 4], expected)


def test_every_code_has_its_place_once() -> None:
    codes = np.arange(3 * EDGE * CHANNELS * 9, dtype=np.float32)
    tokens = join(list(codes.reshape(3, 1, EDGE, CHANNELS, 3, 3)))
    assert np.sort(tokens.ravel()).tolist() == codes.tolist()


def test_the_maximum_of_the_scan_is_1_and_what_is_below_0_or_no_brain_is_minus_1(
    tmp_path: Path,
) -> None:
    store = write_run(tmp_path / "v.zarr", "sub-01", level=150)
    bold = original(store)
    assert (bold[:, brain()] < 0).any()
    found = RunVolumes(store, "maximum").normalized(0, 20)
    expected = 2 * np.clip(np.nan_to_num(bold), 0, None) / np.nanmax(bold) - 1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.max() == pytest.approx(1, abs=1e-6)
    assert found.min() == -1


def test_units_of_each_voxels_own_sd_keep_the_fluctuations(store: Path) -> None:
    bold = original(store)
    with np.errstate(invalid="ignore"):
        z = (bold - bold.mean(axis=0)) / bold.std(axis=0)
    found = RunVolumes(store, "voxel").normalized(0, 20)
    expected = np.clip(z[:, brain()] / CLIP, -1, 1)
    np.testing.assert_allclose(found[:, brain()], expected, atol=0.02)  # of float16
    assert (found[:, ~brain()] == -1).all()
    published = RunVolumes(store, "maximum").normalized(0, 20)
    # What changes in time is a few per cent of the range there, and a quarter of it here.
    assert published[:, brain()].std(axis=0).mean() < 0.03
    assert found[:, brain()].std(axis=0).mean() == pytest.approx(1 / CLIP, rel=0.02)


def test_the_slices_with_brain_are_known(store: Path) -> None:
    run = RunVolumes(store, "maximum")
    x, y, z = run.places
    assert (list(x), list(y), list(z)) == ([*range(1, 11)], [*range(3, 10)], [*range(2, 9)])
    assert (run.n_slices, run.n_empty) == (36, 36 - 10 - 7 - 7)


def test_damaged_and_unusable_volumes_are_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="damaged"):
        RunVolumes(tmp_path / "none.zarr", "maximum")
    cut_off = shutil.copytree(store, tmp_path / "cut.zarr")
    last = max(path for path in (cut_off / "bold").rglob("*") if path.name != "zarr.json")
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    with pytest.raises(InputError, match="missing"):
        RunVolumes(cut_off, "maximum").normalized(0, 1)
    demeaned = write_run(tmp_path / "below.zarr", "sub-01", level=-5000)
    with pytest.raises(InputError, match=r"no value is above 0.*voxel"):
        RunVolumes(demeaned, "maximum").normalized(0, 1)
    flat = np.zeros((9, 12, 12), dtype=bool)
    flat[4] = True
    bold = np.random.default_rng(0).standard_normal((4, *flat.shape))
    write_volumes(tmp_path / "flat.zarr", "sub-01", bold, flat)
    zarr.open_group(tmp_path / "flat.zarr").attrs["n_voxels"] = int(flat.sum())
    with pytest.raises(InputError, match=r"9 x 12 x 12.*cubes"):
        RunVolumes(tmp_path / "flat.zarr", "maximum")


@pytest.mark.parametrize("edge", [96, 48, 24, 45, 3])
def test_our_autoencoder_makes_3_x_3_places_of_any_edge(edge: int) -> None:
    assert np.prod(prime_factors(edge // 3)) == edge // 3
    network = SliceAutoencoder(Slices(channels=5, width=4, depth=1), edge)
    images = torch.rand(2, edge, edge)
    codes = network.encode(images)
    assert codes.shape == (2, 5, 3, 3)
    assert network.decode(codes).shape == images.shape
    assert network.loss({"slices": images})["loss"].isfinite()


def test_our_autoencoder_starts_as_a_cosine_transform_of_blocks() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, EDGE, EDGE) * 2 - 1
    # With as many channels as pixels in a block nothing is lost, and with one its mean is kept.
    for channels in (GROUP**2, GROUP**2 + 3):
        network = SliceAutoencoder(Slices(channels=channels, width=4), EDGE)
        torch.testing.assert_close(network(images), images, atol=1e-5, rtol=0)
    means = images.reshape(2, 3, GROUP, 3, GROUP).mean((2, 4))
    network = SliceAutoencoder(Slices(channels=1, width=4), EDGE)
    torch.testing.assert_close(network.encode(images)[:, 0], means)
    blocks = means.repeat_interleave(GROUP, 1).repeat_interleave(GROUP, 2)
    torch.testing.assert_close(network(images), blocks)
    codes = scipy.fft.dctn(images[0, :GROUP, :GROUP].double().numpy(), norm="ortho")
    basis = lowest_frequencies(GROUP, 4).double().numpy()
    found = np.einsum("krc,rc->k", basis, images[0, :GROUP, :GROUP].double().numpy())
    np.testing.assert_allclose(found, [codes[0, 0], codes[0, 1], codes[1, 0], codes[1, 1]], 1e-5)


def test_an_edge_that_3_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 3"):
        SliceAutoencoder(Slices(), 32)


def test_codes_that_keep_all_explain_all_and_the_mean_explains_nothing() -> None:
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((5, EDGE**2))

    def draw(n: int) -> np.ndarray:
        return (rng.standard_normal((n, 5)) @ basis).reshape(n, EDGE, EDGE).astype(np.float32)

    seen, pairs = draw(40), draw(24).reshape(12, 2, EDGE, EDGE)
    mean = seen.mean(axis=0)
    codes = {
        "all": principal_components(seen, 5),
        "fewer": principal_components(seen, 2),
        "frequencies": cosine_transform(EDGE, EDGE**2),
        "mean": lambda images: np.broadcast_to(mean, images.shape),
    }
    table = measure_codes(codes, pairs, mean).set_index("code")
    assert table.loc[["all", "frequencies"], "explained"].min() > 1 - 1e-5  # float16
    assert table.loc[["all", "frequencies"], "explained_changes"].min() > 1 - 1e-5
    assert 0 < table.loc["fewer", "explained"] < 0.9
    assert table.loc["mean", ["explained", "explained_changes"]].tolist() == pytest.approx(
        [0, 0], abs=1e-6
    )
    still = measure_codes(codes, pairs[:, [0, 0]], mean)
    assert still["explained_changes"].isna().all()


def test_the_cosine_transform_keeps_the_lowest_frequencies() -> None:
    row = np.cos(np.pi * (np.arange(EDGE) + 0.5) / EDGE)
    low = np.tile(row, (1, EDGE, 1)).astype(np.float32)
    high = np.tile(np.cos(np.pi * (np.arange(EDGE) + 0.5) * 9 / EDGE), (1, EDGE, 1))
    code = cosine_transform(EDGE, 9)
    np.testing.assert_allclose(code(low), low, atol=1e-3)
    np.testing.assert_allclose(code(high.astype(np.float32)), 0, atol=1e-3)
    assert GRID[0] == EDGE
