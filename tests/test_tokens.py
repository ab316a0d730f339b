"""Tokens: every brain voxel once, to the bit; windows, normalisation, and damage."""

from __future__ import annotations

import copy
import shutil
import struct
from pathlib import Path

import google_crc32c
import nibabel
import numpy as np
import pytest
import xarray
from scans import GRID, ball, make_config, series, write_index, write_run

from neuromamba import tokens
from neuromamba.config import Tokens, Volumes
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.resample import resample_mask, target_affine
from neuromamba.shards import ShardedArray, ShardWriter
from neuromamba.tables import read_table
from neuromamba.token_store import TokenStore
from neuromamba.tokens import index_patches, make_tokens, run_tokens
from neuromamba.volumes import Source, make_volumes, run_volumes

SETTINGS = Volumes(**GRID)
TOKENS = Tokens(patch=4)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of an odd length, 21, in shards of 8."""
    folder = tmp_path_factory.mktemp("volumes")
    row = write_run(folder, "sub-01", series(n_volumes=21))
    source = Source("sub-01", "sub-01", Path(row["bold"]), Path(row["mask"]), "MNI152", 2.0, "f")
    make_volumes(source, folder / "sub-01.zarr", SETTINGS, 2)
    return folder / "sub-01.zarr"


@pytest.fixture
def store(volumes: Path, tmp_path: Path) -> Path:
    make_tokens(volumes, tmp_path / "tokens.zarr", TOKENS, SETTINGS.shard_volumes)
    return tmp_path / "tokens.zarr"


def raw(path: Path) -> xarray.Dataset:
    return xarray.open_zarr(path, chunks=None, mask_and_scale=False)


def unpack(tokens: np.ndarray, grid_index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Put (time patch, token, value) back into (t, z, y, x), NaN where there is no token."""
    edge, depth = 4, 2
    out = np.full((len(tokens) * depth, *shape), np.nan, dtype=tokens.dtype)
    for token, (x, y, z) in enumerate(grid_index * edge):
        patch = tokens[:, token].reshape(len(tokens) * depth, edge, edge, edge)
        out[:, z : z + edge, y : y + edge, x : x + edge] = patch
    return out


def test_tokens_hold_every_brain_voxel_once_to_the_bit(volumes: Path, store: Path) -> None:
    source, tokens = raw(volumes), raw(store)
    bold = source["bold"].values
    values = tokens["values"].values
    # The odd last volume has no partner.
    assert values.shape == (10, tokens.sizes["token"], 4**3 * 2)
    again = unpack(values, tokens["grid_index"].values, bold.shape[1:])
    np.testing.assert_array_equal(again.view(np.uint16), bold[:20].view(np.uint16))
    assert np.isfinite(values[0, :, :64]).sum() == source["mask"].values.sum()
    for name in ("mean", "sd"):
        statistic = tokens[name].values
        assert statistic.shape == (tokens.sizes["token"], 64)
        both = np.concatenate([statistic, statistic], axis=1)[None]
        again = unpack(both, tokens["grid_index"].values, bold.shape[1:])[0]
        np.testing.assert_array_equal(again, source[name].values)


def test_order_and_centres(store: Path) -> None:
    tokens = xarray.open_zarr(store, chunks=None)
    grid_index = tokens["grid_index"].values
    number = grid_index @ [36, 6, 1]
    assert (np.diff(number) > 0).all()
    np.testing.assert_allclose(tokens["center"].values, (grid_index + 0.5) / 6, rtol=1e-6)
    assert tokens.attrs["patch_grid"] == [6, 6, 6]
    assert tokens.attrs["n_volumes"] == 21
    assert tokens.attrs["repetition_time"] == 2.0
    assert tokens["values"].dims == ("time_patch", "token", "value")


