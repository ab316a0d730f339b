"""Which runs are whole, and how a subject comes to be seen."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fake_fmriprep import SPACE, VOLUMES, write_image, write_run

from neuromamba import publish as module
from neuromamba.publish import HIDDEN, publish, read_record, recover, verify_subject, withdraw
from neuromamba.raw_bids import RawRun, RawSubject


def subject_of(*runs: str) -> RawSubject:
    made = [
        RawRun(run, run.split("_")[0], dict(part.split("-") for part in run.split("_")), ())
        for run in runs
    ]
    return RawSubject(made[0].subject, tuple(made))


ONE = "sub-01_task-rest"
SUBJECT = subject_of(ONE)


def reason_of(out: Path, subject: RawSubject = SUBJECT) -> str:
    (reason,) = verify_subject(out, subject, SPACE).values()
    return reason


# --- Verification -------------------------------------------------------------------------------


def test_whole_runs_have_no_reason(tmp_path: Path) -> None:
    runs = ["sub-01_ses-1_task-rest_run-1", "sub-01_ses-1_task-rest_run-2", "sub-01_ses-2_task-x"]
    for run in runs:
        write_run(tmp_path, run)
    assert verify_subject(tmp_path, subject_of(*runs), SPACE) == {}


def test_echoes_combined_are_one_run(tmp_path: Path) -> None:
    bold = write_run(tmp_path, ONE)
    single = bold.with_name(f"{ONE}_echo-2_space-{SPACE}_desc-preproc_bold.nii.gz")
    single.write_bytes(b"an echo alone is not looked at")
    assert verify_subject(tmp_path, SUBJECT, SPACE) == {}
    bold.unlink()
    assert f"sub-01/func: has no {ONE}_space-{SPACE}_*desc-preproc_bold.nii.gz" in reason_of(
        tmp_path
    )


def test_magnitude_need_not_be_said(tmp_path: Path) -> None:
    write_run(tmp_path, "sub-01_task-rest_part-mag")
    assert verify_subject(tmp_path, SUBJECT, SPACE) == {}


def test_another_space_is_not_it(tmp_path: Path) -> None:
    write_run(tmp_path, ONE, "MNI152NLin6Asym")
    assert f"space-{SPACE}" in reason_of(tmp_path)


def rewrite(path: Path, shape: tuple[int, ...], affine: Any = None) -> None:
    nib.save(
        nib.Nifti1Image(np.ones(shape, np.int16), np.eye(4) if affine is None else affine), path
    )


def spoil(bold: Path, how: str) -> None:
    mask = bold.with_name(bold.name.replace("preproc_bold", "brain_mask"))
    table = bold.parent / f"{ONE}_desc-confounds_timeseries.tsv"
    match how:
        case "truncated":
            bold.write_bytes(bold.read_bytes()[:-9])
        case "damaged":
            raw = bytearray(bold.read_bytes())
            raw[-6] ^= 1
            bold.write_bytes(bytes(raw))
        case "short":
            bold.write_bytes(gzip.compress(gzip.decompress(bold.read_bytes())[:-2]))
        case "3D":
            rewrite(bold, (4, 4, 4))
        case "no affine":
            image = nib.Nifti1Image(np.ones((4, 4, 4, VOLUMES), np.int16), None)
            nib.save(image, bold)
        case "no mask":
            mask.unlink()
        case "broken mask":
            mask.write_bytes(mask.read_bytes()[:-9])
        case "small mask":
            rewrite(mask, (4, 4, 3))
        case "moved mask":
            rewrite(mask, (4, 4, 4), np.eye(4) + 1e-2)
        case "no confounds":
            table.unlink()
        case "few rows":
            table.write_text("csf\n" + "0\n" * (VOLUMES - 1))
        case "empty confounds":
            table.write_text("")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "truncated"),
        ("damaged", "damaged"),
        ("short", "truncated: it ends in volume 4"),
        ("3D", "is 3D"),
        ("no affine", "neither sform nor qform"),
        ("no mask", "desc-brain_mask.nii.gz: does not exist"),
        ("broken mask", "desc-brain_mask.nii.gz: is truncated"),
        ("small mask", "is on another grid"),
        ("moved mask", "is on another grid"),
        ("no confounds", f"has no {ONE}_desc-confounds_timeseries.tsv"),
        ("few rows", f"has {VOLUMES - 1} rows"),
        ("empty confounds", "is not a readable table"),
    ],
)
def test_what_is_not_whole(tmp_path: Path, how: str, says: str) -> None:
    spoil(write_run(tmp_path, ONE), how)
    reason = reason_of(tmp_path)
    assert says in reason
    assert str(tmp_path) not in reason  # another attempt has another folder, and the same reason
    assert "\n" not in reason


def test_only_the_run_that_is_not_whole_has_a_reason(tmp_path: Path) -> None:
    both = subject_of("sub-01_task-rest_run-1", "sub-01_task-rest_run-2")
    write_run(tmp_path, "sub-01_task-rest_run-1")
    assert list(verify_subject(tmp_path, both, SPACE)) == ["sub-01_task-rest_run-2"]


# --- Publication --------------------------------------------------------------------------------


def make_output(folder: Path, name: str, *runs: str, mark: str = "new") -> RawSubject:
    """A private folder of one subject, with everything that fMRIPrep may put there."""
    for run in runs:
        write_run(folder, f"{name}_{run}")
    write_image(folder / name / "anat" / f"{name}_desc-preproc_T1w.nii.gz", (4, 4, 4))
    (folder / name / "figures").mkdir()
    (folder / name / "figures" / "dseg.svg").write_text(mark)
    (folder / f"{name}.html").write_text(mark)
    (folder / ".bidsignore").write_text("*.html\n")
    (folder / "logs").mkdir()
    (folder / "logs" / "CITATION.md").write_text("cite")
    for surfaces in (name, "fsaverage"):
        (folder / "sourcedata" / "freesurfer" / surfaces / "surf").mkdir(parents=True)
        (folder / "sourcedata" / "freesurfer" / surfaces / "surf" / "lh.white").write_text(mark)
    describe(folder, "fMRIPrep", "25.2.7")
    return subject_of(*(f"{name}_{run}" for run in runs))


def describe(folder: Path, *program: str) -> None:
    entry = dict(zip(("Name", "Version"), program, strict=True))
    text = json.dumps({"Name": program[0], "BIDSVersion": "1.4.0", "GeneratedBy": [entry]})
    folder.mkdir(exist_ok=True)
    (folder / "dataset_description.json").write_text(text)


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(params=["same", "another"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the private folder is in the file system of the derivatives."""
    if request.param == "another":
        rename = Path.rename

        def refuse(self: Path, target: Path) -> Path:
            if ("out" in self.parts) != ("out" in Path(target).parts):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse)
    return str(request.param)


