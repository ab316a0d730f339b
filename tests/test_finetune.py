"""Heads, fine-tuning, and predictions of subjects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fake_runs import FakeStore, make_config, write_dataset
from torch import nn

from neuromamba.batches import Windows, group_runs, list_runs, make_readers
from neuromamba.checkpoint import load_model_info
from neuromamba.config import Config, Finetune, NeuroMamba
from neuromamba.files import InputError
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.heads import ClassHead, HeadedModel, NumberHead
from neuromamba.labels import make_task, read_labels
from neuromamba.layout import Layout
from neuromamba.models import build_model
from neuromamba.optimiser import make_optimizer, set_learning_rate
from neuromamba.predictor import open_predictor
from neuromamba.pretrain import run_pretrain
from neuromamba.record import seen_subjects
from neuromamba.tables import read_table, write_table

FINETUNE = {
    "steps": 8,
    "batch_size": 4,
    "evaluation_windows": 3,
    "validate_every": 4,
    "log_every": 2,
    "checkpoint_every": 4,
}


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A pretrained model in `tmp_path`."""
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    parts = write_dataset(tmp_path)
    run_pretrain(make_config(tmp_path), "fake", "tiny", 0)
    return parts


def finetune(folder: Path, target: str = "sex", on_change: str = "refuse", **change) -> Config:
    config = make_config(folder, finetune={**FINETUNE, **change})
    run_finetune(config, "fake", "tiny", 0, target, on_change)
    return config


def folder_of(folder: Path, target: str = "sex") -> Path:
    return Layout(folder / "results", "fake").finetune("tiny", 0, target)


def predict(config: Config, subjects: list[str], target: str = "sex") -> pd.DataFrame:
    FakeStore.poisoned = set()
    return predict_subjects(config, "fake", "tiny", 0, target, subjects)


def set_cells(folder: Path, column: str, cells: dict[str, object]) -> None:
    people = read_table(folder / "participants.tsv").set_index("participant_id")
    people[column] = people[column].astype(object)
    for subject, cell in cells.items():
        people.loc[subject, column] = cell
    write_table(folder / "participants.tsv", people.reset_index())


# --- Heads --------------------------------------------------------------------------------------


class Mean(nn.Module):
    """A family whose embedding is its input."""

    needs = ("x",)
    width = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.5)

    def embed(self, batch):
        return self.dropout(batch["x"] * self.scale)


def test_a_class_loss_is_weighted_cross_entropy():
    head = ClassHead([0.5, 2.0])
    output, label = torch.randn(6, 2), torch.tensor([0, 0, 1, 0, 1, 0])
    weights = torch.tensor([0.5, 0.5, 2.0, 0.5, 2.0, 0.5])
    log = output.log_softmax(1)[torch.arange(6), label]
    torch.testing.assert_close(head.loss(output, label)["loss"], -(weights * log).mean())
    torch.testing.assert_close(head.predict(output).sum(1), torch.ones(6))


def test_a_number_is_learnt_in_z_units_and_told_in_its_own():
    head = NumberHead(40.0, 10.0)
    output, label = torch.tensor([[0.0], [1.0]]), torch.tensor([40.0, 30.0])
    scalars = head.loss(output, label)
    assert scalars["loss"].item() == pytest.approx(2.0)
    assert scalars["mae"].item() == pytest.approx(10.0)
    assert scalars["mse_mean"].item() == pytest.approx(0.5)
    assert head.predict(output).tolist() == [[40.0], [50.0]]


def test_a_frozen_backbone_gets_no_gradient_and_no_dropout():
    model = HeadedModel(Mean(), ClassHead([1.0, 1.0]), 0.0, frozen=True).train()
    batch = {"x": torch.randn(5, 3), "label": torch.tensor([0, 1, 0, 1, 1])}
    model.loss(batch)["loss"].backward()
    assert model.backbone.scale.grad is None
    assert model.head[1].weight.grad is not None
    assert torch.equal(model.backbone.embed(batch), batch["x"])
    assert not model.backbone.training
    assert model.head.training


