"""How fMRIPrep is called by both engines, and what is told of how it ends."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_fmriprep
import pytest
from fake_fmriprep import SPACE, calls, write_image, write_raw

from neuromamba.config import Dataset, Preprocess
from neuromamba.files import InputError
from neuromamba.fmriprep import bids_filter, preprocess_subject
from neuromamba.fmriprep_command import NotReadyError, output_spaces
from neuromamba.raw_bids import RawSubject, find_raw_subjects
from neuromamba.supervise import end_earlier, run_program

USER = f"{os.getuid()}:{os.getgid()}"
VERSION = importlib.metadata.version("fmriprep-docker")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("neuromamba.supervise.GRACE", 1.0)
    write_raw(tmp_path / "raw", "sub-01", "task-rest_run-1", "task-rest_run-2")
    return fake_fmriprep.install(tmp_path, monkeypatch)


def the_subject(root: Path, **settings: Any) -> RawSubject:
    (subject,) = find_raw_subjects(Dataset(bids=str(root), derivatives="unused", **settings))
    return subject


def run(tmp_path: Path, engine: str, *, space: str = SPACE, **settings: Any) -> dict[str, str]:
    own = dict(settings.pop("fmriprep", {}))
    if engine == "apptainer":
        (tmp_path / "fmriprep.sif").touch()
        own.setdefault("image", str(tmp_path / "fmriprep.sif"))
    made = Preprocess(engine=engine, fmriprep=own, **settings)
    subject = the_subject(tmp_path / "raw")
    folders = tmp_path / "raw", subject, tmp_path / "out", tmp_path / "work"
    return preprocess_subject(*folders, space, made)


# --- The command line ---------------------------------------------------------------------------


def test_docker_is_called_through_fmriprep_docker(tmp_path: Path, state: Path) -> None:
    assert run(tmp_path, "docker", threads=12, memory_mb=16000) == {}
    (call,) = calls(state)
    token = next(value for value in call if value.startswith("NEUROMAMBA_RUN="))
    assert len(token) == len("NEUROMAMBA_RUN=") + 16
    assert call == [
        *("docker", "run", "--rm", "-e", "DOCKER_VERSION_8395080871=27.0.0", "-e", token),
        *("-u", USER, "-v", f"{tmp_path}/license.txt:/opt/freesurfer/license.txt:ro"),
        *("-v", f"{tmp_path}/raw:/data:ro", "-v", f"{tmp_path}/out:/out"),
        *("-v", f"{tmp_path}/work:/scratch"),
        *("-v", f"{tmp_path}/work/bids_filter.json:/tmp/bids_filter.json"),
        *(f"nipreps/fmriprep:{VERSION}", "/data", "/out", "participant"),
        *("--participant-label", "01", "--fs-no-reconall"),
        *("--nthreads", "12", "--omp-nthreads", "8", "--mem_mb", "16000", "--notrack"),
        *("-w", "/scratch", "--bids-filter-file", "/tmp/bids_filter.json"),
        *("--output-spaces", "MNI152NLin2009cAsym:res-2"),
    ]


def test_apptainer_is_called_by_its_own_command_line(tmp_path: Path, state: Path) -> None:
    templates = tmp_path / "templates"
    (templates / f"tpl-{SPACE}").mkdir(parents=True)
    own = {
        "templateflow": str(templates),
        "freesurfer": True,
        "flags": ["--skip-bids-validation", "--dummy-scans", "4"],
        "output_spaces": ["anat", "fsLR", SPACE],
    }
    assert run(tmp_path, "apptainer", fmriprep=own) == {}
    (call,) = calls(state)
    variables = call[call.index("--env") + 1].split(",")
    assert variables[1:] == ["TEMPLATEFLOW_HOME=/templateflow"]
    assert call == [
        *("apptainer", "run", "--cleanenv", "-B"),
        f"{tmp_path}/raw:/data:ro,{tmp_path}/out:/out,{tmp_path}/work:/scratch,"
        f"{tmp_path}/license.txt:/license.txt:ro,{templates}:/templateflow",
        *("--env", ",".join(variables), f"{tmp_path}/fmriprep.sif"),
        *("/data", "/out", "participant", "-w", "/scratch"),
        *("--fs-license-file", "/license.txt", "--bids-filter-file", "/scratch/bids_filter.json"),
        *("--participant-label", "01", "--output-spaces", "anat", "fsLR", f"{SPACE}:res-2"),
        *("--nthreads", "2", "--omp-nthreads", "2", "--mem_mb", "8000", "--notrack"),
        *("--skip-bids-validation", "--dummy-scans", "4"),
    ]


def test_the_image_is_that_of_the_settings(tmp_path: Path, state: Path) -> None:
    run(tmp_path, "docker", fmriprep={"version": "24.1.1"})
    run(tmp_path, "docker", fmriprep={"image": "our/fmriprep:patched", "version": "24.1.1"})
    images = [call[call.index("/data") - 1] for call in calls(state)]
    assert images == ["nipreps/fmriprep:24.1.1", "our/fmriprep:patched"]


def test_a_standard_space_always_has_a_resolution() -> None:
    def spaces(*wanted: str) -> list[str]:
        return output_spaces(SPACE, Preprocess(fmriprep={"output_spaces": wanted}).fmriprep)

    assert spaces() == [f"{SPACE}:res-2"]
    assert spaces("anat", "MNI152NLin6Asym") == [f"{SPACE}:res-2", "anat", "MNI152NLin6Asym:res-2"]
    assert spaces(f"{SPACE}:res-1") == [f"{SPACE}:res-1"]
    assert spaces(f"{SPACE}:cohort-2") == [f"{SPACE}:cohort-2:res-2"]


def test_only_the_wanted_tasks_and_sessions_are_worked_on(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    runs = ["ses-1_task-rest", "ses-1_task-nback", "ses-2_task-rest", "ses-2_task-film"]
    write_raw(root, "sub-01", *runs)
    wanted = the_subject(root, entities={"task": ["rest", "film"], "session": ["2"]})
    every = the_subject(root)
    assert bids_filter(wanted, every) == {"bold": {"task": ["film", "rest"], "session": ["2"]}}
    mixed = the_subject(root, entities={"task": ["nback"]})
    assert bids_filter(mixed, every) == {"bold": {"task": ["nback"], "session": ["1"]}}
    assert bids_filter(every, every) == {"bold": {"task": ["film", "nback", "rest"]}}


def filtered(root: Path, *excluded: str) -> dict[str, Any]:
    return bids_filter(the_subject(root, exclude=list(excluded)), the_subject(root))


def test_excluded_runs_are_left_out_by_what_tells_them_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "raw"
    runs = ["task-rest", "task-rest_run-2", "task-rest_acq-fast_run-2", "task-film_run-3"]
    write_raw(root, "sub-01", *runs)
    assert filtered(root, "sub-01_task-rest_run-2") == {"bold": {"task": ["film", "rest"]}}
    assert "cannot leave out sub-01_task-rest_run-2 alone" in capsys.readouterr().err
    assert filtered(root, "sub-01_task-film_run-3") == {
        "bold": {"task": ["rest"], "run": [None, "2"]}
    }
    assert filtered(root, "sub-01_task-rest_acq-fast_run-2")["bold"]["acquisition"] == [None]
    assert filtered(root, "sub-01_task-rest_run-2", "sub-01_task-rest_acq-fast_run-2") == {
        "bold": {"task": ["film", "rest"], "acquisition": [None], "run": [None, "3"]}
    }
    assert capsys.readouterr().err == ""


def test_an_excluded_t1w_is_left_out_or_the_subject_refused(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    write_raw(root, "sub-01", "task-rest")
    whole = {"bold": {"task": ["rest"]}}
    assert filtered(root) == whole
    for name in ("acq-a_run-1", "acq-a_run-2", "acq-b_run-2"):
        write_image(root / "sub-01" / "anat" / f"sub-01_{name}_T1w.nii.gz", (4, 4, 4))
    assert filtered(root) == whole
    assert filtered(root, "sub-01_acq-b_run-2") == {**whole, "t1w": {"acquisition": [None, "a"]}}
    with pytest.raises(
        InputError, match=r"sub-01_acq-a_run-2_T1w\.nii\.gz: exclude in .* names it"
    ):
        filtered(root, "sub-01_acq-a_run-2")
    (root / "sub-01" / "anat" / "sub-01_T1w.nii.gz").unlink()
    with pytest.raises(InputError, match=r"acq-b_run-2_T1w\.nii\.gz: exclude .* which is needed"):
        filtered(root, "sub-01_acq-a", "sub-01_acq-b")


def test_the_filters_are_those_of_what_is_in_the_folder(tmp_path: Path, state: Path) -> None:
    one, other = (f"sub-01_task-rest_run-{number}" for number in "12")
    subject, raw = the_subject(tmp_path / "raw", exclude=[other]), tmp_path / "raw"
    (tmp_path / "fmriprep.sif").touch()
    own = {"engine": "apptainer", "fmriprep": {"image": str(tmp_path / "fmriprep.sif")}}
    folders = raw, subject, tmp_path / "out", tmp_path / "work"
    assert preprocess_subject(*folders, SPACE, Preprocess.model_validate(own)) == {}
    made = {path.name.partition("_space")[0] for path in tmp_path.glob("out/sub-01/func/*_bold.*")}
    assert made == {one}


# --- What must be there before ------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_without_a_licence_nothing_is_started(
    tmp_path: Path, state: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FS_LICENSE")
    with pytest.raises(NotReadyError, match=r"set preprocess\.fmriprep\.license"):
        run(tmp_path, engine)
    with pytest.raises(NotReadyError, match=r"gone\.txt .*is not a file"):
        run(tmp_path, engine, fmriprep={"license": str(tmp_path / "gone.txt")})
    assert calls(state) == []


@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_without_the_client(
    tmp_path: Path, state: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotReadyError, match="on PATH; install it"):
        run(tmp_path, engine)


@pytest.mark.parametrize(("engine", "says"), [("docker", "permission"), ("apptainer", "FATAL")])
def test_a_client_that_starts_no_container_stops_the_job(
    tmp_path: Path, state: Path, engine: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CLIENT", "broken")
    with pytest.raises(NotReadyError, match=f"{engine} could not start fMRIPrep: .*{says}"):
        run(tmp_path, engine)


def test_apptainer_needs_an_image_and_templates_that_are_there(tmp_path: Path, state: Path) -> None:
    with pytest.raises(NotReadyError, match="apptainer build fmriprep-25"):
        run(tmp_path, "apptainer", fmriprep={"image": None})
    with pytest.raises(NotReadyError, match=r"no\.sif .*does not exist"):
        run(tmp_path, "apptainer", fmriprep={"image": str(tmp_path / "no.sif")})
    with pytest.raises(NotReadyError, match=f"has no tpl-{SPACE}; fetch it"):
        run(tmp_path, "apptainer", fmriprep={"templateflow": str(tmp_path)})


@pytest.mark.parametrize(("engine", "name"), [("apptainer", "a,b"), ("docker", "a:b")])
def test_characters_that_mean_something_to_mounts(
    tmp_path: Path, state: Path, engine: str, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "license.txt").touch()
    with pytest.raises(NotReadyError, match=r"in a path has a meaning.*rename the folder"):
        run(tmp_path, engine, fmriprep={"license": str(tmp_path / name / "license.txt")})
    assert calls(state) == []


def test_what_fmriprep_docker_cannot_do(tmp_path: Path, state: Path) -> None:
    with pytest.raises(NotReadyError, match="mounts no folder of templates"):
        run(tmp_path, "docker", fmriprep={"templateflow": str(tmp_path)})
    with pytest.raises(NotReadyError, match="knows no space MNI305"):
        run(tmp_path, "docker", space="MNI305")
    subject, raw = the_subject(tmp_path / "raw"), tmp_path / "raw"
    with pytest.raises(NotReadyError, match=r"set preprocess\.scratch to a folder outside"):
        preprocess_subject(raw, subject, raw / "out", raw / "w", SPACE, Preprocess(engine="docker"))


def test_flags_that_other_settings_set(tmp_path: Path, state: Path) -> None:
    with pytest.raises(NotReadyError, match="flags: --mem-mb, -w is set by other settings"):
        run(tmp_path, "docker", fmriprep={"flags": ["-w", "/tmp", "--mem-mb=1"]})


# --- How it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_a_crash_is_told_for_the_run_that_it_is_of(
    tmp_path: Path, state: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "crash")
    node = "fmriprep_25_2_wf.sub_01_wf.bold_task_rest_run_2_wf.bold_confs_wf.acompcor"
    assert run(tmp_path, engine) == {
        "sub-01_task-rest_run-2": f"fMRIPrep ended with exit status 1: {node}: ValueError: "
        "Signals: no data"
    }


def test_a_failure_of_the_report_alone_leaves_no_run_out(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "report")
    assert run(tmp_path, "docker") == {}


def test_out_of_memory_says_what_to_raise(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "memory")
    reasons = run(tmp_path, "docker")
    assert list(reasons) == ["sub-01_task-rest_run-2"]
    assert "exit status 137" in reasons["sub-01_task-rest_run-2"]
    assert "raise preprocess.memory_mb" in reasons["sub-01_task-rest_run-2"]


def test_no_run_at_all_is_a_failure_of_the_subject(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "workflow")
    with pytest.raises(InputError) as caught:
        run(tmp_path, "docker")
    assert not isinstance(caught.value, NotReadyError)
    assert str(caught.value) == (
        "fMRIPrep ended with exit status 126 (it could not build its workflow): ERROR: no commands"
    )


def test_what_is_printed_is_logged_and_relayed(
    tmp_path: Path, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "docker")
    log = (tmp_path / "work" / "fmriprep.log").read_text()
    assert "RUNNING: docker run" in log
    assert "fMRIPrep of sub-01: 2 runs" in log
    assert capsys.readouterr().err == log


@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_the_time_limit_ends_it_and_its_container(
    tmp_path: Path, state: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_END", "hang")
    started = time.monotonic()
    reasons = run(tmp_path, engine, time_limit=8 / 60)
    assert time.monotonic() - started < 60
    assert list(reasons) == ["sub-01_task-rest_run-2"]
    assert "stopped after preprocess.time_limit = 0.133333 minutes" in str(reasons)
    if engine == "docker":
        assert calls(state)[-1][:2] == ["docker", "kill"]
    assert running_in(tmp_path) == []


def running_in(folder: Path) -> list[str]:
    """Command lines of processes of this machine that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and "pytest" not in line:
            found.append(line)
    return found


