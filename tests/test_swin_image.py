"""The image encoder, its decoder, and weights that others have published."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neuromamba.files import InputError
from neuromamba.image_weights import load_image_weights
from neuromamba.models.swin_image import ImageDecoder, SwinImage

WIDTH = 8


def encoder(seed: int = 0, patch: int = 2) -> SwinImage:
    torch.manual_seed(seed)
    return SwinImage(12, WIDTH, patch=patch)


@pytest.mark.parametrize(
    ("patch", "shape", "places"),
    [
        (2, (32, 32, 32), (1, 1, 1)),
        (2, (40, 33, 64), (2, 2, 2)),
        (4, (64, 40, 66), (1, 1, 2)),
    ],
)
def test_images_of_any_size_are_embedded_and_rebuilt(patch, shape, places) -> None:
    model, images = encoder(patch=patch), torch.rand(1, *shape)
    features = model.features(images)
    assert features.shape == (1, 192, *places)
    assert torch.equal(model(images), model.embed(features))
    assert model(images).shape == (1, WIDTH)
    assert ImageDecoder(192, patch)(features, shape).shape == (1, *shape)


def test_padding_is_zeros_at_the_end() -> None:
    model, image = encoder(patch=4), torch.rand(1, 26, 32, 32)
    padded = torch.cat([image, torch.zeros(1, 2, 32, 32)], 1)
    assert torch.equal(model(image), model(padded))


def test_the_last_stage_of_the_published_size_is_768_wide() -> None:
    assert SwinImage(48, 8).channels == 768


def test_importing_the_models_and_the_commands_does_not_load_monai() -> None:
    code = "import sys, neuromamba.cli, neuromamba.models; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def published(model: SwinImage) -> dict[str, torch.Tensor]:
    """The encoder's tensors by the names of MONAI's file, with what else that holds."""
    names = {".mlp.linear1.": ".mlp.fc1.", ".mlp.linear2.": ".mlp.fc2."}
    found = {}
    for name, value in model.swin.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[f"module.{name}"] = value.clone()
    return {**found, "module.rotation_head.weight": torch.zeros(4, 192)}


def test_published_weights_are_taken_over_with_a_report(tmp_path: Path) -> None:
    weights, model = published(encoder(1)), encoder(2)
    changed = "module.patch_embed.proj.weight"
    weights[changed] = weights[changed][:, :, :1].clone()
    del weights["module.patch_embed.proj.bias"]
    for file in (tmp_path / "model_swinvit.pt", tmp_path / "weights.safetensors"):
        if file.suffix == ".pt":
            torch.save({"state_dict": weights, "epoch": 3}, file)
        else:
            save_file(weights, file)
        model = encoder(2)
        report = load_image_weights(model.swin, file)
        assert report.missing == ["patch_embed.proj.bias"]
        assert report.unused == ["rotation_head.weight"]
        assert report.misfits == ["patch_embed.proj.weight ((12, 1, 1, 2, 2), (12, 1, 2, 2, 2))"]
        assert len(report.loaded) == len(list(model.swin.parameters())) - 2
        assert str(report).startswith(f"{len(report.loaded)} tensors loaded; 1 missing (")
        taken, own = encoder(1).swin.state_dict(), encoder(2).swin.state_dict()
        for name, value in model.swin.state_dict().items():
            assert torch.equal(value, taken[name] if name in report.loaded else own[name])


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    model = encoder()
    with pytest.raises(InputError, match="does not exist"):
        load_image_weights(model.swin, tmp_path / "none.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    (tmp_path / "cut.pt").write_bytes(b"12345")
    torch.save({"path": Path("x"), "weight": torch.ones(2)}, tmp_path / "object.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(print))
    for name in ("cut.safetensors", "cut.pt", "object.pt", "pickle.pt"):
        with pytest.raises(InputError, match=f"{name} cannot be read as weights alone"):
            load_image_weights(model.swin, tmp_path / name)
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="none of its 1 tensors fits"):
        load_image_weights(model.swin, tmp_path / "other.pt")