def test_xarray_decodes_the_values(volumes: Path, store: Path) -> None:
    decoded = xarray.open_zarr(store, chunks=None)["values"]
    bold = xarray.open_zarr(volumes, chunks=None)["bold"]
    assert decoded.dtype in (np.float32, np.float64)
    np.testing.assert_allclose(np.nansum(decoded.values), bold[:20].sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("brain_fraction", "expected"),
    [(0.0, [1, 2, 32, 64]), (0.02, [2, 32, 64]), (0.5, [32, 64]), (0.51, [64]), (1.0, [64])],
)
def test_the_brain_rule(brain_fraction: float, expected: list[int]) -> None:
    mask = np.zeros((8, 8, 8), dtype=bool)
    mask[0, 0, 0] = True
    mask[0, 0, 4:6] = True
    mask[0:2, 4:8, 0:4] = True
    mask[4:8, 4:8, 4:8] = True
    patches = index_patches(mask, 4, brain_fraction)
    counts = mask.ravel()[patches.voxels].sum(axis=1)
    assert sorted(counts) == expected
    np.testing.assert_array_equal(patches.grid_index[-1], [1, 1, 1])
    np.testing.assert_array_equal(patches.voxels[-1, :5], [292, 293, 294, 295, 300])


def test_the_index_ignores_other_runs_and_their_order() -> None:
    mask = ball((24, 24, 24)).T
    patches = index_patches(mask, 6, 0)
    assert patches.patch_grid == (4, 4, 4)
    assert (np.sort(patches.voxels.ravel()) == np.unique(patches.voxels)).all()


def test_no_patch_above_the_fraction_leaves_the_run_out(tmp_path: Path) -> None:
    mask = ball((20, 24, 21))
    mask[:, ::2] = False
    rows = [
        write_run(tmp_path, "sub-01", series()),
        write_run(tmp_path, "sub-02", series(), mask=mask),
    ]
    config = make_config(tmp_path, tokens={"brain_fraction": 0.9}, compute={"max_excluded": 0.5})
    layout = write_index(config, rows)
    run_volumes(config, "toy", 0)
    run_tokens(config, "toy", 0)
    manifest = read_table(layout.manifest("tokens", 0)).set_index("run")
    assert "no patch has a share of 0.9 brain voxels" in manifest.loc["sub-02", "reason"]
    assert (
        manifest.loc["sub-01", "n_tokens"] == TokenStore(layout.array("tokens", "sub-01")).n_tokens
    )


def test_a_batch_of_tokens_follows_the_batch_of_volumes(tmp_path: Path) -> None:
    rows = [write_run(tmp_path, f"sub-{i:02}", series(seed=i)) for i in (1, 2, 3)]
    Path(rows[0]["mask"]).unlink()
    config = make_config(tmp_path, compute={"batches": 2, "max_excluded": 0.5})
    layout = write_index(config, rows)
    for batch, runs in ((0, ["sub-03"]), (1, ["sub-02"])):
        run_volumes(config, "toy", batch)
        run_tokens(config, "toy", batch)
        table = read_table(layout.manifest("tokens", batch))
        assert table["run"].tolist() == runs
        assert table["n_time_patches"].tolist() == [10]


def test_finished_tokens_are_kept_until_something_changes(volumes: Path, tmp_path: Path) -> None:
    target = tmp_path / "tokens.zarr"

    def remade(tokens: Tokens = TOKENS) -> bool:
        before = (target / "zarr.json").stat().st_ino if target.exists() else None
        facts = make_tokens(volumes, target, tokens, SETTINGS.shard_volumes)
        store = TokenStore(target)
        expected = {"key": store.attrs["key"], "n_tokens": store.n_tokens, "n_time_patches": 10}
        assert facts == expected
        return (target / "zarr.json").stat().st_ino != before

    assert remade()
    assert not remade()
    assert remade(Tokens(patch=4, brain_fraction=0.5))
    assert remade()


# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "n"), [(0, 10), (0, 1), (3, 2), (2, 7), (9, 1)])
def test_a_window_is_what_zarr_reads(store: Path, start: int, n: int) -> None:
    expected = raw(store)["values"].values[start : start + n]
    window = TokenStore(store).window(start, n)
    assert window.dtype == np.float16
    np.testing.assert_array_equal(window.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(("start", "n"), [(0, 11), (-1, 2), (10, 1)])
def test_a_window_beyond_the_run_is_an_error(store: Path, start: int, n: int) -> None:
    with pytest.raises(IndexError, match="of 10"):
        TokenStore(store).window(start, n)


def test_normalisation(store: Path) -> None:
    tokens = TokenStore(store)
    decoded = xarray.open_zarr(store, chunks=None)["values"].values.astype(np.float64)
    brain = np.isfinite(decoded)
    expected = (decoded - tokens.attrs["global_mean"]) / tokens.attrs["global_sd"]
    ours = tokens.normalized(0, 10, "global")
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[brain], expected[brain], rtol=1e-5, atol=1e-6)
    assert (ours[~brain] == 0).all()
    mean, sd = np.tile(tokens.mean, 2), np.tile(tokens.sd, 2)
    ours = tokens.normalized(3, 4, "voxel")
    expected = ((decoded - mean) / sd)[3:7]
    np.testing.assert_allclose(ours[brain[3:7]], expected[brain[3:7]], atol=1e-4)
    assert (ours[~brain[3:7]] == 0).all()
    # Over the run the units are SDs, but for the volume that was left off.
    assert abs(tokens.normalized(0, 10, "voxel")[brain].std() - 1) < 0.02