# --- Supervision --------------------------------------------------------------------------------


def start(code: str, tmp_path: Path, **environment: str) -> subprocess.Popen:
    """A process that runs `code` with `run_program` at hand.

    It heeds its signals also where these tests run in a background that ignores them.
    """
    heeds = "signal.signal(1, signal.SIG_DFL); signal.signal(2, signal.default_int_handler)"
    imports = "import signal\nfrom pathlib import Path\nfrom neuromamba.supervise import *"
    text = f"{imports}\n{heeds}\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", text],
        env={**os.environ, **environment},
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


CHILDREN = (
    "import os, time, subprocess, sys; open('pid', 'w').write(str(os.getpid())); "
    "subprocess.run(['sleep', '99'])"
)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -2)]
)
def test_a_signal_ends_the_program_and_its_children(tmp_path: Path, number: int, code: int) -> None:
    command = [sys.executable, "-c", CHILDREN]
    process = start(
        f"run_program({command!r}, Path('log'), 99, {{}}, lambda: Path('stopped').touch())",
        tmp_path,
    )
    wait_for(tmp_path / "pid")
    group = int((tmp_path / "pid").read_text())
    process.send_signal(number)
    assert process.wait(30) == code
    assert (tmp_path / "stopped").exists()
    assert not living_in_group(group)