def test_features_are_standardized_by_the_batches_given():
    model = HeadedModel(Mean(), NumberHead(0.0, 1.0), 0.0, frozen=False).train()
    x = torch.randn(40, 3) * torch.tensor([1.0, 10.0, 0.0]) + 100
    model.standardize({"x": part} for part in x.split(7))
    z = (x - model.center) / model.scale
    torch.testing.assert_close(z.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    assert model.training


def test_learning_rates_follow_the_width_under_a_head_too():
    settings = NeuroMamba(family="neuromamba", width=32, base_width=8, depth=1, state=4)
    model = HeadedModel(build_model(settings, 16), NumberHead(0.0, 1.0), 0.0, frozen=False)
    scales = model.learning_rate_scales()
    assert scales.pop("head.1.weight") == 1.0
    assert set(scales.values()) == {0.25}
    assert set(scales) <= {name for name, _ in model.named_parameters()}
    assert "backbone.blocks.0.mixer.in_proj.weight" in scales


@pytest.mark.parametrize("width", [128, 20_000])
def test_a_step_moves_the_output_no_more_in_wide_embeddings(width: int):
    """Of a head on 20,000 features at the full rate it would move by 100 times as much."""
    backbone = Mean()
    backbone.width, backbone.scale = width, torch.nn.Parameter(torch.ones(width))
    model = HeadedModel(backbone, NumberHead(0.0, 1.0), 0.0, frozen=True).train()
    torch.manual_seed(0)
    batch = {"x": torch.randn(4, width), "label": torch.ones(4)}
    optimiser = make_optimizer(model, Finetune(learning_rate=1e-3, weight_decay=0.0))
    set_learning_rate(optimiser, 1e-3)
    model.loss(batch)["loss"].backward()
    optimiser.step()
    moved = model.predict_features(model.features(batch)).abs().max().item()
    assert 0.02 < moved < 0.2


def test_a_full_model_gets_gradients_everywhere():
    model = HeadedModel(Mean(), NumberHead(0.0, 1.0), 0.0, frozen=False).train()
    torch.nn.init.ones_(model.head[1].weight)
    batch = {"x": torch.randn(5, 3), "label": torch.randn(5)}
    model.loss(batch)["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- Fine-tuning --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sex", "age"])
def test_finetuning_writes_a_model_that_knows_whom_it_has_seen(tmp_path, parts, target):
    finetune(tmp_path, target)
    info = load_model_info(folder_of(tmp_path, target))
    trained = {part: parts[part] for part in ("train", "validation")}
    assert info["subjects"] == trained
    assert info["pretrained_from"]["subjects"] == trained
    assert seen_subjects(info, "fake") == {*parts["train"], *parts["validation"]}
    assert {run.split("_")[0] for run in FakeStore.opened} == seen_subjects(info, "fake")
    assert info["best"]["step"] in (4, 8)


def test_finetuning_starts_from_the_pretrained_weights(tmp_path, parts):
    from safetensors.torch import load_file

    finetune(tmp_path, mode="head")
    before = load_file(
        Layout(tmp_path / "results", "fake").pretrain("tiny", 0) / "model.safetensors"
    )
    after = load_file(folder_of(tmp_path) / "model.safetensors")
    changed = [name for name in before if not torch.equal(after[f"backbone.{name}"], before[name])]
    assert changed == ["pool.weight"]
    finetune(tmp_path, mode="full", on_change="restart")
    after = load_file(folder_of(tmp_path) / "model.safetensors")
    changed = [name for name in before if not torch.equal(after[f"backbone.{name}"], before[name])]
    assert len(changed) > len(before) / 2


def test_without_a_pretrained_model_it_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    write_dataset(tmp_path)
    with pytest.raises(InputError, match=r"pretrain/model\.json does not exist"):
        finetune(tmp_path)


def test_a_pretrained_model_of_another_window_is_refused(tmp_path, parts):
    config = make_config(tmp_path, volumes=12, finetune=FINETUNE)
    with pytest.raises(InputError, match=r"model\.volumes: 8 -> 12"):
        run_finetune(config, "fake", "tiny", 0, "sex")