def test_the_mean_predictor_in_either_unit(store: Path) -> None:
    tokens = TokenStore(store)
    mean = tokens.mean_normalized("global")
    brain = np.isfinite(np.tile(tokens.mean, 2))
    assert (mean[~brain] == 0).all()
    over_time = tokens.normalized(0, 10, "global").reshape(10, -1, 2, 64).mean(axis=(0, 2))
    # The volume that was left off is part of the mean: a difference of about SD / sqrt(20 * 21).
    np.testing.assert_allclose(np.tile(over_time, 2), mean, atol=0.05)
    assert (tokens.mean_normalized("voxel") == 0).all()
    assert mean.shape == tokens.mean_normalized("voxel").shape == (tokens.n_tokens, 128)


def test_a_store_can_be_copied(store: Path) -> None:
    tokens = TokenStore(store)
    # A deep copy takes the way that sending does: no open file or lock gets through either.
    again = copy.deepcopy(tokens)
    np.testing.assert_array_equal(again.normalized(1, 3, "voxel"), tokens.normalized(1, 3, "voxel"))


def test_rows_of_a_shard_may_lie_in_any_order(store: Path) -> None:
    expected = TokenStore(store).window(0, 10).view(np.uint16)
    path = store / "values" / "c.0.0.0"
    content = path.read_bytes()
    index = np.frombuffer(content[-68:-4], "<u8").reshape(4, 2)
    order = [2, 0, 3, 1]
    body, places = b"", np.zeros((4, 2), "<u8")
    for row in order:
        places[row] = (len(body), index[row, 1])
        start = int(index[row, 0])
        body += content[start : start + int(index[row, 1])]
    tail = places.tobytes()
    path.write_bytes(body + tail + struct.pack("<I", google_crc32c.value(tail)))
    np.testing.assert_array_equal(raw(store)["values"].values.view(np.uint16), expected)
    np.testing.assert_array_equal(TokenStore(store).window(0, 10).view(np.uint16), expected)


def test_a_chunk_of_another_shape_is_refused(store: Path) -> None:
    with ShardWriter(store / "values") as writer, pytest.raises(ValueError, match="is no chunk"):
        writer.append(np.zeros((2, 3, 128), dtype=np.float16))


