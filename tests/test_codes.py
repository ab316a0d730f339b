"""Codes of runs: the store, the frozen autoencoders, empty slices, resuming, and bad input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import xarray
import zarr
from fabricate import make_config
from slice_data import EDGE, SLICES, save_dcae, write_run

from neuromamba import codes, slice_encoders
from neuromamba.codes import make_codes, run_codes
from neuromamba.config import Config
from neuromamba.files import InputError, digest_file
from neuromamba.layout import Layout
from neuromamba.shards import ShardedArray
from neuromamba.slice_encoders import SliceEncoder, open_encoder
from neuromamba.slices import RunVolumes
from neuromamba.tables import read_table, write_table

RUNS = ["sub-01_task-rest", "sub-02_task-rest"]


@pytest.fixture(scope="module")
def dcae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of weights, and the whole model that they are of."""
    folder = tmp_path_factory.mktemp("dcae")
    return folder, save_dcae(folder)


@pytest.fixture
def config(dcae: tuple[Path, Any], tmp_path: Path) -> Config:
    """Two runs, and codes by a small DC-AE."""
    config = config_of(tmp_path, dcae[0])
    layout = Layout.of(config, "toy")
    for number, run in enumerate(RUNS):
        write_run(layout.array("volumes", run), run, seed=number)
    table = pd.DataFrame({"run": RUNS, "reason": None, "key": "k"})
    write_table(layout.manifest("volumes", 0), table)
    return config


def config_of(folder: Path, weights: Path, **changes: Any) -> Config:
    settings = {"weights": str(weights), "batch_slices": 7, **changes}
    return make_config(folder, codes=settings, compute={"device": "cpu", "max_excluded": 0.5})


def encoded(config: Config) -> Path:
    run_codes(config, "toy", 0)
    return Layout.of(config, "toy").array("codes", RUNS[0])


def test_the_store_is_as_the_contract_says(config: Config, dcae: tuple[Path, Any]) -> None:
    store = encoded(config)
    found = xarray.open_zarr(store, chunks=None)
    values = found["values"]
    assert values.dims == ("time", "token", "value")
    assert values.dtype == np.float16
    assert values.shape == (20, 27, EDGE * 4)
    out = np.empty((5, 27, EDGE * 4), dtype=np.float16)
    ShardedArray(store / "values").read(6, out)  # across the end of a shard
    np.testing.assert_array_equal(out, values[6:11])
    source = zarr.open_group(Layout.of(config, "toy").array("volumes", RUNS[0])).attrs
    assert source.items() >= {k: found.attrs[k] for k in ("run", "repetition_time")}.items()
    assert found.attrs["volumes_key"] == source["key"] != found.attrs["key"]
    assert [found.attrs[k] for k in ("n_volumes", "n_tokens", "code_width")] == [20, 27, 48]
    sha256 = digest_file(dcae[0] / "diffusion_pytorch_model.safetensors")
    assert found.attrs["tokenizer"] == {
        "kind": "dc-ae",
        "sha256": sha256,
        "revision": None,
        "channels": 4,
    }
    table = read_table(Layout.of(config, "toy").manifest("codes", 0)).set_index("run")
    assert table.loc[RUNS, "n_empty_slices"].tolist() == [12, 12]
    assert table.loc[RUNS, "n_slices"].tolist() == [36, 36]
    assert table["sha256"].notna().all()


def test_codes_are_those_of_diffusers_slice_by_slice(
    config: Config, dcae: tuple[Path, Any]
) -> None:
    """Every slice by itself, empty ones too, three equal channels, no factor."""
    values = xarray.open_zarr(encoded(config), chunks=None)["values"].values
    run = RunVolumes(Layout.of(config, "toy").array("volumes", RUNS[0]), "maximum")
    volume = run.normalized(11, 12)[0]
    group = EDGE // 3
    for axis in range(3):
        for number in range(EDGE):
            image = torch.from_numpy(volume.take(number, axis=2 - axis))[None, None]
            with torch.no_grad():
                code = dcae[1].encode(image.expand(1, 3, -1, -1)).latent[0].numpy()
            g, s = divmod(number, group)
            tokens = values[11].reshape(3, 3, 3, 3, group, 4)[..., axis, s, :]
            # The places of this slice, (row, column, channel).
            of_slice = [tokens[:, :, g], tokens[:, g], tokens[g]][axis]
            np.testing.assert_allclose(of_slice, np.moveaxis(code, 0, -1), atol=2e-3, rtol=2e-3)


