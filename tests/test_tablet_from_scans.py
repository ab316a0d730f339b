"""A model of codes from scans to predictions, also of a new scan by the tokenizer it learnt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scans import GRID, affine_8mm, ball, series, write_scan

from neuromamba.bids import run_index
from neuromamba.code_windows import CodeStore
from neuromamba.codes import run_codes
from neuromamba.config import Config
from neuromamba.files import InputError, read_json
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.layout import Layout
from neuromamba.new_scans import Asked, find_scans
from neuromamba.predict import run_predict, see
from neuromamba.predictor import open_predictor, with_tokenizer
from neuromamba.pretrain import run_pretrain
from neuromamba.tables import read_table, write_table
from neuromamba.tokenizer import run_tokenizer
from neuromamba.volumes import run_volumes

PARTS = {"train": range(1, 9), "validation": range(9, 13), "test": range(13, 15)}
STEPS = {"steps": 4, "batch_size": 4, "validate_every": 2, "checkpoint_every": 2, "log_every": 2}
SLICES = {"channels": 4, "width": 8, "depth": 0, "steps": 4, "batch_size": 8}
SHAPE, SPACE = (20, 24, 21), "MNI152NLin2009cAsym"

torch.set_num_threads(1)


def make_config(folder: Path) -> Config:
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    small = {"width": 16, "depth": 1, "heads": 4, "groups": 2, "hidden": 24, "volumes": 4}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {
                "toy": {
                    "derivatives": str(folder / "derivatives"),
                    "participants": {"file": str(folder / "participants.tsv")},
                    "targets": {"sex": sex},
                }
            },
            "models": {
                "tiny": {
                    "family": "tablet",
                    **small,
                    "pretrain": STEPS,
                    "finetune": {**STEPS, "evaluation_windows": 3},
                }
            },
            "volumes": GRID,
            "tokens": {"patch": 4},
            "codes": {"tokenizer": "slices", "slices": SLICES},
            "compute": {"device": "cpu"},
        }
    )


def write_subject(root: Path, number: int) -> Path:
    stem = root / f"sub-{number:02d}" / "func" / f"sub-{number:02d}_task-rest_space-{SPACE}"
    data = series(SHAPE, 12, seed=number)
    bold = write_scan(Path(f"{stem}_desc-preproc_bold.nii.gz"), data, affine_8mm())
    mask = ball(SHAPE).astype(np.uint8)
    write_scan(Path(f"{stem}_desc-brain_mask.nii.gz"), mask, affine_8mm())
    Path(f"{stem}_desc-preproc_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    return bold


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    config, rows = make_config(folder), []
    for part, numbers in PARTS.items():
        for number in numbers:
            write_subject(folder / "derivatives", number)
            rows.append((f"sub-{number:02d}", part))
    write_table(Layout.of(config, "toy").split, pd.DataFrame(rows, columns=["subject", "part"]))
    people = pd.DataFrame({"participant_id": [name for name, _ in rows]})
    people["sex"] = ["F" if int(name[4:]) % 2 else "M" for name, _ in rows]
    write_table(folder / "participants.tsv", people)
    run_index(config, "toy")
    run_volumes(config, "toy", 0)
    run_tokenizer(config, "toy")
    run_codes(config, "toy", 0)
    run_pretrain(config, "toy", "tiny", 0)
    run_finetune(config, "toy", "tiny", 0, "sex")
    return folder


def test_a_new_scan_is_predicted_as_a_run_of_the_dataset(trained: Path, tmp_path: Path) -> None:
    config = make_config(trained)
    layout = Layout.of(config, "toy")
    expected = predict_subjects(config, "toy", "tiny", 0, "sex", ["sub-13", "sub-14"])
    scan = write_subject(tmp_path / "new", 13)
    folder = shutil.copytree(layout.finetune("tiny", 0, "sex"), tmp_path / "model")
    own = shutil.copytree(layout.tokenizer, tmp_path / "tokenizer")
    predictor = with_tokenizer(open_predictor(folder, "cpu"), own)
    (found,) = find_scans([scan], SPACE, Asked())
    observed, n_volumes = see(predictor, found.source)
    assert n_volumes == 12
    probabilities = [expected[name][0] for name in ("prob_female", "prob_male")]
    assert observed.values.mean(0).tolist() == pytest.approx(probabilities, abs=1e-9)
    table = tmp_path / "out.tsv"
    assert run_predict(folder, [scan], table, Asked(), device="cpu", tokenizer=own)
    row = read_table(table).iloc[0]
    assert row["prediction"] == ("male" if expected["prob_male"][0] > 0.5 else "female")
    assert row["windows"] == 3


def test_a_new_scan_needs_the_models_own_tokenizer(trained: Path, tmp_path: Path) -> None:
    layout = Layout.of(make_config(trained), "toy")
    folder = layout.finetune("tiny", 0, "sex")
    scan = write_subject(tmp_path / "new", 13)

    def refuse(told: str, tokenizer: Path | None) -> None:
        with pytest.raises(InputError, match=told):
            run_predict(folder, [scan], None, Asked(), device="cpu", tokenizer=tokenizer)

    refuse("name its folder by --tokenizer", None)
    refuse("there is no such folder", tmp_path / "nothing")
    config = make_config(trained)
    other = config.codes.slices.model_copy(update={"seed": 1})
    changed = config.codes.model_copy(update={"slices": other})
    config = config.model_copy(update={"codes": changed})
    shutil.move(layout.tokenizer, tmp_path / "kept")
    try:
        run_tokenizer(config, "toy")
        shutil.move(layout.tokenizer, tmp_path / "other")
    finally:
        shutil.copytree(tmp_path / "kept", layout.tokenizer)
    refuse("this is another one", tmp_path / "other")


def test_the_model_has_learnt_whose_codes_it_reads(trained: Path) -> None:
    layout = Layout.of(make_config(trained), "toy")
    codes = read_json(layout.finetune("tiny", 0, "sex") / "model.json")["settings"]["codes"]
    tokenizer = read_json(layout.tokenizer / "model.json")["files"]["model.safetensors"]
    assert codes["tokenizer"]["sha256"] == tokenizer
    assert codes["code_width"] == 24 * SLICES["channels"]
    assert (codes["voxel_size"], codes["normalization"], codes["n_tokens"]) == (8, "maximum", 27)
    store = CodeStore(layout.array("codes", "sub-01_task-rest"))
    assert store.window(3, 2).shape == (2, 27, codes["code_width"])
