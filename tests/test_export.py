"""A model of a run is written to be shared: what its folder tells, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from fake_models import make_models, use_fake_stores
from fake_runs import make_config, write_dataset

from neuromamba.cli import main
from neuromamba.config import Model, save_config
from neuromamba.export import PAPERS, run_export
from neuromamba.files import InputError, read_json
from neuromamba.layout import Layout
from neuromamba.pretrain import run_pretrain
from neuromamba.pretrained import from_pretrained


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which a model was pretrained, and exported to `shared`."""
    folder = tmp_path_factory.mktemp("export")
    make_models(folder)
    return folder


@pytest.fixture(autouse=True)
def _fake_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_stores(monkeypatch)


# --- What the folder tells ----------------------------------------------------------------------


def test_every_family_names_its_papers() -> None:
    models, _ = get_args(Model)
    families = [get_args(one.model_fields["family"].annotation) for one in get_args(models)]
    assert {name for (name,) in families} == set(PAPERS)


def test_no_subject_or_run_is_named(made: Path) -> None:
    for name in ("README.md", "config.json"):
        text = (made / "shared" / name).read_text()
        assert "sub-" not in text
        assert str(made) not in text


def test_the_card_tells_data_preprocessing_and_validation(made: Path) -> None:
    card = (made / "shared" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["library_name"]) == ("unknown", "neuromamba")
    assert "Licence: not set" in card
    # Subjects 5 to 14 train, 1 and 2 validate; those with odd numbers have two runs.
    assert "| fake | train | 10 | 15 |" in card
    assert "| fake | validation | 2 | 3 |" in card
    assert "test" not in card.split("## Training")[0].split("## Data")[1]
    best = read_json(Layout(made / "results", "fake").pretrain("tiny", 0) / "model.json")["best"]
    assert f"| `skill_mean` | {best['skill_mean']:.4g} |" in card
    assert f"of which step {best['step']} was kept" in card
    assert "4 x 4 x 4 voxels of 2.0 mm" in card
    assert "Normalisation: `global` (minus the run's mean" in card
    assert '"learning_rate": 0.001' in card
    assert "{{" not in card
    assert "{%" not in card


def test_the_config_is_all_that_is_needed(made: Path) -> None:
    facts = read_json(made / "shared" / "config.json")
    assert (facts["format"], facts["model_type"]) == (1, "neuromamba")
    assert facts["volumes"]["denoise"]["strategy"] == []
    assert {**facts["volumes"], "denoise": None} == {
        "shape": [4, 4, 4],
        "voxel_size": 2.0,
        "denoise": None,
    }
    assert facts["tokens"] == {"patch": 2, "time_patch": 2, "brain_fraction": 0.0}
    assert "pretrain" not in facts["model"]
    assert facts["facts"]["training"]["steps"] == 8


def test_of_a_mixture_each_dataset_is_counted(tmp_path: Path) -> None:
    parts = write_dataset(tmp_path)
    raw = make_config(tmp_path).model_dump(mode="json")
    other = Layout(tmp_path / "results", "other")
    (tmp_path / "results" / "fake").rename(other.root)
    write_dataset(tmp_path)
    raw["datasets"]["other"] = raw["datasets"]["fake"]
    raw["mixtures"] = {"both": {"fake": 1.0, "other": 3.0}}
    raw["models"]["tiny"]["pretrain"]["mixture"] = "both"
    config = type(make_config(tmp_path)).model_validate(raw)
    run_pretrain(config, "both", "tiny", 0)
    run_export(config, "fake", "tiny", 0, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    for dataset in ("fake", "other"):
        assert f"| {dataset} | train | {len(parts['train'])} | 15 |" in card
    assert "sub-" not in card


def test_a_model_that_started_from_another_tells_so(made: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path)
    start = str(Layout(made / "results", "fake").pretrain("tiny", 0))
    steps = {"batch_size": 4, "validate_every": 4, "checkpoint_every": 4, "log_every": 2}
    config = make_config(tmp_path, pretrain={"steps": 4, "init_from": start, **steps})
    run_pretrain(config, "fake", "tiny", 0)
    run_export(config, "fake", "tiny", 0, tmp_path / "shared")
    facts = read_json(tmp_path / "shared" / "config.json")["facts"]
    earlier = {"dataset": "fake", "seed": 0, "subjects": {"train": 10, "validation": 2}}
    assert facts["pretrained_from"] == [earlier]
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "It started from a model pretrained on fake." in card
    assert str(made) not in card
    assert str(made) not in (tmp_path / "shared" / "config.json").read_text()


# --- What is refused ----------------------------------------------------------------------------


def test_a_model_whose_runs_have_changed_cannot_be_described(made: Path, tmp_path: Path) -> None:
    config = make_config(made)
    split = Layout(made / "results", "fake").split
    before = split.read_bytes()
    split.write_bytes(before.replace(b"sub-14\ttrain", b"sub-14\ttest"))
    try:
        with pytest.raises(InputError, match="the split or the runs have changed"):
            run_export(config, "fake", "tiny", 0, tmp_path / "shared")
    finally:
        split.write_bytes(before)
    assert not (tmp_path / "shared").exists()


def test_tokens_of_another_grid_cannot_be_described(made: Path, tmp_path: Path) -> None:
    raw = make_config(made).model_dump(mode="json")
    raw["volumes"]["voxel_size"] = 3.0
    config = type(make_config(made)).model_validate(raw)
    with pytest.raises(InputError, match=r"volumes\.voxel_size is 2\.0, the model needs 3\.0"):
        run_export(config, "fake", "tiny", 0, tmp_path / "shared")


def test_an_unfinished_training_cannot_be_exported(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="training has not finished"):
        run_export(make_config(made), "fake", "tiny", 7, tmp_path / "shared")


# --- The command --------------------------------------------------------------------------------


def test_the_command_writes_a_folder(made: Path, tmp_path: Path, capsys) -> None:
    save_config(tmp_path / "config.yaml", make_config(made))
    arguments = ["export", "--config", str(tmp_path / "config.yaml")]
    assert main([*arguments, "--output", str(tmp_path / "shared")]) == 0
    assert "set a licence" in capsys.readouterr().err
    assert from_pretrained(tmp_path / "shared").facts["name"] == "tiny"
    assert main([*arguments, "--output", str(tmp_path / "shared")]) == 2
    assert "exists already" in capsys.readouterr().err