def test_everything_of_a_subject_is_published(tmp_path: Path, file_system: str) -> None:
    out, place = tmp_path / "out", tmp_path / "derivatives"
    subject = make_output(out, "sub-01", "task-rest", "task-nback")
    expected = listing(out)
    publish(out, place, subject, [run.name for run in subject.runs], {"key": "k"})
    found = listing(place)
    assert json.loads(found.pop("sub-01/.neuromamba.json")) == {"key": "k"}
    description = json.loads(found.pop("dataset_description.json"))
    assert description == json.loads(expected.pop("dataset_description.json"))
    assert found == expected
    assert read_record(place, "sub-01") == {"key": "k"}
    assert (out / "sub-01").exists() == (file_system == "another")


def test_a_run_that_is_not_whole_is_nowhere(tmp_path: Path) -> None:
    out, place = tmp_path / "out", tmp_path / "derivatives"
    subject = make_output(out, "sub-01", "task-rest_run-1", "task-rest_run-10", "task-nback")
    echo = out / "sub-01/func/sub-01_task-rest_run-1_echo-1_desc-preproc_bold.nii.gz"
    transform = out / "sub-01/func/sub-01_task-rest_run-10_from-boldref_to-T1w_mode-image_xfm.txt"
    echo.touch()
    transform.touch()
    publish(out, place, subject, ["sub-01_task-rest_run-10"], {})
    names = {path.name for path in (place / "sub-01" / "func").iterdir()}
    assert transform.name in names
    assert len(names) == 6
    assert all(name.startswith("sub-01_task-rest_run-10_") for name in names)


def test_surfaces_stay_for_another_attempt_while_a_run_is_left_out(
    tmp_path: Path, file_system: str
) -> None:
    out, place = tmp_path / "out", tmp_path / "derivatives"
    subject = make_output(out, "sub-01", "task-rest", "task-nback")
    surfaces = "sourcedata/freesurfer/sub-01"
    before = listing(out / surfaces)
    assert before
    publish(out, place, subject, ["sub-01_task-rest"], {})
    assert listing(out / surfaces) == listing(place / surfaces) == before
    for run in ("task-rest", "task-nback"):
        write_run(out, f"sub-01_{run}")
    publish(out, place, subject, [run.name for run in subject.runs], {})
    assert listing(place / surfaces) == before
    assert (out / surfaces).exists() == (file_system == "another")


def test_others_are_unharmed(tmp_path: Path) -> None:
    place = tmp_path / "derivatives"
    for name in ("sub-01", "sub-011", "sub-02"):
        subject = make_output(tmp_path / name, name, "task-rest", mark=f"old {name}")
        publish(tmp_path / name, place, subject, [f"{name}_task-rest"], {"key": name})
    (place / "mine.txt").write_text("mine")
    (place / ".bidsignore").write_text("mine too")
    before = {k: v for k, v in listing(place).items() if "sub-01/" not in k and "sub-01." not in k}
    again = make_output(tmp_path / "again", "sub-01", "task-rest", mark="newer")
    publish(tmp_path / "again", place, again, ["sub-01_task-rest"], {"key": "newer"})
    after = listing(place)
    assert before.items() <= after.items()
    assert read_record(place, "sub-01") == {"key": "newer"}
    assert after["sub-01.html"] == after["sub-01/figures/dseg.svg"] == b"newer"
    assert not [name for name in after if name.startswith(HIDDEN)]