def test_subjects_without_a_label_are_left_out_and_counted(tmp_path, parts, capsys):
    set_cells(tmp_path, "sex", {parts["train"][0]: None, parts["validation"][1]: "unknown"})
    with pytest.warns(UserWarning, match="'unknown'"):
        finetune(tmp_path)
    info = load_model_info(folder_of(tmp_path))
    assert info["subjects"]["train"] == parts["train"][1:]
    assert info["subjects"]["validation"] == parts["validation"][:1]
    assert info["unlabelled"] == {"train": 1, "validation": 1}
    assert "1 of part train, 1 of part validation" in capsys.readouterr().err


def test_a_label_with_one_class_is_refused(tmp_path, parts):
    set_cells(tmp_path, "sex", dict.fromkeys(parts["train"], "M"))
    with pytest.raises(InputError, match="only class 'male' for all 10 training subjects") as error:
        finetune(tmp_path)
    assert str(tmp_path / "participants.tsv") in str(error.value)


def test_a_constant_number_is_refused(tmp_path, parts):
    set_cells(tmp_path, "age", dict.fromkeys(parts["train"], 30))
    with pytest.raises(InputError, match="only the value 30 for all"):
        finetune(tmp_path, "age")


def test_a_part_without_labels_is_refused(tmp_path, parts):
    set_cells(tmp_path, "sex", dict.fromkeys(parts["validation"], None))
    with pytest.raises(InputError, match="no subject of part 'validation'"):
        finetune(tmp_path)


def test_tasks_are_scaled_by_training_subjects_alone(tmp_path, parts):
    config = make_config(tmp_path)
    names = parts["train"]
    set_cells(tmp_path, "sex", {**dict.fromkeys(names[:8], "M"), **dict.fromkeys(names[8:], "F")})
    heads = {
        target: make_task(config, "fake", target, parts, read_labels(config, "fake", target))
        for target in ("sex", "age")
    }
    # female comes first in the config: 2 of 10 subjects, male 8 of 10.
    assert heads["sex"].weights.tolist() == pytest.approx([10 / 4, 10 / 16])
    ages = [20.0 + 3 * (int(name[4:]) - 1) for name in names]
    assert heads["age"].mean.item() == pytest.approx(np.mean(ages))
    assert heads["age"].sd.item() == pytest.approx(np.std(ages))


def test_the_kept_step_has_the_lowest_validation_loss(tmp_path, parts):
    finetune(tmp_path, steps=24, learning_rate=0.05)
    lines = (folder_of(tmp_path) / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["split"] == "validation"]
    best = load_model_info(folder_of(tmp_path))["best"]
    assert best["loss"] == min(row["loss"] for row in found)
    assert best["step"] == next(row["step"] for row in found if row["loss"] == best["loss"])


def test_changed_labels_are_another_training(tmp_path, parts):
    finetune(tmp_path)
    set_cells(tmp_path, "sex", {parts["train"][0]: "F", parts["train"][1]: "F"})
    with pytest.raises(InputError, match=r"inputs\.labels"):
        finetune(tmp_path)


def test_it_learns_an_effect_that_is_there(tmp_path, parts):
    change = {"learning_rate": 0.01, "validate_every": 10, "validation_windows": 3}
    config = finetune(tmp_path, steps=60, **change)
    predicted = predict(config, parts["test"] + parts["validation"]).set_index("subject")
    for subject, row in predicted.iterrows():
        sex = "female" if int(subject[4:]) % 2 else "male"
        assert row[f"prob_{sex}"] > 0.5


# --- Prediction ---------------------------------------------------------------------------------


def test_predictions_are_probabilities_by_class_name(tmp_path, parts):
    config = finetune(tmp_path)
    table = predict(config, parts["test"])
    assert list(table.columns) == ["subject", "prob_female", "prob_male"]
    assert list(table["subject"]) == parts["test"]
    np.testing.assert_allclose(table[["prob_female", "prob_male"]].sum(axis=1), 1, rtol=1e-6)


