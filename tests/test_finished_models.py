"""Finished models: whole or refused, of known settings, and aware of whom they have seen."""

from __future__ import annotations

import os

import pytest
import torch
from fake_runs import Toy
from torch import nn

from neuromamba.checkpoint import finished, load_model_info, load_weights, save_model
from neuromamba.files import InputError
from neuromamba.record import ancestry, differences, seen_subjects

RECORD = {"settings": {"a": {"b": 1, "c": [1, 2]}}, "inputs": {"split": "x"}}


def test_a_model_is_whole_only_with_its_own_weights(tmp_path):
    with pytest.raises(InputError, match="has not finished"):
        load_model_info(tmp_path)
    model = Toy()
    save_model(tmp_path, model.state_dict(), RECORD)
    info = load_model_info(tmp_path)
    assert info["settings"] == RECORD["settings"]
    assert info["versions"]["torch"] == torch.__version__
    other = Toy()
    nn.init.ones_(model.layers[0].weight)
    load_weights(other, tmp_path)
    assert torch.equal(other.layers[0].weight, Toy().layers[0].weight)
    with (tmp_path / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    with pytest.raises(InputError, match="differs from the digest"):
        load_model_info(tmp_path)


def test_weights_that_do_not_fit_are_reported_by_name(tmp_path):
    weights = Toy().state_dict()
    weights["layers.9.weight"] = weights.pop("layers.4.bias")
    weights["layers.0.weight"] = torch.zeros(2, 2)
    save_model(tmp_path, weights, RECORD)
    with pytest.raises(InputError) as error:
        load_weights(Toy(), tmp_path)
    for part in (
        "missing layers.4.bias",
        "unexpected layers.9.weight",
        "layers.0.weight is (2, 2), not (16, 6)",
    ):
        assert part in str(error.value)


def test_a_finished_model_of_other_settings_is_refused_or_removed(tmp_path):
    save_model(tmp_path, Toy().state_dict(), RECORD)
    assert finished(tmp_path, RECORD, "refuse")
    changed = {**RECORD, "settings": {"a": {"b": 2, "c": [1, 2]}}}
    with pytest.raises(InputError, match=r"a\.b: 1 -> 2"):
        finished(tmp_path, changed, "refuse")
    assert not finished(tmp_path, changed, "restart")
    assert not (tmp_path / "model.json").exists()


def test_a_finished_model_of_other_code_is_refused_or_removed(tmp_path):
    save_model(tmp_path, Toy().state_dict(), RECORD | {"code": {"train.py": "a"}})
    changed = RECORD | {"code": {"train.py": "b"}}
    with pytest.raises(InputError, match=r"code\.train\.py: a -> b"):
        finished(tmp_path, changed, "refuse")
    assert not finished(tmp_path, changed, "restart")


def test_differences_name_keys_that_came_and_went():
    new = {"settings": {"a": {"c": [1, 2]}, "d": None}, "inputs": {"split": "x"}}
    assert differences(RECORD, new) == ["a.b: 1 -> unset", "d: unset -> None"]


def test_seen_subjects_include_those_of_the_model_before():
    earlier = {"subjects": {"train": ["sub-1"], "validation": ["sub-2"]}}
    info = {"subjects": {"train": ["sub-3"], "validation": []}, "pretrained_from": earlier}
    assert seen_subjects(info, "fake") == {"sub-1", "sub-2", "sub-3"}


def test_the_ancestry_of_a_model_goes_back_to_the_first():
    first = {"dataset": "a", "subjects": {"train": ["sub-1"]}, "best": {"loss": 0.1}}
    second = {"dataset": "a", "subjects": {"train": ["sub-2"]}, "pretrained_from": ancestry(first)}
    third = {"dataset": "a", "subjects": {"train": []}, "pretrained_from": ancestry(second)}
    assert seen_subjects(third, "a") == {"sub-1", "sub-2"}
    assert "best" not in third["pretrained_from"]["pretrained_from"]


def test_the_last_weights_may_be_left_behind_but_not_be_others(tmp_path):
    save_model(tmp_path, Toy().state_dict(), RECORD, last={"weight": torch.ones(3)})
    with (tmp_path / "last.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    with pytest.raises(InputError, match=r"last\.safetensors differs from the digest"):
        load_model_info(tmp_path)
    (tmp_path / "last.safetensors").unlink()
    assert load_model_info(tmp_path)["files"].keys() == {"model.safetensors", "last.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors is missing; train the model again"):
        load_model_info(tmp_path)
