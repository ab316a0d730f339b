"""Prediction of new scans: by a model of tiny scans that went through the real data stages."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
from scans import GRID, affine_8mm, ball, series, write_scan

from neuromamba.attribution import attribute
from neuromamba.attribution_maskers import TokenMasker
from neuromamba.batches import Windows
from neuromamba.bids import run_index
from neuromamba.config import Config, Denoise, Volumes, save_config
from neuromamba.explainer import STEPS as TRIED
from neuromamba.explainer import Explainer, open_windows
from neuromamba.files import InputError, read_json, write_json
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.layout import Layout
from neuromamba.new_scans import Asked, find_scans
from neuromamba.predict import predict_scan, run_predict
from neuromamba.predicted import Outcome
from neuromamba.predictor import open_predictor
from neuromamba.pretrain import run_pretrain
from neuromamba.resample import target_affine
from neuromamba.tables import read_table, write_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

SPACE = "MNI152NLin2009cAsym"
SHAPE, N_VOLUMES = (20, 24, 21), 12
PARTS = {"train": range(1, 25), "validation": range(25, 37), "test": range(37, 43)}
SOME = [*range(1, 6), *range(25, 28), *range(37, 41)]
ANATOMY = np.random.default_rng(99).standard_normal((*SHAPE, 1)).astype(np.float32)
STEPS = {"batch_size": 8, "validate_every": 10, "checkpoint_every": 20, "log_every": 10}


def brain(number: int, run: int = 1, n_volumes: int = N_VOLUMES) -> np.ndarray:
    """A person's scan: everybody's anatomy, a little of their own, and noise, stronger in women."""
    noise = series(SHAPE, n_volumes, seed=1000 * run + number)
    noise = noise - noise.mean(axis=3, keepdims=True)
    own = np.random.default_rng(number).standard_normal((*SHAPE, 1))
    strength = 1.0 + 0.5 * (number % 2)
    return (1000 + 200 * ANATOMY + 20 * own + strength * noise).astype(np.float32)


def write_bids(
    root: Path,
    number: int,
    data: np.ndarray,
    entities: str = "task-rest",
    space: str | None = SPACE,
    mask: np.ndarray | None = None,
    time: float | None = 2.0,
    affine: np.ndarray | None = None,
) -> Path:
    """Write a run as fMRIPrep names it; return its BOLD."""
    of_space = f"_space-{space}" if space else ""
    stem = root / f"sub-{number:02d}" / "func" / f"sub-{number:02d}_{entities}{of_space}"
    affine = affine_8mm() if affine is None else affine
    bold = write_scan(Path(f"{stem}_desc-preproc_bold.nii.gz"), data, affine)
    where = ball(data.shape[:3]) if mask is None else mask
    write_scan(Path(f"{stem}_desc-brain_mask.nii.gz"), where.astype(np.uint8), affine)
    if time is not None:
        sidecar = Path(f"{stem}_desc-preproc_bold.json")
        sidecar.write_text(json.dumps({"RepetitionTime": time}))
    return bold


def make_config(folder: Path) -> Config:
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    return Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {
                "toy": {
                    "derivatives": str(folder / "derivatives"),
                    "participants": {"file": str(folder / "participants.tsv")},
                    "targets": {"sex": sex, "age": {"kind": "regression", "column": "age"}},
                }
            },
            "models": {
                "tiny": {
                    "family": "neuromamba",
                    **{"width": 8, "depth": 1, "state": 4, "head_dim": 8, "volumes": 4},
                    "pretrain": {"steps": 10, **STEPS},
                    "finetune": {
                        "steps": 40,
                        "mode": "head",
                        "evaluation_windows": 3,
                        "validation_windows": 3,
                        "learning_rate": 0.02,
                        **STEPS,
                    },
                }
            },
            "volumes": GRID,
            "tokens": {"patch": 4},
            "compute": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of sex and age, fine-tuned on scans in `derivatives`; some people have two runs."""
    folder = tmp_path_factory.mktemp("trained")
    config, layout = make_config(folder), Layout(folder / "results", "toy")
    rows = []
    for part, numbers in PARTS.items():
        for number in numbers:
            write_bids(folder / "derivatives", number, brain(number), "task-rest_run-1")
            if number % 6 == 1:
                write_bids(folder / "derivatives", number, brain(number, 2), "task-rest_run-2")
            rows.append((f"sub-{number:02d}", part))
    write_table(layout.split, pd.DataFrame(rows, columns=["subject", "part"]))
    people = pd.DataFrame({"participant_id": [name for name, _ in rows]})
    people["sex"] = ["F" if int(name[4:]) % 2 else "M" for name, _ in rows]
    people["age"] = [20.0 + int(name[4:]) for name, _ in rows]
    write_table(folder / "participants.tsv", people)
    run_index(config, "toy")
    run_volumes(config, "toy", 0)
    run_tokens(config, "toy", 0)
    run_pretrain(config, "toy", "tiny", 0)
    for target in ("sex", "age"):
        run_finetune(config, "toy", "tiny", 0, target)
    save_config(layout.config, config)
    return folder