def living_in_group(group: int) -> list[str]:
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def test_a_stubborn_program_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuromamba.supervise.GRACE", 0.5)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"
    ended = run_program([sys.executable, "-c", code], tmp_path / "log", 2.0, {}, lambda: None)
    assert ended.timed_out
    assert ended.code in (137, 143)  # the second where it had not come so far as to be stubborn


def test_an_exit_status_is_the_shells(tmp_path: Path) -> None:
    def ends(code: str) -> int:
        command = [sys.executable, "-c", code]
        return run_program(command, tmp_path / "log", 60, {"X": "3"}, lambda: None).code

    assert ends("import os, sys; sys.exit(int(os.environ['X']))") == 3
    assert ends("import os; os.kill(os.getpid(), 9)") == 137
    with pytest.raises(InputError, match="no-such-program cannot be started"):
        run_program(["no-such-program"], tmp_path / "log", 1, {}, lambda: None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("then", ["time.sleep(99)", "sys.exit(0)"])
def test_a_log_on_a_full_disk_ends_the_program_and_is_an_error(tmp_path: Path, then: str) -> None:
    code = (
        f"import sys, time; sys.stdout.write('x' * 99 + '\\n' * 99999); sys.stdout.flush(); {then}"
    )
    stopped: list[bool] = []
    started = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        run_program(
            [sys.executable, "-c", code], Path("/dev/full"), 40, {}, lambda: stopped.append(True)
        )
    assert time.monotonic() - started < 20
    assert stopped or then == "sys.exit(0)"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_what_a_killed_start_left_running_is_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILDREN]
    code = f"run_program({command!r}, Path('log'), 99, {{'A_VARIABLE': 'a-value'}}, lambda: None)"
    process = start(code, tmp_path)
    wait_for(tmp_path / "pid")
    process.kill()
    process.wait()
    orphan = int((tmp_path / "pid").read_text())
    assert living_in_group(orphan)
    assert end_earlier("A_VARIABLE", "another") == []
    assert orphan in end_earlier("A_VARIABLE", "a-value")
    time.sleep(0.2)
    assert not living_in_group(orphan)


def test_an_orphaned_container_is_stopped_before_the_next_start(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "docker")
    (first,) = calls(state)
    token = next(value for value in first if value.startswith("NEUROMAMBA_RUN="))
    own, other = (subprocess.Popen(["sleep", "99"]) for _ in range(2))
    for process, variable in ((own, token), (other, "NEUROMAMBA_RUN=of-others")):
        record = {"pid": process.pid, "env": ["PATH=/bin", variable]}
        (state / "containers" / f"{process.pid:064d}.json").write_text(json.dumps(record))
    run(tmp_path, "docker")
    assert own.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()
    assert [call[1] for call in calls(state)] == ["run", "kill", "run"]
