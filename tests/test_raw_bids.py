"""Which raw scans are found, what belongs together, and what their sidecars say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_bids import write_bold
from fake_raw import GOOD, add_raw_run, add_subject, add_t1w, sidecar_of

from neuromamba.config import Dataset
from neuromamba.files import InputError
from neuromamba.raw_bids import RawSubject, find_raw_subjects, fingerprint_subject
from neuromamba.sidecars import find_sidecars, merge_sidecars


def dataset(root: Path, **settings: Any) -> Dataset:
    return Dataset(bids=str(root), derivatives="unused", **settings)


def find(root: Path, **settings: Any) -> list[RawSubject]:
    return find_raw_subjects(dataset(root, **settings))


def names(root: Path, **settings: Any) -> list[str]:
    return [run.name for subject in find(root, **settings) for run in subject.runs]


# --- What is found ------------------------------------------------------------------------------


def test_sessions_tasks_runs_and_t1w_images_of_all_sessions(tmp_path: Path):
    for entities in (
        "sub-02_ses-1_task-rest_run-2",
        "sub-02_ses-1_task-rest_run-1",
        "sub-02_ses-2_task-nback_dir-AP_acq-x",
        "sub-01_task-rest",
    ):
        add_raw_run(tmp_path, entities)
    images = [add_t1w(tmp_path, "sub-02_ses-2"), add_t1w(tmp_path, "sub-02_ses-1_acq-mp")]
    first, second = find(tmp_path)
    assert (first.name, first.t1w) == ("sub-01", ())
    assert [run.name for run in second.runs] == [
        "sub-02_ses-1_task-rest_run-1",
        "sub-02_ses-1_task-rest_run-2",
        "sub-02_ses-2_task-nback_acq-x_dir-AP",
    ]
    run = second.runs[0]
    assert run.subject == "sub-02"
    assert run.entities == {"sub": "02", "ses": "1", "task": "rest", "run": "1"}
    assert run.problem is None
    assert second.t1w == tuple(sorted(images))


def test_the_echoes_of_a_run_are_one_run_in_their_order(tmp_path: Path):
    paths = [add_raw_run(tmp_path, f"sub-01_task-rest_echo-{n}") for n in (10, 2, 1)]
    ((run,),) = [subject.runs for subject in find(tmp_path)]
    assert run.name == "sub-01_task-rest"
    assert run.bold == tuple(reversed(paths))
    assert run.sidecars == tuple((sidecar_of(path),) for path in reversed(paths))
    assert "echo" not in run.entities
    assert run.problem is None


def test_only_the_magnitude_of_a_complex_scan_counts(tmp_path: Path):
    magnitude = add_raw_run(tmp_path, "sub-01_task-rest_part-mag")
    for part in ("phase", "real", "imag"):
        add_raw_run(tmp_path, f"sub-01_task-rest_part-{part}")
    ((run,),) = [subject.runs for subject in find(tmp_path)]
    assert (run.name, run.bold) == ("sub-01_task-rest", (magnitude,))


def test_other_images_and_formats(tmp_path: Path):
    plain = add_raw_run(tmp_path, "sub-01_task-rest", suffix="bold.nii")
    reference = add_raw_run(tmp_path, "sub-01_task-rest", suffix="sbref.nii.gz")
    add_raw_run(tmp_path, "sub-01_task-rest_space-T1w_desc-preproc")
    (plain.parent / "sub-01_task-rest_events.tsv").write_text("onset\n")
    (subject,) = find(tmp_path)
    assert [run.bold for run in subject.runs] == [(plain,)]
    assert reference in subject.auxiliary
    assert plain not in subject.auxiliary


def test_entities_and_exclude_select(tmp_path: Path):
    for entities in ("sub-01_ses-1_task-rest", "sub-01_ses-2_task-rest", "sub-02_task-nback"):
        add_raw_run(tmp_path, entities)
    add_t1w(tmp_path, "sub-01_ses-1")
    kept = add_t1w(tmp_path, "sub-01_ses-2")
    assert names(tmp_path, entities={"task": ["nback"]}) == ["sub-02_task-nback"]
    assert names(tmp_path, entities={"session": ["2"]}) == ["sub-01_ses-2_task-rest"]
    assert names(tmp_path, exclude=["01"]) == ["sub-02_task-nback"]
    assert names(tmp_path, exclude=["sub-02_task-nback"]) == [
        "sub-01_ses-1_task-rest",
        "sub-01_ses-2_task-rest",
    ]
    (subject,) = find(tmp_path, exclude=["sub-01_ses-1", "02"])
    assert subject.t1w == (kept,)
    with pytest.warns(UserWarning, match="exclude names sub-03"):
        assert len(names(tmp_path, exclude=["sub-03"])) == 3
    with pytest.raises(InputError, match="exclude in the dataset YAML leaves no run"):
        find(tmp_path, exclude=["01", "02"])


def test_an_empty_dataset_says_what_is_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"nowhere is not a folder; set bids"):
        find(tmp_path / "nowhere")
    (tmp_path / "sub-01").mkdir()
    with pytest.raises(InputError, match=r"there are 1 sub-\* folders; check bids"):
        find(tmp_path)
    add_raw_run(tmp_path, "sub-01_task-rest_space-MNI152NLin6Asym_desc-preproc")
    with pytest.raises(InputError, match="preprocessed scans is given by derivatives"):
        find(tmp_path)
    add_raw_run(tmp_path, "sub-01_task-rest")
    with pytest.raises(InputError, match=r"task in \['nback'\]; there are: task-rest \(1 runs\)"):
        find(tmp_path, entities={"task": ["nback"]})


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add_raw_run(tmp_path, "sub-01_task-rest")
    whole = os.scandir

    def refuse(folder: str) -> Any:
        if str(folder).endswith("func"):
            raise PermissionError(13, "Permission denied", str(folder))
        return whole(folder)

    monkeypatch.setattr("neuromamba.sidecars.os.scandir", refuse)
    with pytest.raises(InputError, match=r"sub-01/func cannot be listed"):
        find(tmp_path)


# --- Problems that names tell -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names_of_files", "message"),
    [
        (["sub-01/func/sub-01_task-rest_bold.nii"], "duplicate run: 2 files"),
        (["sub-01/func/sub-01_task-rest_echo-1_bold.nii.gz"], "duplicate run: 2 files"),
        (["sub-01/func/sub-01_task-rest_part-mag_bold.nii.gz"], "duplicate run: 2 files"),
    ],
)
def test_two_files_of_one_run(tmp_path: Path, names_of_files: list[str], message: str):
    add_raw_run(tmp_path, "sub-01_task-rest")
    for name in names_of_files:
        write_bold(tmp_path / name)
    ((run,),) = [subject.runs for subject in find(tmp_path)]
    assert str(run.problem).startswith(message)
    assert all(str(path) in str(run.problem) for path in run.bold)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sub-01/func/sub-02_task-rest_bold.nii.gz", "named after another subject or session"),
        ("sub-01/ses-1/func/sub-01_task-rest_bold.nii.gz", "another subject or session"),
        ("sub-01/func/sub-01_ses-1_task-rest_bold.nii.gz", "another subject or session"),
        ("sub-01/func/sub-01_bold.nii.gz", "has no task in its name"),
    ],
)
def test_names_that_bids_does_not_allow(tmp_path: Path, path: str, message: str):
    write_bold(tmp_path / path)
    ((run,),) = [subject.runs for subject in find(tmp_path)]
    assert message in str(run.problem)
    assert str(tmp_path / path) in str(run.problem)


# --- Sidecars -----------------------------------------------------------------------------------


def write(path: Path, **content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_the_nearest_sidecar_wins_key_by_key(tmp_path: Path):
    bold = add_raw_run(tmp_path, "sub-01_ses-1_task-rest_run-1", sidecar={"e": "own"})
    expected = [
        write(tmp_path / "bold.json", a="root", b="root", c="root", d="root", e="root"),
        write(tmp_path / "task-rest_bold.json", a="task", b="root", c="root", d="root"),
        write(tmp_path / "sub-01" / "sub-01_bold.json", b="subject", c="subject", d="subject"),
        write(tmp_path / "sub-01" / "ses-1" / "sub-01_ses-1_bold.json", c="session", d="session"),
        write(bold.with_name("sub-01_ses-1_task-rest_bold.json"), d="folder", e="folder"),
        sidecar_of(bold),
    ]
    write(tmp_path / "task-nback_bold.json", a="other task")
    write(tmp_path / "task-rest_T1w.json", a="other suffix")
    write(tmp_path / "task-rest_run-2_bold.json", a="other run")
    found = {"a": "task", "b": "subject", "c": "session", "d": "folder", "e": "own"}
    ((run,),) = [subject.runs for subject in find(tmp_path)]
    assert run.sidecars == (tuple(expected),)
    assert find_sidecars(tmp_path, bold) == tuple(expected)
    assert merge_sidecars(expected) == found


def test_a_sidecar_of_one_echo_is_not_that_of_another(tmp_path: Path):
    for n in "12":
        add_raw_run(tmp_path, f"sub-01_task-rest_echo-{n}", sidecar=None)
    write(tmp_path / "task-rest_bold.json", RepetitionTime=2)
    write(tmp_path / "task-rest_echo-1_bold.json", EchoTime=0.01)
    ((run,),) = [subject.runs for subject in find(tmp_path)]
    assert merge_sidecars(run.sidecars[0]) == {"RepetitionTime": 2, "EchoTime": 0.01}
    assert merge_sidecars(run.sidecars[1]) == {"RepetitionTime": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1, 2]", r"must hold a JSON object \(\{\.\.\.\}\), not list"),
        (b'"text"', "not str"),
    ],
)
def test_a_broken_sidecar_is_named(tmp_path: Path, content: bytes, message: str):
    bold = add_raw_run(tmp_path, "sub-01_task-rest")
    broken = tmp_path / "task-rest_bold.json"
    broken.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        merge_sidecars(find_sidecars(tmp_path, bold))
    assert str(broken) in str(error.value)


def test_a_sidecar_that_was_not_fetched(tmp_path: Path):
    bold = add_raw_run(tmp_path, "sub-01_task-rest", sidecar=None)
    sidecar_of(bold).symlink_to(tmp_path / "annex" / "object")
    with pytest.raises(InputError, match="datalad get"):
        merge_sidecars(find_sidecars(tmp_path, bold))


# --- Fingerprints -------------------------------------------------------------------------------


def print_of(root: Path) -> str:
    (subject,) = find(root)
    return fingerprint_subject(root, subject)


@pytest.mark.parametrize(
    "name",
    [
        "sub-01/func/sub-01_task-rest_bold.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.json",
        "sub-01/func/sub-01_task-rest_sbref.nii.gz",
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/fmap/sub-01_dir-AP_epi.nii.gz",
        "task-rest_bold.json",
        "T1w.json",
        "dir-AP_epi.json",
    ],
)
def test_the_fingerprint_changes_with_all_that_an_engine_reads(tmp_path: Path, name: str):
    root = tmp_path / "raw"
    add_subject(root, "sub-01")
    write_bold(root / "sub-01" / "fmap" / "sub-01_dir-AP_epi.nii.gz")
    add_raw_run(root, "sub-01_task-rest", suffix="sbref.nii.gz")
    for path in ("task-rest_bold.json", "T1w.json", "dir-AP_epi.json"):
        write(root / path, Manufacturer="one")
    before = print_of(root)
    assert len(before) == 16
    os.utime(root / name, (0, 0))
    shutil.copytree(root, tmp_path / "copy")
    assert print_of(tmp_path / "copy") == before
    (root / name).write_bytes((root / name).read_bytes() + b" ")
    assert print_of(root) != before


def test_the_fingerprint_is_of_the_subject_and_its_selected_runs_alone(tmp_path: Path):
    add_subject(tmp_path, "sub-01")
    before = print_of(tmp_path)
    write(tmp_path / "participants.json", age={})
    write(tmp_path / "task-nback_bold.json", RepetitionTime=1)
    add_subject(tmp_path, "sub-02")
    assert fingerprint_subject(tmp_path, find(tmp_path)[0]) == before
    add_raw_run(tmp_path, "sub-01_task-nback")
    (first, _) = find(tmp_path, entities={"task": ["rest"]})
    assert fingerprint_subject(tmp_path, first) == before
    assert fingerprint_subject(tmp_path, find(tmp_path)[0]) != before


def test_a_file_that_was_not_fetched_is_left_to_the_check(tmp_path: Path):
    bold = add_subject(tmp_path, "sub-01")
    bold.unlink()
    bold.symlink_to(tmp_path / "annex" / "object")
    assert len(print_of(tmp_path)) == 16


def test_the_real_scan(real_data: Path):
    root = real_data / "studyforrest_sub02_bids"
    (subject,) = find(root)
    assert subject.t1w == (root / "sub-02" / "anat" / "sub-02_T1w.nii.gz",)
    (run,) = subject.runs
    assert run.name == "sub-02_task-oneback_run-1"
    metadata = merge_sidecars(run.sidecars[0])
    assert metadata["RepetitionTime"] == GOOD["RepetitionTime"]
    assert metadata["TaskName"] == "oneback"
