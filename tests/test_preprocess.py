"""The job that preprocesses one subject: its status, restarts, and what it leaves alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_fmriprep
import pytest
from fake_fmriprep import SPACE, calls, write_image, write_raw, write_run

from neuromamba import preprocess_key
from neuromamba.config import Config, build_config, save_config
from neuromamba.files import InputError, read_json
from neuromamba.fmriprep_command import NotReadyError
from neuromamba.layout import Layout
from neuromamba.preprocess import run_preprocess
from neuromamba.preprocess_key import engine_settings, template_digests
from neuromamba.publish import read_record, verify_subject
from neuromamba.raw_bids import RawSubject
from neuromamba.raw_listing import failed_runs, raw_subjects

FIRST, SECOND = "sub-01_task-rest_run-1", "sub-01_task-rest_run-2"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("neuromamba.supervise.GRACE", 1.0)
    write_raw(tmp_path / "raw", "sub-01", "task-rest_run-1", "task-rest_run-2")
    (tmp_path / "fmriprep.sif").touch()
    return fake_fmriprep.install(tmp_path, monkeypatch)


def settings(tmp_path: Path, engine: str = "apptainer", **own: Any) -> dict[str, Any]:
    image = {"image": str(tmp_path / "fmriprep.sif")} if engine == "apptainer" else {}
    data = {"bids": str(tmp_path / "raw"), "derivatives": str(tmp_path / "derivatives")}
    return {
        "results": str(tmp_path / "results"),
        "datasets": {"d": data | own.pop("dataset", {})},
        "models": {"m": {"family": "neuromamba"}},
        "preprocess": {"engine": engine, "fmriprep": image | own.pop("fmriprep", {}), **own},
    }


def config(tmp_path: Path, engine: str = "apptainer", **own: Any) -> Config:
    return build_config(settings(tmp_path, engine, **own), tmp_path, "test")


def run(made: Config, subject: str = "sub-01") -> dict[str, Any]:
    """Preprocess a subject; return its status."""
    run_preprocess(made, "d", subject)
    return read_json(Layout.of(made, "d").preprocess(subject))


def started(state: Path) -> int:
    return sum(call[1] == "run" for call in calls(state))


def listing(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def published(tmp_path: Path) -> set[str]:
    found = (tmp_path / "derivatives" / "sub-01" / "func").glob("*_desc-preproc_bold.nii.gz")
    return {path.name.partition("_space")[0] for path in found}


# --- A subject ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_a_subject_from_raw_to_derivatives(tmp_path: Path, state: Path, engine: str) -> None:
    status = run(config(tmp_path, engine))
    assert status.pop("seconds") > 0
    assert len(status.pop("fingerprint")) == len(status.pop("key")) == 16
    assert status == {
        "subject": "sub-01",
        "engine": engine,
        "generated_by": "fMRIPrep 25.2.7",
        "runs": [FIRST, SECOND],
        "left_out": {},
        "reason": None,
        "limits": {"memory_mb": 8000, "time_limit": 1440.0},
    }
    derivatives = tmp_path / "derivatives"
    assert published(tmp_path) == {FIRST, SECOND}
    assert (derivatives / "sub-01.html").exists()
    assert (derivatives / "sub-01" / "figures" / "sub-01_dseg.svg").exists()
    assert (derivatives / ".bidsignore").exists()
    assert not list((derivatives / ".neuromamba").rglob("*.nii.gz"))
    assert not list((derivatives / ".neuromamba" / "work").iterdir())


def test_scratch_is_elsewhere_and_empty_afterwards(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(config(tmp_path, scratch="fast"))
    (call,) = calls(state)
    assert f",{tmp_path}/fast/d/sub-01-" in call[call.index("-B") + 1]
    assert list((tmp_path / "fast" / "d").iterdir()) == []


def test_parallel_subjects_work_in_folders_of_their_own(tmp_path: Path, state: Path) -> None:
    names = [f"sub-{number:02d}" for number in range(1, 5)]
    for name in names[1:]:
        write_raw(tmp_path / "raw", name, "task-rest")
    made = config(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda name: run(made, name), names))
    assert [status["reason"] for status in statuses] == [None] * 4
    binds = [call[call.index("-B") + 1].split(",") for call in calls(state)]
    assert len({bind for each in binds for bind in each if bind.endswith(":/out")}) == 4
    assert len({bind for each in binds for bind in each if bind.endswith(":/scratch")}) == 4
    for name, subject in raw_subjects(made, "d").items():
        assert subject is not None
        assert verify_subject(tmp_path / "derivatives", subject, SPACE) == {}
        assert (tmp_path / "derivatives" / f"{name}.html").read_text() == f"<html>{name}</html>"


def test_a_run_that_names_show_to_be_unusable_is_left_out(tmp_path: Path, state: Path) -> None:
    func = tmp_path / "raw" / "sub-01" / "func"
    write_image(func / "sub-01_bold.nii.gz", (4, 4, 4, 5))
    status = run(config(tmp_path))
    assert status["runs"] == [FIRST, SECOND]
    assert "has no task in its name" in status["left_out"]["sub-01"]
    run(config(tmp_path))
    assert started(state) == 1  # which no repetition would cure


# --- Failures -----------------------------------------------------------------------------------


def test_a_crash_leaves_the_run_out_and_publishes_the_other(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "crash")
    status = run(config(tmp_path))
    assert status["runs"] == [FIRST]
    assert status["reason"] is None
    assert list(status["left_out"]) == [SECOND]
    assert "bold_confs_wf.acompcor: ValueError: Signals: no data" in status["left_out"][SECOND]
    assert published(tmp_path) == {FIRST}
    names = [p.name for p in (tmp_path / "derivatives" / "sub-01" / "func").iterdir()]
    assert not [name for name in names if name.startswith(SECOND)]


def test_a_subject_that_fails_is_recorded_and_others_go_on(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(tmp_path / "raw", "sub-02", "task-rest")
    made = config(tmp_path)
    monkeypatch.setenv("FAKE_END", "workflow")
    status = run(made)
    assert status["runs"] == []
    assert "exit status 126" in status["reason"]
    assert status["left_out"] == {FIRST: status["reason"], SECOND: status["reason"]}
    assert not (tmp_path / "derivatives" / "sub-01").exists()
    monkeypatch.setenv("FAKE_END", "well")
    assert run(made, "sub-02")["reason"] is None
    table = failed_runs(made, "d")
    assert list(table["run"]) == [FIRST, SECOND]
    assert all("exit status 126" in reason for reason in table["reason"])


def test_a_repeated_failure_gives_the_same_reason(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in ("workflow", "crash", "memory"):
        monkeypatch.setenv("FAKE_END", end)
        one, two = run(config(tmp_path)), run(config(tmp_path))
        assert one["left_out"] == two["left_out"] != {}
        assert str(tmp_path) not in str(one)


def test_a_run_that_is_missing_after_a_good_end(tmp_path: Path, state: Path) -> None:
    made = config(tmp_path, fmriprep={"output_spaces": ["MNI152NLin6Asym"]})
    wrong = made.model_copy(
        update={"datasets": {"d": made.datasets["d"].model_copy(update={"space": "MNI152Lin"})}}
    )
    status = run(wrong)
    assert status["runs"] == [FIRST, SECOND]  # the dataset's space is always asked for
    names = [path.name for path in (tmp_path / "derivatives" / "sub-01" / "func").iterdir()]
    assert f"{FIRST}_space-MNI152Lin_res-2_desc-preproc_bold.nii.gz" in names
    assert f"{FIRST}_space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii.gz" in names


@pytest.mark.parametrize("end", ["well", "workflow"])
def test_nothing_stale_stays_to_be_taken_for_new(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    run(config(tmp_path))
    monkeypatch.setenv("FAKE_END", end)
    status = run(config(tmp_path, fmriprep={"flags": ["--use-syn-sdc"]}))
    record = read_record(tmp_path / "derivatives", "sub-01")
    assert (status["reason"] is None) == (record is not None) == (end == "well")
    if record is not None:
        assert record["key"] == status["key"]
    run(config(tmp_path))  # back to the first settings
    assert started(state) == (3 if end == "well" else 2)
    assert published(tmp_path) == {FIRST, SECOND}


def test_a_full_disk_stops_the_job(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path)
    monkeypatch.setenv("FAKE_END", "disk")
    with pytest.raises(InputError, match="the disk is full while sub-01 is preprocessed"):
        run_preprocess(made, "d", "sub-01")
    monkeypatch.setenv("FAKE_END", "well")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("neuromamba.publish._move", full)
        with pytest.raises(InputError, match="free some space and start again"):
            run_preprocess(made, "d", "sub-01")
    assert not Layout.of(made, "d").preprocess("sub-01").exists()
    assert not (tmp_path / "derivatives" / "sub-01").exists()
    assert run(made)["runs"] == [FIRST, SECOND]


def test_what_is_wrong_for_every_subject_stops_the_job(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path)
    monkeypatch.delenv("FS_LICENSE")
    with pytest.raises(NotReadyError, match="licence"):
        run_preprocess(made, "d", "sub-01")
    assert not Layout.of(made, "d").preprocess("sub-01").exists()
    with pytest.raises(InputError, match="has no scans of sub-09"):
        run_preprocess(made, "d", "sub-09")


def test_derivatives_of_others_are_not_replaced(tmp_path: Path, state: Path) -> None:
    write_run(tmp_path / "derivatives", FIRST)
    before = listing(tmp_path / "derivatives")
    with pytest.raises(InputError, match=r"not made by this pipeline.*preprocess\.engine: none"):
        run_preprocess(config(tmp_path), "d", "sub-01")
    assert listing(tmp_path / "derivatives") == before


# --- Restarts -----------------------------------------------------------------------------------


def test_what_is_whole_is_not_made_again(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(config(tmp_path))
    before = listing(tmp_path / "derivatives")
    more = {"threads": 8, "memory_mb": 64000, "time_limit": 9.0}
    (tmp_path / "other.txt").touch()
    again = run(config(tmp_path, **more, fmriprep={"license": str(tmp_path / "other.txt")}))
    assert again == first | {"limits": {"memory_mb": 64000, "time_limit": 9.0}}
    assert started(state) == 1
    assert listing(tmp_path / "derivatives") == before
    assert "is whole already, made by fMRIPrep 25.2.7" in capsys.readouterr().err


def test_what_has_changed_or_is_damaged_is_made_again(tmp_path: Path, state: Path) -> None:
    run(config(tmp_path))
    for bold in (tmp_path / "derivatives" / "sub-01" / "func").glob(f"{SECOND}*_bold.nii.gz"):
        bold.write_bytes(bold.read_bytes()[:-9])
    assert run(config(tmp_path))["runs"] == [FIRST, SECOND]
    assert started(state) == 2
    sidecar = tmp_path / "raw" / "sub-01" / "func" / f"{FIRST}_bold.json"
    sidecar.write_text('{"RepetitionTime": 3.0}')
    run(config(tmp_path))
    assert started(state) == 3
    run(config(tmp_path, fmriprep={"flags": ["--dummy-scans", "4"]}))
    assert started(state) == 4


def test_a_failed_subject_goes_on_in_its_work_folder(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "memory")
    status = run(config(tmp_path))
    assert "raise preprocess.memory_mb" in status["left_out"][SECOND]
    (work,) = (tmp_path / "derivatives" / ".neuromamba" / "work").iterdir()
    assert (work / "work" / "fmriprep_25_2_wf").is_dir()
    monkeypatch.setenv("FAKE_END", "well")
    status = run(config(tmp_path, memory_mb=32000))
    assert status["left_out"] == {}
    assert published(tmp_path) == {FIRST, SECOND}
    first, second = (call[call.index("-B") + 1] for call in calls(state))
    assert first == second
    assert not work.exists()


def test_another_attempt_goes_on_from_the_surfaces(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, fmriprep={"freesurfer": True})
    log = tmp_path / "derivatives/sourcedata/freesurfer/sub-01/scripts/recon-all.log"
    for end in ("memory", "workflow", "memory", "well"):
        monkeypatch.setenv("FAKE_END", end)
        run(made)
    assert log.read_text() == "started\n" * 3  # the workflow that was not built had none
    assert published(tmp_path) == {FIRST, SECOND}


def test_the_templates_content_is_part_of_the_key(tmp_path: Path) -> None:
    template = {name: str(tmp_path / f"{name}.nii.gz") for name in ("t1w", "mask")}
    for name, path in template.items():
        Path(path).write_text(name)
    own = config(tmp_path, "ants", ants={"template": template}).preprocess
    before = engine_settings(own)
    assert template_digests(own) == {
        name: hashlib.sha256(name.encode()).hexdigest() for name in template
    }
    moved = {name: str(Path(path).rename(f"{path}.gz")) for name, path in template.items()}
    elsewhere = config(tmp_path, "ants", ants={"template": moved}).preprocess
    assert engine_settings(elsewhere) == before
    Path(moved["mask"]).write_text("another")
    assert engine_settings(elsewhere) != before
    Path(moved["mask"]).unlink()
    with pytest.raises(InputError, match=r"mask.*\(preprocess\.ants\.template\.mask\) cannot be"):
        engine_settings(elsewhere)
    assert template_digests(config(tmp_path, "ants").preprocess) == {}
    fmriprep = config(tmp_path, "apptainer", ants={"template": moved}).preprocess
    assert template_digests(fmriprep) == {}


def test_a_worse_repetition_takes_nothing_away(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "crash")
    run(config(tmp_path))
    monkeypatch.setenv("FAKE_END", "workflow")
    status = run(config(tmp_path))
    assert status["runs"] == [FIRST]
    assert "exit status 126" in status["left_out"][SECOND]
    assert published(tmp_path) == {FIRST}


@pytest.mark.parametrize(("engine", "number"), [("apptainer", 15), ("docker", 15), ("docker", 9)])
def test_a_job_that_is_ended_changes_nothing_and_leaves_nothing_running(
    tmp_path: Path, state: Path, engine: str, number: int
) -> None:
    made, file = config(tmp_path, engine), tmp_path / "config.yaml"
    save_config(file, made)
    code = (
        "from neuromamba.config import load_config; "
        "from neuromamba.preprocess import run_preprocess; "
        f"run_preprocess(load_config([{str(file)!r}]), 'd', 'sub-01')"
    )
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "FAKE_END": "hang"}, stderr=stderr
        )
    work = tmp_path / "derivatives" / ".neuromamba" / "work"
    deadline = time.monotonic() + 60
    while not list(work.glob("*/out/.bidsignore")):
        going = process.poll() is None and time.monotonic() < deadline
        assert going, (tmp_path / "stderr").read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "derivatives" / "sub-01").exists()
    assert not Layout.of(made, "d").preprocess("sub-01").exists()
    if number == signal.SIGTERM:
        assert not still_running(work)
    assert run(made)["runs"] == [FIRST, SECOND]
    assert not still_running(work)


def still_running(folder: Path) -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        found += [line] if str(folder).encode() in line else []
    return found


# --- Other engines ------------------------------------------------------------------------------


def test_without_an_engine_derivatives_are_verified_only(tmp_path: Path, state: Path) -> None:
    place = tmp_path / "derivatives"
    write_run(place, FIRST)
    write_run(place, SECOND).unlink()
    text = json.dumps({"GeneratedBy": [{"Name": "fMRIPrep", "Version": "20.2.1"}]})
    (place / "dataset_description.json").write_text(text)
    before = listing(place)
    status = run(config(tmp_path, "none"))
    assert status["runs"] == [FIRST]
    assert f"has no {SECOND}" in status["left_out"][SECOND]
    assert (status["generated_by"], status["seconds"]) == ("fMRIPrep 20.2.1", None)
    assert listing(place) == before
    assert calls(state) == []


def test_the_ants_engine_is_called_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ants")
    write_raw(tmp_path / "raw", "sub-01", "task-rest_run-1", "task-rest_run-2")
    seen: list[Any] = []

    def engine(
        bids: Path, subject: RawSubject, output: Path, work: Path, space: str, own: Any
    ) -> dict[str, str]:
        seen.append((bids, space, own.engine, work.is_dir()))
        write_run(output, FIRST, space)
        return {SECOND: "is too\n  dark"}

    module = SimpleNamespace(preprocess_subject=engine)
    monkeypatch.setitem(sys.modules, "neuromamba.ants_engine", module)
    monkeypatch.setattr("neuromamba.ants_engine", module, raising=False)
    monkeypatch.setattr(preprocess_key, "code_of", lambda name: {name: "digest"})
    space = "MNI152NLin2009aSym"
    status = run(config(tmp_path, "ants", dataset={"space": space}))
    assert seen == [(tmp_path / "raw", space, "ants", True)]
    assert status["runs"] == [FIRST]
    assert status["left_out"] == {SECOND: "is too dark"}
    assert published(tmp_path) == {FIRST}
    with pytest.raises(InputError, match="MNI152NLin2009aSym"):  # wrong for every subject
        run_preprocess(config(tmp_path, "ants"), "d", "sub-01")