@pytest.fixture(scope="module")
def everybody(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The predicted sex of all runs of twelve people, of each part some."""
    folder = tmp_path_factory.mktemp("some")
    for number in SOME:
        name = f"sub-{number:02d}"
        (folder / name).symlink_to(trained / "derivatives" / name)
    table, done = predict(trained, tmp_path_factory.mktemp("table"), folder)
    assert done
    return table


def model_of(folder: Path, target: str = "sex") -> Path:
    return Layout(folder / "results", "toy").finetune("tiny", 0, target)


def predict(
    trained: Path, out: Path, *scans: Path, target: str = "sex", **options: Any
) -> tuple[pd.DataFrame, bool]:
    path = out / "predicted.tsv"
    done = run_predict(model_of(trained, target), scans, path, device="cpu", **options)
    return read_table(path), done


def refusal(trained: Path, out: Path, scan: Path, **options: Any) -> str:
    """The reason in the one row of a scan that must be refused."""
    table, done = predict(trained, out, scan, **options)
    (row,) = table.to_dict("records")
    assert not done
    assert pd.isna(row["prediction"])
    return str(row["reason"])


# --- The same as the evaluation -------------------------------------------------------------------


@pytest.mark.parametrize("target", ["sex", "age"])
def test_predictions_are_those_of_the_evaluation(trained: Path, tmp_path: Path, target: str):
    config = make_config(trained)
    subjects = [f"sub-{number:02d}" for number in PARTS["test"]]
    expected = predict_subjects(config, "toy", "tiny", 0, target, subjects).set_index("subject")
    folders = tmp_path / "copied"
    for name in subjects:
        shutil.copytree(trained / "derivatives" / name, folders / name)
    shutil.copytree(model_of(trained, target), tmp_path / "model")
    table = tmp_path / "new.tsv"
    assert run_predict(tmp_path / "model", [folders], table, level="subject", device="cpu")
    found = read_table(table).set_index("subject")
    assert list(found.index) == subjects
    assert list(found["runs"]) == [2 if number % 6 == 1 else 1 for number in PARTS["test"]]
    if target == "age":
        assert found["prediction"].tolist() == expected["value"].tolist()
        mean, sd = np.mean(20.0 + np.array(PARTS["train"])), np.std(PARTS["train"])
        assert found["z"].to_numpy() == pytest.approx((found["prediction"] - mean) / sd, rel=1e-5)
        return
    for name in ("female", "male"):
        assert found[f"uncalibrated_{name}"].tolist() == expected[f"prob_{name}"].tolist()
    best = expected.idxmax(axis=1).str.removeprefix("prob_")
    assert found["prediction"].tolist() == best.tolist()


def test_a_run_is_the_same_alone_and_among_others(
    trained: Path, tmp_path: Path, everybody: pd.DataFrame
):
    folder = trained / "derivatives"
    file = folder / "sub-37" / "func" / f"sub-37_task-rest_run-2_space-{SPACE}_desc-preproc_bold"
    alone, _ = predict(trained, tmp_path, file.with_name(f"{file.name}.nii.gz"))
    assert len(everybody) == 12 + 3
    assert list(alone["run"]) == ["sub-37_task-rest_run-2"]
    among = everybody[everybody["run"].isin(alone["run"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(
        among.drop(columns="scan"), alone.drop(columns="scan"), check_dtype=False
    )


def test_a_folder_of_one_subject_holds_its_runs(trained: Path):
    derivatives = trained / "derivatives"
    of_one = find_scans([derivatives / "sub-37"], SPACE, Asked())
    every = find_scans([derivatives], SPACE, Asked())
    expected = [scan for scan in every if scan.subject == "sub-37"]
    assert [scan.source for scan in of_one] == [scan.source for scan in expected]
    assert [scan.root for scan in of_one] == [scan.root for scan in expected]
    assert len(of_one) == 2


def test_a_scan_given_twice_is_predicted_once(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path / "new", 77, brain(77))
    table, _ = predict(trained, tmp_path, bold, tmp_path / "new", bold)
    assert len(table) == 1


def test_nothing_is_left_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    bold = write_bids(tmp_path / "new", 77, brain(77))
    broken = write_bids(tmp_path / "new", 78, brain(78))
    broken.write_bytes(broken.read_bytes()[:-2000])
    before = sorted(tmp_path.rglob("*"))
    run_predict(model_of(trained), [bold, broken], device="cpu")
    assert sorted(tmp_path.rglob("*")) == before
    assert "1 predicted, 1 refused" in capsys.readouterr().out


# --- Calibration, intervals, distances ------------------------------------------------------------


def test_probabilities_are_calibrated_as_the_model_says(trained: Path, everybody: pd.DataFrame):
    table = everybody
    given = table[["uncalibrated_female", "uncalibrated_male"]].to_numpy()
    found = table[["prob_female", "prob_male"]].to_numpy()
    of_run = open_predictor(model_of(trained), "cpu").calibration.levels["run"]
    expected = of_run.rescaling.apply(given) if of_run.rescaling else given
    np.testing.assert_allclose(found, expected, atol=1e-12)
    own = table["prediction"].map({"female": 0, "male": 1})
    assert table["probability"].tolist() == found[np.arange(len(found)), own].tolist()


def test_numbers_have_intervals_where_there_are_subjects_enough(
    trained: Path, tmp_path: Path, capsys
):
    bold = write_bids(tmp_path / "new", 77, brain(77))
    table, _ = predict(trained, tmp_path, bold, target="age", confidence=0.9)
    errors = read_json(model_of(trained, "age") / "calibration.json")["levels"]["run"]["scores"]
    width = sorted(errors["value"])[11]  # ceil(13 * 0.9) of 12
    row = table.iloc[0]
    assert (row["high"] - row["prediction"], row["prediction"] - row["low"]) == pytest.approx(
        (width, width)
    )
    capsys.readouterr()
    table, _ = predict(trained, tmp_path, bold, target="age", confidence=0.95)
    assert pd.isna(table.loc[0, ["low", "high"]]).all()
    assert "12 validation subjects are fewer than the 19 that 95% take" in capsys.readouterr().out


def test_sets_hold_the_classes_that_cannot_be_excluded(trained: Path, tmp_path: Path, capsys):
    bold = write_bids(tmp_path / "new", 77, brain(77))
    table, _ = predict(trained, tmp_path, bold, confidence=0.9)
    # Six validation subjects of each class exclude nothing at 90 %, which is said.
    assert table.loc[0, "set"] == "female|male"
    assert "fewer than 9 of 12 validation subjects are female or male" in capsys.readouterr().out
    table, _ = predict(trained, tmp_path, bold, confidence=0.5)
    scores = read_json(model_of(trained) / "calibration.json")["levels"]["run"]["scores"]
    expected = [
        name
        for name in ("female", "male")
        # The second of six has a p-value of 6 / 7, the fifth one of 3 / 7.
        if 1 - table.loc[0, f"uncalibrated_{name}"] <= scores[name][3]
    ]
    assert table.loc[0, "set"] == ("|".join(expected) or "none")


def test_a_scan_like_the_training_is_near_and_one_of_another_contrast_is_not(
    trained: Path, tmp_path: Path
):
    for number in range(50, 70):
        write_bids(tmp_path / "alike", number, brain(number))
    alike, _ = predict(trained, tmp_path, tmp_path / "alike")
    told = alike["warning"].astype(str).str.contains("unlike the training")
    assert told.mean() <= 0.25  # one in twenty by chance
    data = brain(71)
    shuffled = np.random.default_rng(0).permuted(data.reshape(-1, N_VOLUMES), axis=0)
    others = {71: 2000 - data, 72: shuffled.reshape(data.shape)}
    for number, other in others.items():
        write_bids(tmp_path / "others", number, other.astype(np.float32))
    found, done = predict(trained, tmp_path, tmp_path / "others")
    assert done
    assert found["warning"].str.contains("unlike the training").all()
    assert found["distance"].min() > alike["distance"].max()
    assert (found["percentile"] == 100).all()


def test_a_subject_that_was_trained_on_is_told(everybody: pd.DataFrame):
    told = everybody["warning"].astype(str).str.contains("the model was trained or chosen on")
    seen = {f"sub-{number:02d}" for number in SOME if number not in PARTS["test"]}
    assert set(everybody.loc[told, "subject"]) == seen


def test_an_older_model_predicts_uncalibrated_and_says_so(trained: Path, tmp_path: Path, capsys):
    shutil.copytree(trained / "results", tmp_path / "results")
    folder = model_of(tmp_path)
    info = read_json(folder / "model.json")
    for name in ("calibration.json", "calibration.safetensors"):
        (folder / name).unlink()
        del info["files"][name]
    write_json(folder / "model.json", info)
    bold = write_bids(tmp_path / "new", 77, brain(77))
    expected, _ = predict(trained, tmp_path, bold)
    capsys.readouterr()
    table, done = predict(tmp_path, tmp_path, bold)
    assert done
    assert "uncalibrated: the model is from before" in capsys.readouterr().out
    assert table.loc[0, "prob_male"] == expected.loc[0, "uncalibrated_male"]
    assert pd.isna(table.loc[0, ["set", "distance", "percentile"]]).all()
    Layout(tmp_path / "results", "toy").config.unlink()
    with pytest.raises(InputError, match=r"config\.yaml is not there to tell; train it again"):
        open_predictor(folder, "cpu")


# --- Scans that do not fit ------------------------------------------------------------------------


def test_the_others_go_on_where_one_scan_is_refused(trained: Path, tmp_path: Path, capsys):
    write_bids(tmp_path / "new", 77, brain(77))
    short = write_bids(tmp_path / "new", 78, brain(78, n_volumes=5))
    (tmp_path / "new" / "sub-79" / "func").mkdir(parents=True)
    table, done = predict(trained, tmp_path, tmp_path / "new", tmp_path / "nowhere.nii.gz")
    assert not done
    assert table["prediction"].notna().tolist() == [True, False, False, False]
    reasons = table["reason"].tolist()[1:]
    assert str(short) in reasons[0]
    assert "has 5 volumes, and the model reads windows of 4" in reasons[0]
    assert "sub-79 has no run in space MNI152NLin2009cAsym" in reasons[1]
    assert "nowhere.nii.gz does not exist" in reasons[2]
    assert "1 predicted, 3 refused" in capsys.readouterr().out


def test_another_space_is_refused(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path, 77, brain(77), space="MNI152NLin6Asym")
    assert "in the space MNI152NLin6Asym" in refusal(trained, tmp_path, bold)
    bold = write_bids(tmp_path, 78, brain(78), space=None)
    reason = refusal(trained, tmp_path, bold)
    assert "its name has no space-" in reason
    assert f"give --space {SPACE}" in reason
    assert predict(trained, tmp_path, bold, asked=Asked(space=SPACE))[1]
    folder = tmp_path / "folder"
    write_bids(folder, 77, brain(77), space="MNI152NLin6Asym")
    assert "there are: space-MNI152NLin6Asym" in refusal(trained, tmp_path, folder)


def test_a_mask_is_found_or_given_or_missed(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path, 77, brain(77))
    expected, _ = predict(trained, tmp_path, bold)
    named = bold.with_name(bold.name.replace("preproc_bold", "brain_mask"))
    other = named.rename(tmp_path / "mask.nii.gz")
    assert "give --mask FILE" in refusal(trained, tmp_path, bold)
    table, done = predict(trained, tmp_path, bold, asked=Asked(mask=other))
    assert done
    pd.testing.assert_frame_equal(table, expected)
    with pytest.raises(InputError, match="--mask is the mask of one scan"):
        predict(trained, tmp_path, bold, bold, asked=Asked(mask=other))


def test_a_file_of_any_name_is_predicted_when_all_else_is_given(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path, 77, brain(77))
    expected, _ = predict(trained, tmp_path, bold)
    mask = bold.with_name(bold.name.replace("preproc_bold", "brain_mask"))
    plain = shutil.copy(bold, tmp_path / "scan of 77.nii.gz")
    asked = {"mask": mask, "space": SPACE}
    reason = refusal(trained, tmp_path, Path(plain), asked=Asked(**asked))
    assert "give --repetition-time SECONDS" in reason
    asked["repetition_time"] = 2.0
    table, done = predict(trained, tmp_path, Path(plain), asked=Asked(**asked))
    assert done
    assert table.loc[0, "subject"] == "sub-scanof77"
    assert table.loc[0, "prob_male"] == expected.loc[0, "prob_male"]


def test_sidecars_are_inherited_and_missed(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path / "new", 77, brain(77), time=None)
    assert "missing TR" in refusal(trained, tmp_path, bold)
    (tmp_path / "new" / "task-rest_bold.json").write_text('{"RepetitionTime": 2.0}')
    assert predict(trained, tmp_path, bold)[1]
    scan = find_scans([bold], SPACE, Asked())[0]
    (row,) = find_scans([tmp_path / "new"], SPACE, Asked())
    assert scan.source == row.source


def test_confounds_are_found_beside_a_file_as_in_a_folder(tmp_path: Path):
    bold = write_bids(tmp_path / "new", 77, brain(77))
    table = bold.with_name("sub-77_task-rest_desc-confounds_timeseries.tsv")
    table.write_text("csf\n" + "0\n" * N_VOLUMES)
    (scan,) = find_scans([bold], SPACE, Asked())
    (row,) = find_scans([tmp_path / "new"], SPACE, Asked())
    assert scan.source.confounds == table
    assert scan.source == row.source
    assert (scan.subject, scan.run, scan.n_volumes) == (row.subject, row.run, row.n_volumes)


def test_a_repetition_time_far_from_the_training_is_refused_unless_allowed(
    trained: Path, tmp_path: Path
):
    bold = write_bids(tmp_path, 77, brain(77), time=0.7)
    reason = refusal(trained, tmp_path, bold)
    assert "repetition time 0.7 s, trained on 2 s" in reason
    assert "--any-repetition-time" in reason
    table, done = predict(trained, tmp_path, bold, any_repetition_time=True)
    assert done
    assert "repetition time 0.7 s, trained on 2 s" in table.loc[0, "warning"]
    near = write_bids(tmp_path, 78, brain(78), time=2.4)
    table, done = predict(trained, tmp_path, near)
    assert done
    assert "repetition time 2.4 s, trained on 2 s" in table.loc[0, "warning"]


def test_a_run_shorter_than_all_of_the_training_is_told(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path, 77, brain(77, n_volumes=9))
    table, done = predict(trained, tmp_path, bold)
    assert done
    assert table.loc[0, "warning"].startswith("8 volumes, trained on runs of at least 12")


def test_too_little_brain_is_refused(trained: Path, tmp_path: Path):
    half = ball(SHAPE)
    half[:, 12:] = False
    bold = write_bids(tmp_path, 77, brain(77), mask=half)
    assert "of the brain as training runs do" in refusal(trained, tmp_path, bold)
    slab = ball(SHAPE)
    slab[:, :, :7] = False
    bold = write_bids(tmp_path, 78, brain(78), mask=slab)
    table, done = predict(trained, tmp_path, bold)
    assert done
    assert "of the brain, training runs at least 100%" in table.loc[0, "warning"]


def test_a_brain_that_lies_elsewhere_is_refused(trained: Path, tmp_path: Path):
    affine = affine_8mm()
    affine[2, 3] += 40
    bold = write_bids(tmp_path, 77, brain(77), affine=affine)
    assert "of the brain as training runs do" in refusal(trained, tmp_path, bold)
    wide = affine_8mm() @ np.diag([1.3, 1.3, 1.3, 1.0])
    wide[:3, 3] = 1.3 * (affine_8mm()[:3, 3] - [5, -26, 14]) + [5, -26, 14]
    bold = write_bids(tmp_path, 78, brain(78), affine=wide)
    assert "lies where training runs have none" in refusal(trained, tmp_path, bold)


def test_nan_in_the_brain_and_a_missing_affine_are_refused(trained: Path, tmp_path: Path):
    data = brain(77)
    data[10, 12, 10, 3] = np.nan
    bold = write_bids(tmp_path, 77, data)
    assert "NaN or infinite in volume 3" in refusal(trained, tmp_path, bold)
    bold = write_bids(tmp_path, 78, brain(78))
    image = nibabel.load(bold)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, bold)
    assert "neither sform nor qform" in refusal(trained, tmp_path, bold)


def test_scans_are_denoised_as_the_models_were(trained: Path, tmp_path: Path):
    predictor = open_predictor(model_of(trained), "cpu")
    (scan,) = find_scans([write_bids(tmp_path, 77, brain(77))], SPACE, Asked())
    plain = predict_scan(predictor, scan, False)

    def denoising(**settings: Any) -> Outcome:
        volumes = predictor.volumes.model_copy(update={"denoise": Denoise(**settings)})
        return predict_scan(replace(predictor, volumes=volumes), scan, False)

    detrended = denoising(detrend=True)
    assert not np.array_equal(detrended.observed.features, plain.observed.features)
    assert "confounds" in denoising(strategy=["motion"]).reason
    slow = find_scans([scan.source.bold], SPACE, Asked())[0]
    slow = replace(slow, source=replace(slow.source, repetition_time=3.5))
    assert "repetition time 3.5 s" in predict_scan(predictor, slow, False).reason
    # Where all are resampled to one, that of the scan is no matter.
    volumes = predictor.volumes.model_copy(update={"denoise": Denoise(repetition_time=4.0)})
    resampled = predict_scan(replace(predictor, volumes=volumes), slow, False)
    assert resampled.observed is not None


def test_a_volume_or_a_text_is_no_run(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path, 77, brain(77)[..., 0])
    assert "is 3D" in refusal(trained, tmp_path, bold)
    text = tmp_path / f"sub-79_task-rest_space-{SPACE}_bold.txt"
    text.write_text("no scan")
    assert "neither a NIfTI file" in refusal(trained, tmp_path, text)


def test_a_subject_is_predicted_by_the_runs_that_fit(trained: Path, tmp_path: Path):
    write_bids(tmp_path / "new", 77, brain(77), "task-rest_run-1")
    write_bids(tmp_path / "new", 77, brain(77, 2, n_volumes=5), "task-rest_run-2")
    write_bids(tmp_path / "other", 77, brain(78))
    table, done = predict(trained, tmp_path, tmp_path / "new", tmp_path / "other", level="subject")
    assert not done
    # The same name in two folders is two people.
    assert table["runs"].tolist() == [1, 1]
    assert "left out: sub-77_task-rest_run-2:" in table.loc[0, "warning"]
    assert pd.isna(table.loc[0, "reason"])


# --- Maps -----------------------------------------------------------------------------------------


def read_map(folder: Path, name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """(x, y, z, volume), and the sidecar."""
    sidecar = folder / name.replace(".nii.gz", ".json")
    return nibabel.load(folder / name).get_fdata(), read_json(sidecar)


@pytest.fixture(scope="module")
def mapped(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """Maps of the predicted sex of a subject with two runs, and of one whose scan is too short."""
    folder = tmp_path_factory.mktemp("mapped")
    shutil.copytree(trained / "derivatives" / "sub-37", folder / "new" / "sub-37")
    write_bids(folder / "new", 78, brain(78, n_volumes=5))
    table, done = predict(trained, folder, folder / "new", explain=folder / "maps")
    assert not done
    return folder, table


def test_a_map_of_each_predicted_run_is_written(mapped: tuple[Path, pd.DataFrame]):
    folder, table = mapped
    stems = [
        f"sub-37/sub-37_task-rest_run-{k}_space-{SPACE}_desc-attribution_statmap" for k in "12"
    ]
    assert table["map"].tolist()[:2] == [f"{stem}.nii.gz" for stem in stems]
    assert pd.isna(table.loc[2, "map"])
    written = [str(p.relative_to(folder / "maps")) for p in (folder / "maps").rglob("*.*")]
    expected = [f"{stem}.{ending}" for stem in stems for ending in ("nii.gz", "json")]
    assert sorted(written) == sorted(["dataset_description.json", *expected])
    assert read_json(folder / "maps" / "dataset_description.json")["DatasetType"] == "derivative"
    for row in table.head(2).to_dict("records"):
        image = nibabel.load(folder / "maps" / row["map"])
        np.testing.assert_allclose(image.affine, target_affine(Volumes.model_validate(GRID)))
        values, about = read_map(folder / "maps", row["map"])
        other = {"male": "female", "female": "male"}[row["prediction"]]
        assert about["explains"] == f"logit of {row['prediction']} minus that of {other}"
        assert about["prediction"] == row["prediction"]
        assert about["volumes"] == ["strength", "signed"]
        assert [Path(path).name[:22] for path in about["Sources"]] == [row["run"]]
        assert about["completeness"]["gap"] < 0.01
        assert (values[..., 0] >= np.abs(values[..., 1]) - 1e-6).all()


def test_maps_are_those_of_explain(trained: Path, mapped: tuple[Path, pd.DataFrame]):
    folder, table = mapped
    predictor, config = open_predictor(model_of(trained), "cpu"), make_config(trained)
    predictor.network.requires_grad_(False)
    masker = TokenMasker(predictor.volumes, predictor.tokens)
    windows = open_windows(config, "toy", predictor, ["sub-37"])
    windows = Windows({"sub-37": windows.runs["sub-37"][:1]}, windows._readers)
    positive = predictor.classes.index(table.loc[0, "prediction"])
    values, about = read_map(folder / "maps", table.loc[0, "map"])
    explainer = Explainer(predictor, masker, positive, about["steps"])
    assert about["steps"] in TRIED[:-1]
    one = explainer.explain(predictor.network, windows, "sub-37")
    np.testing.assert_array_equal(values[..., 0], one.strength)
    np.testing.assert_array_equal(values[..., 1], one.signed)
    assert one.strength.max() > 0


def test_a_subject_has_the_map_of_all_its_runs(trained: Path, mapped: tuple[Path, pd.DataFrame]):
    folder, runs = mapped
    maps = folder / "by-subject"
    table, _ = predict(trained, folder, folder / "new", level="subject", explain=maps)
    assert table["map"].notna().tolist() == [True, False]
    values, about = read_map(maps, table.loc[0, "map"])
    assert table.loc[0, "map"] == f"sub-37/sub-37_space-{SPACE}_desc-attribution_statmap.nii.gz"
    assert (about["windows"], len(about["Sources"])) == (4, 2)
    each = []
    for row in runs.head(2).to_dict("records"):
        of_run, _ = read_map(folder / "maps", row["map"])
        of_run[..., 1] *= 1 if row["prediction"] == table.loc[0, "prediction"] else -1
        each.append(of_run)
    np.testing.assert_allclose(values, np.mean(each, axis=0), rtol=1e-3, atol=1e-6)


def test_numbers_have_maps_in_their_units(trained: Path, tmp_path: Path):
    bold = write_bids(tmp_path / "new", 77, brain(77))
    table, _ = predict(trained, tmp_path, bold, target="age", explain=tmp_path / "maps")
    values, about = read_map(tmp_path / "maps", table.loc[0, "map"])
    assert about["explains"] == "predicted age"
    assert about["prediction"] == table.loc[0, "prediction"]
    assert np.abs(values[..., 1]).sum() > 0


def test_no_maps_are_made_unless_asked_for(everybody: pd.DataFrame):
    assert "map" not in everybody


def test_maps_of_one_name_are_refused_before_anything_is_made(trained: Path, tmp_path: Path):
    for folder in ("new", "other"):
        write_bids(tmp_path / folder, 77, brain(77))
    scans = [tmp_path / "new", tmp_path / "other"]
    for level, name in (("run", "sub-77_task-rest"), ("subject", "sub-77")):
        with pytest.raises(InputError, match=f"several of the scans are named {name},"):
            predict(trained, tmp_path, *scans, level=level, explain=tmp_path / "maps")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "other"]


def test_a_folder_of_maps_that_is_a_file_is_refused_before_anything_is_predicted(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bold = write_bids(tmp_path / "new", 77, brain(77))
    monkeypatch.setattr("neuromamba.predict.predict_scan", lambda *_: pytest.fail("predicted"))
    (tmp_path / "maps").touch()
    with pytest.raises(InputError, match="maps is a file; give a folder"):
        predict(trained, tmp_path, bold, explain=tmp_path / "maps")


def test_a_prediction_stays_where_its_map_cannot_be_made(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    write_bids(tmp_path / "new", 77, brain(77))
    write_bids(tmp_path / "new", 79, brain(79))

    def fail(network: Any, batch: Any, positive: int, steps: int) -> Any:
        if batch["subject"][0] == "sub-77":
            raise InputError("the gradient is\nnot finite")
        return attribute(network, batch, positive, steps)

    monkeypatch.setattr("neuromamba.explainer.attribute", fail)
    table, done = predict(trained, tmp_path, tmp_path / "new", explain=tmp_path / "maps")
    assert done
    assert table["prediction"].notna().all()
    assert table["map"].isna().tolist() == [True, False]
    assert table.loc[0, "warning"].endswith("no map: the gradient is not finite")
    assert "maps (1)" in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "maps").glob("sub-*"))] == ["sub-79"]


# --- Models that do not serve ---------------------------------------------------------------------


def test_only_a_finished_finetuning_predicts(trained: Path, tmp_path: Path):
    layout = Layout(trained / "results", "toy")
    for folder, message in (
        (layout.pretrain("tiny", 0), "of the stage 'pretrain'.*finetune/TARGET"),
        (tmp_path, "training has not finished"),
        (tmp_path / "nowhere", "is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            open_predictor(folder, "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="written by `neuromamba export`"):
        open_predictor(tmp_path, "cpu")


def test_a_confidence_is_a_share(trained: Path, tmp_path: Path):
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(InputError, match="--confidence"):
            predict(trained, tmp_path, tmp_path, confidence=confidence)
