"""Models to be shared: written, read back to the same bits, refused where they do not fit."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from fake_models import make_models
from fake_runs import make_config

from neuromamba.files import InputError, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.pretrained import Pretrained, from_pretrained, save_pretrained

FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which a model was pretrained, and exported to `shared`."""
    folder = tmp_path_factory.mktemp("pretrained")
    make_models(folder)
    return folder


@pytest.fixture
def shared(made: Path, tmp_path: Path) -> Path:
    """A copy of the shared model, to be spoilt."""
    copy = tmp_path / "shared"
    copy.mkdir()
    for name in FILES:
        (copy / name).write_bytes((made / "shared" / name).read_bytes())
    return copy


def edit(folder: Path, **changes: object) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def one_window() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "tokens": torch.randn(5, 4, 16),
        "patches": torch.tensor([5]),
        "centers": torch.rand(5, 3),
        "mean": torch.randn(5, 16),
    }


def test_what_is_read_back_is_what_was_trained(made: Path) -> None:
    source = Layout(made / "results", "fake").pretrain("tiny", 0)
    trained = safetensors.torch.load_file(source / "model.safetensors")
    shared = from_pretrained(made / "shared")
    found = shared.network.state_dict()
    assert set(found) == set(trained)
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    config = make_config(made)
    network = build_model(config.models["tiny"], 16)
    network.load_state_dict(trained)
    for function in ("embed", "encode", "predict_next"):
        expected = getattr(network.eval(), function)(one_window())
        assert torch.equal(getattr(shared.network, function)(one_window()), expected)
    assert not shared.network.training
    assert shared.model.width == config.models["tiny"].width
    assert (shared.tokens, shared.volumes.shape) == (config.tokens, config.volumes.shape)
    assert sorted(path.name for path in (made / "shared").iterdir()) == FILES


def test_loading_leaves_the_random_numbers_of_others_alone(made: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    from_pretrained(made / "shared")
    assert torch.equal(torch.rand(4), expected)


def test_what_was_read_can_be_written_again(made: Path, tmp_path: Path) -> None:
    first = from_pretrained(made / "shared")
    save_pretrained(tmp_path / "again", first, "card")
    second = from_pretrained(tmp_path / "again")
    assert torch.equal(first.network.embed(one_window()), second.network.embed(one_window()))
    assert first.facts == second.facts
    assert (tmp_path / "again" / "README.md").read_text() == "card"


# --- What is refused ----------------------------------------------------------------------------


def test_nothing_that_exists_is_overwritten(made: Path, shared: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        save_pretrained(shared, from_pretrained(made / "shared"), "card")
    assert (shared / "README.md").read_text() != "card"


def test_another_format_is_refused(shared: Path) -> None:
    edit(shared, format=99)
    with pytest.raises(InputError, match=r"config\.json: format 99.*reads format 1"):
        from_pretrained(shared)


def test_a_folder_of_another_library_is_refused(shared: Path) -> None:
    write_json(shared / "config.json", {"architectures": ["Bert"], "model_type": "bert"})
    with pytest.raises(InputError, match="format None"):
        from_pretrained(shared)


def test_a_key_that_is_not_known_is_named(shared: Path) -> None:
    edit(shared, model={**read_json(shared / "config.json")["model"], "rotary": True})
    with pytest.raises(InputError, match=r"(?s)rotary.*install that version"):
        from_pretrained(shared)


def test_a_key_that_is_missing_is_named(shared: Path) -> None:
    facts = read_json(shared / "config.json")
    del facts["tokens"]
    write_json(shared / "config.json", facts)
    with pytest.raises(InputError, match="'tokens' is missing"):
        from_pretrained(shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.bias"), "missing head.bias"),
        (lambda w: w.update(foreign=torch.zeros(2)), "unexpected foreign"),
        (lambda w: w.update({"head.bias": torch.zeros(3)}), r"head.bias is \(3,\), not \(16,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(shared: Path, change, message: str) -> None:
    weights = safetensors.torch.load_file(shared / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, shared / "model.safetensors")
    edit(shared, weights={})
    with pytest.raises(InputError, match=message):
        from_pretrained(shared)


def test_damaged_weights_are_refused(shared: Path) -> None:
    path = shared / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"differs from the digest in config\.json"):
        from_pretrained(shared)
    path.write_bytes(b"nothing")
    edit(shared, weights={})
    with pytest.raises(InputError, match="cannot be read"):
        from_pretrained(shared)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(shared: Path, name: str) -> None:
    (shared / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        from_pretrained(shared)


# --- The hub ------------------------------------------------------------------------------------


class Hub:
    """In place of `huggingface_hub`: one model, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, {}

    def snapshot_download(self, repo_id: str, **keywords: object) -> str:
        self.asked = {"repo_id": repo_id, **keywords}
        if repo_id != "lab/tiny":
            raise OSError("404: no such repository")
        return str(self.folder)


@pytest.fixture
def hub(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub(made / "shared")
    module = SimpleNamespace(snapshot_download=hub.snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_name_that_is_no_folder_is_fetched_from_the_hub(hub: Hub) -> None:
    shared = from_pretrained("lab/tiny", revision="v1")
    assert isinstance(shared, Pretrained)
    assert hub.asked["repo_id"] == "lab/tiny"
    assert hub.asked["revision"] == "v1"
    assert sorted(hub.asked["allow_patterns"]) == FILES, "nothing that could be code"


def test_a_folder_is_never_looked_up(hub: Hub, shared: Path) -> None:
    from_pretrained(shared)
    assert hub.asked == {}


def test_what_the_hub_does_not_have_is_an_error_with_its_reason(hub: Hub) -> None:
    with pytest.raises(InputError, match=r"lab/other.*404: no such repository"):
        from_pretrained("lab/other")


@pytest.mark.parametrize("name", ["shared/model/deep", "/no/folder", "name", "../up"])
def test_what_is_no_name_of_a_hub_is_not_looked_up(hub: Hub, name: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        from_pretrained(name)
    assert hub.asked == {}


def test_without_its_library_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'neuromamba\[hub\]'"):
        from_pretrained("lab/tiny")


def test_the_hubs_library_takes_what_it_is_given() -> None:
    library = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")
    signature = inspect.signature(library.snapshot_download)
    given = signature.bind("lab/tiny", revision=None, allow_patterns=["config.json"])
    assert given.arguments["repo_id"] == "lab/tiny"