def test_values_are_in_the_targets_units(tmp_path, parts):
    config = finetune(tmp_path, "age")
    table = predict(config, parts["test"], "age")
    assert list(table.columns) == ["subject", "value"]
    assert table["value"].between(20, 62).all()


def test_a_prediction_depends_on_no_other_subject_and_no_order(tmp_path, parts):
    config = finetune(tmp_path)
    subjects = [*parts["test"], *parts["validation"], *parts["train"][:2]]
    together = predict(config, subjects).set_index("subject")
    backwards = predict(config, subjects[::-1]).set_index("subject")
    alone = pd.concat([predict(config, [subject]) for subject in subjects]).set_index("subject")
    pd.testing.assert_frame_equal(together, backwards.loc[subjects], check_exact=True)
    pd.testing.assert_frame_equal(together, alone, check_exact=True)


def test_a_prediction_is_the_mean_over_windows_and_runs(tmp_path, parts, monkeypatch):
    config = finetune(tmp_path)
    seen = []
    original = HeadedModel.features, HeadedModel.predict_features

    def keep_runs(self, batch):
        seen.append([set(batch["run"])])
        return original[0](self, batch)

    def keep_values(self, features):
        seen[-1].append(original[1](self, features))
        return seen[-1][1]

    monkeypatch.setattr(HeadedModel, "features", keep_runs)
    monkeypatch.setattr(HeadedModel, "predict_features", keep_values)
    (subject,) = [name for name in parts["test"] if int(name[4:]) % 2]
    table = predict(config, [subject])
    assert [len(runs) for runs, _ in seen] == [1, 1]
    windows = torch.cat([values for _, values in seen]).double()
    assert len(windows) == 6
    assert table["prob_male"][0] == pytest.approx(windows[:, 1].mean().item())


def test_it_is_to_the_bit_that_of_its_windows_one_run_at_a_time(tmp_path, parts):
    config = finetune(tmp_path)
    subject = parts["validation"][0]
    network = open_predictor(folder_of(tmp_path), "cpu").network
    layout, section = Layout.of(config, "fake"), config.models["tiny"]
    readers = make_readers(network, layout, section, config.tokens)
    windows = Windows(group_runs(list_runs(config, "fake", [subject], ["tokens"])), readers)
    values = []
    for run in windows.runs[subject]:
        of_run = [window for window in windows.spaced(3, [subject]) if window.run == run]
        for batch in windows.batches(of_run, 4):
            with torch.no_grad():
                values.append(network.predict_features(network.features(batch)).double())
    assert len(values) == 2
    expected = torch.cat(values).mean(0).tolist()
    assert predict(config, [subject]).iloc[0, 1:].tolist() == expected


def test_a_subject_without_a_run_is_named(tmp_path, parts):
    config = finetune(tmp_path)
    with pytest.raises(InputError, match="no run of sub-99 can be predicted"):
        predict(config, [parts["test"][0], "sub-99"])
    run = f"{parts['test'][1]}_task-rest_run-1"
    FakeStore.short = {run}
    with pytest.raises(InputError, match=rf"{run}.*volumes\.min_volumes"):
        predict(config, [parts["test"][1]])


def test_windows_are_merged_as_the_model_was_trained_whatever_the_config_says(tmp_path, parts):
    config = finetune(tmp_path, mode="head", learning_rate=0.1)
    expected = predict(config, parts["test"])
    probe = make_config(tmp_path, finetune={**FINETUNE, "mode": "probe"})
    pd.testing.assert_frame_equal(predict(probe, parts["test"]), expected, check_exact=True)


def test_prediction_under_another_order_of_classes_is_refused(tmp_path, parts):
    finetune(tmp_path)
    config = make_config(tmp_path, finetune=FINETUNE).model_dump()
    config["datasets"]["fake"]["targets"]["sex"]["classes"] = {"male": "M", "female": "F"}
    with pytest.raises(InputError, match=r"target\.classes"):
        predict(Config.model_validate(config), parts["test"])