def test_empty_slices_are_encoded_once_and_change_nothing(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within rounding: on some processors a slice's place in a batch decides its kernel."""
    encoder = open_encoder(config, "toy")
    seen: list[int] = []
    real = SliceEncoder.encode

    def count(self: SliceEncoder, slices: np.ndarray) -> np.ndarray:
        seen.append(len(slices))
        return real(self, slices)

    monkeypatch.setattr(SliceEncoder, "encode", count)
    source = Layout.of(config, "toy").array("volumes", RUNS[0])
    run = RunVolumes(source, "maximum")
    some = list(codes._rows(run, encoder))
    assert sum(seen) == 20 * 24 + 1
    every = tuple(np.arange(EDGE) for _ in range(3))
    monkeypatch.setattr(RunVolumes, "places", every, raising=False)
    whole = RunVolumes(source, "maximum")
    whole.places = every
    all_of_them = list(codes._rows(whole, encoder))
    difference = np.abs(np.float32(some) - np.float32(all_of_them)).max()
    assert difference <= 2e-3 * np.abs(np.float32(all_of_them)).max()  # one step of float16
    alone = encoder.encode(np.full((1, EDGE, EDGE), -1, dtype=np.float32))
    np.testing.assert_array_equal(alone[0], encoder.empty)
    images = np.full((7, EDGE, EDGE), -1, dtype=np.float32)
    batch = encoder.encode(images)
    np.testing.assert_allclose(batch, np.stack([encoder.empty] * 7), rtol=1e-6, atol=1e-6)


def test_batches_of_any_size_give_the_same(config: Config) -> None:
    encoder = open_encoder(config, "toy")
    source = Layout.of(config, "toy").array("volumes", RUNS[0])
    images = RunVolumes(source, "maximum").normalized(0, 1)[0]
    few = encoder.encode(images)
    many = open_encoder(config_of(Path("x"), Path(str(config.codes.weights)), batch_slices=100), "")
    np.testing.assert_allclose(many.encode(images), few, atol=1e-5)


def test_finished_runs_are_kept_and_others_made_anew(
    config: Config, dcae: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout.of(config, "toy")
    made: list[str] = []
    real = codes._write

    def write(volumes: RunVolumes, *rest: Any) -> dict[str, Any]:
        made.append(volumes.run)
        return real(volumes, *rest)

    monkeypatch.setattr(codes, "_write", write)
    run_codes(config, "toy", 0)
    run_codes(config, "toy", 0)
    assert made == RUNS
    shutil.rmtree(layout.array("codes", RUNS[1]))
    run_codes(config, "toy", 0)
    assert made == [*RUNS, RUNS[1]]
    # In other batches, and with the weights in another place.
    moved = shutil.copytree(dcae[0], tmp_path / "elsewhere")
    run_codes(config_of(tmp_path, moved, batch_slices=5), "toy", 0)
    assert len(made) == 3
    run_codes(config_of(tmp_path, dcae[0], normalization="voxel"), "toy", 0)
    assert len(made) == 5


def test_a_run_that_is_stopped_leaves_nothing_half_made(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = open_encoder(config, "toy")
    layout = Layout.of(config, "toy")
    source, target = layout.array("volumes", RUNS[0]), layout.array("codes", RUNS[0])
    calls: list[int] = []
    real = codes.encode_volumes

    def stop(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(codes, "encode_volumes", stop)
    with pytest.raises(KeyboardInterrupt):
        make_codes(source, target, encoder, config.codes, 8)
    assert not list(target.parent.iterdir())
    facts = make_codes(source, target, encoder, config.codes, 8)
    assert facts["n_volumes"] == 20


def test_an_unusable_run_is_left_out_with_the_reason(config: Config) -> None:
    layout = Layout.of(config, "toy")
    shutil.rmtree(layout.array("volumes", RUNS[0]))
    run_codes(config, "toy", 0)
    table = read_table(layout.manifest("codes", 0)).set_index("run")
    assert "these volumes are damaged" in table.loc[RUNS[0], "reason"]
    assert pd.isna(table.loc[RUNS[1], "reason"])


def test_codes_that_float16_cannot_hold_are_refused(config: Config) -> None:
    encoder = open_encoder(config, "toy")
    encoder.network.encoder.conv_out.bias.data.fill_(1e6)
    layout = Layout.of(config, "toy")
    how = (encoder, config.codes, 8)
    with pytest.raises(InputError, match="over 65504"):
        make_codes(layout.array("volumes", RUNS[0]), layout.array("codes", RUNS[0]), *how)


def test_bfloat16_is_near(config: Config) -> None:
    source = Layout.of(config, "toy").array("volumes", RUNS[0])
    images = RunVolumes(source, "maximum").normalized(0, 1)[0]
    exact = open_encoder(config, "toy").encode(images)
    settings = config.codes.model_copy(update={"precision": "bfloat16"})
    coarse = open_encoder(config.model_copy(update={"codes": settings}), "toy").encode(images)
    assert 0 < np.abs(coarse - exact).max() < 0.1 * np.abs(exact).max()


# --- Weights --------------------------------------------------------------------------------------


def test_weights_in_several_files_are_read(
    config: Config, dcae: tuple[Path, Any], tmp_path: Path
) -> None:
    dcae[1].save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    parts = open_encoder(config_of(tmp_path, tmp_path / "parts"), "toy")
    whole = open_encoder(config, "toy")
    images = np.random.default_rng(0).uniform(-1, 1, (3, EDGE, EDGE)).astype(np.float32)
    np.testing.assert_array_equal(parts.encode(images), whole.encode(images))
    next((tmp_path / "parts").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="is missing; fetch"):
        open_encoder(config_of(tmp_path, tmp_path / "parts"), "toy")


def test_weights_that_do_not_serve_are_refused(
    config: Config, dcae: tuple[Path, Any], tmp_path: Path
) -> None:
    def refused(weights: Path, match: str) -> None:
        with pytest.raises(InputError, match=match):
            open_encoder(config_of(tmp_path, weights), "toy")

    refused(tmp_path / "nothing", r"nothing is no folder with the config\.json")
    copy = shutil.copytree(dcae[0], tmp_path / "copy")
    file = copy / slice_encoders.WEIGHTS
    tensors = safetensors.torch.load_file(file)
    first = next(name for name in tensors if name.startswith("encoder."))
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != first}, file)
    refused(copy, "do not fit its config.json.*Missing key")
    file.write_bytes(b"garbage")
    refused(copy, "cannot be read")
    file.rename(copy / "diffusion_pytorch_model.bin")
    refused(copy, "run code when they are read")
    (copy / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (copy / "diffusion_pytorch_model.bin").rename(file)
    refused(copy, "is a AutoencoderKL")
    save_dcae(tmp_path / "deeper", blocks=4)
    refused(tmp_path / "deeper", r"8 x 8 voxels.*\[24, 24, 24\], which is \[12, 12, 12\]")


def test_the_hub_is_asked_at_one_commit_and_for_no_code(
    config: Config, dcae: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert all(one.endswith((".json", ".safetensors")) for one in allow_patterns)
        if len(asked) > 1:
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        return str(dcae[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    commit = "0123456789" * 4
    hub = config_of(tmp_path, Path("owner/name"), revision=commit)
    assert open_encoder(hub, "toy").facts["revision"] == commit
    with pytest.raises(InputError, match=r"owner/name at 0123.*no network.*name the folder"):
        open_encoder(hub, "toy")
    assert asked == [("owner/name", commit)] * 2


def test_our_own_tokenizer_has_to_be_trained_first(tmp_path: Path) -> None:
    config = make_config(tmp_path, codes=SLICES)
    with pytest.raises(InputError, match="training has not finished"):
        open_encoder(config, "toy")


@pytest.mark.cuda
def test_a_gpu_gives_the_codes_of_the_cpu(config: Config) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    source = Layout.of(config, "toy").array("volumes", RUNS[0])
    images = RunVolumes(source, "maximum").normalized(0, 2).reshape(-1, EDGE, EDGE)
    compute = config.compute.model_copy(update={"device": "cuda"})
    for precision, tolerance in (("float32", 5e-3), ("auto", 0.1)):
        settings = config.codes.model_copy(update={"precision": precision})
        update = {"compute": compute, "codes": settings}
        found = open_encoder(config.model_copy(update=update), "toy").encode(images)
        expected = open_encoder(config, "toy").encode(images)
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