def test_nothing_of_what_is_replaced_stays(tmp_path: Path) -> None:
    place = tmp_path / "derivatives"
    first = make_output(tmp_path / "a", "sub-01", "task-rest")
    (tmp_path / "a" / "sub-01_ses-1_func.html").touch()
    publish(tmp_path / "a", place, first, ["sub-01_task-rest"], {})
    write_run(tmp_path / "b", "sub-01_task-nback")
    describe(tmp_path / "b", "ants", "1")
    publish(tmp_path / "b", place, subject_of("sub-01_task-nback"), ["sub-01_task-nback"], {})
    assert not [name for name in listing(place) if "task-rest" in name or name.endswith(".html")]
    assert not (place / "sourcedata" / "freesurfer" / "sub-01").exists()
    programs = json.loads((place / "dataset_description.json").read_text())["GeneratedBy"]
    assert [program["Name"] for program in programs] == ["ants", "fMRIPrep"]


def test_parallel_subjects_share_the_top(tmp_path: Path) -> None:
    names = [f"sub-{number:02d}" for number in range(12)]
    place = tmp_path / "derivatives"
    subjects = [make_output(tmp_path / name, name, "task-rest", mark="same") for name in names]

    def one(subject: RawSubject) -> None:
        whole = [run.name for run in subject.runs]
        publish(tmp_path / subject.name, place, subject, whole, {"key": subject.name})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, subjects))
    assert [read_record(place, name) for name in names] == [{"key": name} for name in names]
    assert all((place / f"{name}.html").read_text() == "same" for name in names)
    programs = json.loads((place / "dataset_description.json").read_text())["GeneratedBy"]
    assert programs == [{"Name": "fMRIPrep", "Version": "25.2.7"}]
    assert not list(place.rglob(".tmp-*"))


# --- Crashes in between -------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


def publish_until(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Publish a second version and end before the given rename; whether it came so far."""
    place, count, rename = tmp_path / "derivatives", 0, Path.rename

    def counted(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count > step:
            raise Killed
        return rename(self, target)

    newer = make_output(tmp_path / "out", "sub-01", "task-rest", mark="newer")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        patch.setattr("neuromamba.files.shutil.rmtree", lambda *_, **__: None)
        try:
            publish(tmp_path / "out", place, newer, ["sub-01_task-rest"], {"key": "newer"})
        except Killed:
            return True
    return False


def test_whenever_it_ends_the_next_start_finds_the_old_or_the_new_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, outcomes = tmp_path / "derivatives", []
    for step in range(40):
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        first = make_output(tmp_path / "first", "sub-01", "task-rest", mark="older")
        publish(tmp_path / "first", place, first, ["sub-01_task-rest"], {"key": "older"})
        ended = publish_until(step, tmp_path, monkeypatch)
        recover(place, "sub-01")
        record = read_record(place, "sub-01")
        assert record is not None
        assert verify_subject(place, first, SPACE) == {}
        marks = {(place / p).read_text() for p in ("sub-01.html", "sub-01/figures/dseg.svg")}
        assert marks == {record["key"]}
        assert not [name for name in listing(place) if name.startswith(HIDDEN)]
        outcomes.append(record["key"])
        if not ended:
            break
    assert outcomes[0] == "older"
    assert outcomes[-1] == "newer"
    assert outcomes == sorted(outcomes, reverse=True)  # "older" until one step, "newer" after it
    assert 5 < len(outcomes) < 40


def test_what_is_withdrawn_comes_back(tmp_path: Path) -> None:
    place = tmp_path / "derivatives"
    subject = make_output(tmp_path / "out", "sub-01", "task-rest")
    publish(tmp_path / "out", place, subject, ["sub-01_task-rest"], {"key": "k"})
    before = listing(place)
    withdraw(place, "sub-01")
    visible = [name for name in listing(place) if not name.startswith(HIDDEN)]
    assert not [name for name in visible if "sub-01" in name]
    withdraw(place, "sub-01")
    recover(place, "sub-01")
    assert listing(place) == before


def test_a_full_disk_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "derivatives"
    first = make_output(tmp_path / "first", "sub-01", "task-rest", mark="older")
    publish(tmp_path / "first", place, first, ["sub-01_task-rest"], {"key": "older"})
    before = listing(place)
    newer = make_output(tmp_path / "out", "sub-01", "task-rest", mark="newer")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "_move", full)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path / "out", place, newer, ["sub-01_task-rest"], {"key": "newer"})
    assert listing(place) == before