# --- Damage ---------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "empty": (lambda path: path.write_bytes(b""), "is truncated"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "checksum"),
    "cut in front": (lambda path: path.write_bytes(path.read_bytes()[1000:]), "lacks rows"),
    "index": (lambda path: flip(path, -20), "checksum"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_shard_is_an_error_that_says_so(store: Path, case: str) -> None:
    spoil, message = DAMAGE[case]
    spoil(store / "values" / "c.1.0.0")
    tokens = TokenStore(store)
    tokens.window(0, 4)
    with pytest.raises(InputError, match=message + ".*make it again"):
        tokens.window(2, 4)


def test_absent_or_foreign_stores_are_refused(store: Path, volumes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        TokenStore(tmp_path / "absent.zarr")
    with pytest.raises(InputError, match="does not exist"):
        TokenStore(volumes)
    shutil.copytree(volumes / "bold", tmp_path / "other.zarr" / "values")
    (tmp_path / "other.zarr" / "zarr.json").write_text((store / "zarr.json").read_text())
    with pytest.raises(InputError, match="not stored as uncompressed rows"):
        TokenStore(tmp_path / "other.zarr")
    with pytest.raises(InputError, match="unreadable array metadata"):
        ShardedArray(volumes / "mean")
    (store / "mean" / "zarr.json").unlink()
    (store / "zarr.json").write_text(
        '{"zarr_format": 3, "node_type": "group", "attributes": {"run": "r", "subject": "s"}}'
    )
    with pytest.raises(InputError, match="token store is damaged"):
        _ = TokenStore(store).mean


@pytest.mark.parametrize("case", ["missing shard", "cut shard", "no mask"])
def test_damaged_volumes_leave_the_run_out(tmp_path: Path, case: str) -> None:
    rows = [write_run(tmp_path, f"sub-{i:02}", series(seed=i)) for i in (1, 2)]
    config = make_config(tmp_path, compute={"max_excluded": 0.5})
    layout: Layout = write_index(config, rows)
    run_volumes(config, "toy", 0)
    spoiled = layout.array("volumes", "sub-01")
    shard = spoiled / "bold" / "c.1.0.0.0"
    if case == "missing shard":
        shard.unlink()
    elif case == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        (spoiled / "mask" / "c.0.0.0").unlink()
    run_tokens(config, "toy", 0)
    manifest = read_table(layout.manifest("tokens", 0)).set_index("run")
    assert manifest["reason"].isna().tolist() == [False, True]
    assert "make them again" in manifest.loc["sub-01", "reason"]
    assert not layout.array("tokens", "sub-01").exists()


# --- Real scans -----------------------------------------------------------------------------------


def test_the_mni_brain_has_the_published_number_of_tokens(real_data: Path) -> None:
    image = nibabel.load(
        real_data / "atlas" / "tpl-MNI152NLin2009cAsym_res-02_desc-brain_mask.nii.gz"
    )
    grid = Volumes()
    brain = np.asarray(image.dataobj) > 0
    voxels = resample_mask(brain, image.affine, grid.shape, target_affine(grid))
    assert len(voxels) == brain.sum()
    mask = np.zeros(grid.shape[::-1], dtype=bool)
    mask.ravel()[voxels] = True
    # 1,481 where the grid lies a few voxels elsewhere; 36 % of all patches either way.
    assert len(index_patches(mask, 6, 0).center) == 1486
    assert 0.31 < len(index_patches(mask, 6, 0.1).center) / 16**3 < 0.33
    assert 0.25 < len(index_patches(mask, 6, 0.5).center) / 16**3 < 0.27


def test_a_real_run_becomes_tokens(real_data: Path, tmp_path: Path) -> None:
    (bold,) = real_data.glob("derivatives_antsdemo/sub-02/func/*_desc-preproc_bold.nii.gz")
    mask = bold.with_name(bold.name.replace("desc-preproc_bold", "desc-brain_mask"))
    source = Source("sub-02", "sub-02", bold, mask, "MNI152NLin2009cAsym", 2.0, "f")
    make_volumes(source, tmp_path / "volumes.zarr", Volumes(), 2)
    facts = make_tokens(tmp_path / "volumes.zarr", tmp_path / "tokens.zarr", Tokens(), 48)
    assert facts["n_time_patches"] == 12
    assert 1300 < facts["n_tokens"] < 1490
    tokens = TokenStore(tmp_path / "tokens.zarr")
    values = tokens.window(0, 12)
    assert np.isfinite(values[0, :, :216]).sum() == tokens.attrs["n_voxels"]
    assert abs(tokens.normalized(0, 12, "voxel")[np.isfinite(values)].std() - 1) < 0.01


def test_a_process_that_was_given_up_takes_nothing_from_its_successor(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two make the same store; the later to end leaves that of the other, and nothing beside it."""
    target, shard = tmp_path / "tokens.zarr", SETTINGS.shard_volumes
    settings = (TOKENS, shard)
    real, made = tokens.finish, []

    def successor_first(*arguments: object) -> None:
        monkeypatch.setattr(tokens, "finish", real)
        make_tokens(volumes, target, *settings)
        made.append(target.stat().st_ino)
        real(*arguments)

    monkeypatch.setattr(tokens, "finish", successor_first)
    make_tokens(volumes, target, *settings)
    assert [target.stat().st_ino] == made
    assert list(tmp_path.iterdir()) == [target]
    # One that was made from something else is replaced as ever.
    make_tokens(volumes, target, TOKENS.model_copy(update={"brain_fraction": 0.5}), shard)
    assert target.stat().st_ino not in made
