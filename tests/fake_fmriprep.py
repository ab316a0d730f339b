"""Stand-ins for `docker` and `apptainer` with an fMRIPrep in their image, as programs on PATH.

They record how they are called, and leave behind what fMRIPrep leaves, well or badly ended. A
container of the `docker` stand-in goes on when its client is killed, as a real one does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest  # which the programs themselves need not wait for

SPACE = "MNI152NLin2009cAsym"
VOLUMES = 5
CRASH = """Node: fmriprep_25_2_wf.sub_{label}_wf.bold_{run}_wf.bold_confs_wf.{node}
Working directory: /scratch/fmriprep_25_2_wf

Node inputs:

in_file = <undefined>

Traceback (most recent call last):
  File "/app/nipype/pipeline/engine/nodes.py", line 525, in run
    result = self._run_interface(execute=True)
{error}
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, licence: bool = True) -> Path:
    """Put both stand-ins first on PATH; return the folder of their records."""
    programs, state = folder / "bin", folder / "state"
    programs.mkdir()
    (state / "containers").mkdir(parents=True)
    for name in ("docker", "apptainer"):
        script = (
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import fake_fmriprep\nsys.exit(fake_fmriprep.{name}(sys.argv[1:]))\n"
        )
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_STATE", str(state))
    for variable in ("FS_LICENSE", "FREESURFER_HOME", "TEMPLATEFLOW_HOME"):
        monkeypatch.delenv(variable, raising=False)
    if licence:
        (folder / "license.txt").write_text("someone\n")
        monkeypatch.setenv("FS_LICENSE", str(folder / "license.txt"))
    return state


def calls(state: Path) -> list[list[str]]:
    """How the stand-ins were called, those calls apart that only ask."""
    path = state / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    made = [json.loads(line) for line in lines]
    return [c for c in made if c[1] in ("run", "kill") and "--entrypoint=free" not in c]


def write_raw(root: Path, subject: str, *runs: str) -> None:
    """A subject with a T1w image and runs such as `ses-1_task-rest_run-1` or `task-rest_echo-1`."""
    (root / "dataset_description.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.9.0"}')
    write_image(root / subject / "anat" / f"{subject}_T1w.nii.gz", (4, 4, 4))
    for run in runs:
        session = [part for part in run.split("_") if part.startswith("ses-")]
        bold = root.joinpath(subject, *session, "func", f"{subject}_{run}_bold.nii.gz")
        write_image(bold, (4, 4, 4, VOLUMES))
        bold.with_name(f"{subject}_{run}_bold.json").write_text('{"RepetitionTime": 2.0}')


def write_image(path: Path, shape: tuple[int, ...]) -> None:
    import nibabel as nib
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    nib.save(nib.Nifti1Image(rng.integers(1, 999, shape, dtype=np.int16), np.eye(4)), path)


def write_run(out: Path, run: str, space: str = SPACE) -> Path:
    """What fMRIPrep writes of one run, named by all its entities; the BOLD file is returned."""
    folders = [part for part in run.split("_") if part.startswith(("sub-", "ses-"))]
    stem = out.joinpath(*folders, "func", run)
    bold = Path(f"{stem}_space-{space}_res-2_desc-preproc_bold.nii.gz")
    write_image(bold, (4, 4, 4, VOLUMES))
    bold.with_name(bold.name.replace(".nii.gz", ".json")).write_text('{"RepetitionTime": 2.0}')
    write_image(Path(f"{stem}_space-{space}_res-2_desc-brain_mask.nii.gz"), (4, 4, 4))
    write_image(Path(f"{stem}_space-{space}_res-2_boldref.nii.gz"), (4, 4, 4))
    table = "csf\ttrans_x\n" + "1.0\tn/a\n" * VOLUMES
    Path(f"{stem}_desc-confounds_timeseries.tsv").write_text(table)
    return bold


# --- fMRIPrep -----------------------------------------------------------------------------------


def fmriprep(bids: Path, out: Path, work: Path, arguments: list[str], filters: Path) -> int:
    """Work on a participant, and end as `FAKE_END` says; one run ends badly."""
    end = os.environ.get("FAKE_END", "well")
    label = arguments[arguments.index("--participant-label") + 1]
    spaces = [a for a in arguments if a.startswith("MNI")]
    runs = list(_runs(bids / f"sub-{label}", json.loads(filters.read_text())["bold"]))
    (work / "fmriprep_25_2_wf").mkdir(exist_ok=True)
    print(f"fMRIPrep of sub-{label}: {len(runs)} runs", flush=True)
    if end == "workflow":
        print("261129-12:00:00,001 nipype.workflow CRITICAL:\n\t ERROR: no commands", flush=True)
        return 126
    write_image(out / f"sub-{label}" / "anat" / f"sub-{label}_desc-preproc_T1w.nii.gz", (4, 4, 4))
    if "--fs-no-reconall" not in arguments:
        surfaces = out / "sourcedata" / "freesurfer" / f"sub-{label}" / "scripts"
        surfaces.mkdir(parents=True, exist_ok=True)
        with (surfaces / "recon-all.log").open("a") as log:  # resumed where there are any
            log.write("started\n")
    for run in runs:
        for space in spaces:
            bold = write_run(out, run, space.partition(":")[0])
        if run == runs[-1] and end not in ("well", "report"):
            _spoil(out, run, bold, end)
    _describe(out, f"sub-{label}", report=end == "well")
    if end == "hang":
        print("261129-12:00:00,001 nipype.workflow INFO:", flush=True)
        time.sleep(120)
    return {"well": 0, "memory": 137}.get(end, 1)


def _runs(folder: Path, wanted: dict[str, list[str | None]]) -> Iterator[str]:
    short = {"session": "ses", "acquisition": "acq"}
    found = {}
    for path in sorted(folder.rglob("func/*_bold.nii.gz")):
        parts = dict(part.split("-") for part in path.name.removesuffix("_bold.nii.gz").split("_"))
        parts.pop("echo", None)
        if all(parts.get(short.get(key, key)) in values for key, values in wanted.items()):
            found["_".join(f"{key}-{value}" for key, value in parts.items())] = True
    yield from found


def _spoil(out: Path, run: str, bold: Path, end: str) -> None:
    """A run that was being written when fMRIPrep crashed or was killed."""
    bold.write_bytes(bold.read_bytes()[:200])
    for table in bold.parent.glob(f"{run}_desc-confounds*"):
        table.unlink()
    if end in ("crash", "disk"):
        subject, _, rest = run.partition("_")
        error = {
            "crash": "ValueError: Signals: no data",
            "disk": "OSError: [Errno 28] No space left on device",
        }
        text = CRASH.format(
            label=subject[4:], run=rest.replace("-", "_"), node="acompcor", error=error[end]
        )
        crash = (
            out / subject / "log" / "20261129-120000_a1" / "crash-20261129-120000-me-acompcor.txt"
        )
        crash.parent.mkdir(parents=True)
        crash.write_text(text)


def _describe(out: Path, subject: str, report: bool) -> None:
    (out / subject / "figures").mkdir(exist_ok=True)
    (out / subject / "figures" / f"{subject}_dseg.svg").write_text("<svg/>")
    programs = [{"Name": "fMRIPrep", "Version": "25.2.7"}]
    text = json.dumps({"Name": "fMRIPrep", "BIDSVersion": "1.4.0", "GeneratedBy": programs})
    (out / "dataset_description.json").write_text(text)
    (out / ".bidsignore").write_text("*.html\n")
    (out / "logs").mkdir(exist_ok=True)
    (out / "logs" / "CITATION.md").write_text("cite\n")
    if report:
        (out / f"{subject}.html").write_text(f"<html>{subject}</html>")


# --- Clients ------------------------------------------------------------------------------------


def apptainer(arguments: list[str]) -> int:
    _record("apptainer", arguments)
    if os.environ.get("FAKE_CLIENT") == "broken":
        print("FATAL:   could not open image", file=sys.stderr)
        return 255
    places = {}
    for bind in arguments[arguments.index("-B") + 1].split(","):
        source, target = bind.split(":")[:2]
        places[target] = Path(source)
    filters = places["/scratch"] / "bids_filter.json"
    return fmriprep(places["/data"], places["/out"], places["/scratch"], arguments, filters)


def docker(arguments: list[str]) -> int:
    _record("docker", arguments)
    broken = os.environ.get("FAKE_CLIENT") == "broken"
    match arguments[0]:
        case "version":
            if broken:
                print("Cannot connect to the Docker daemon.", file=sys.stderr)
                return 1
            print("27.0.0")
        case "images":
            print("0123456789ab")
        case "run" if "--entrypoint=free" in arguments:
            print("              total\nMem:          64000")
        case "run":
            return _run_container(arguments)
        case "container":  # what the daemon itself would do
            return _in_container(arguments[1:])
        case "ps":
            print("\n".join(name for name in _containers()))
        case "inspect":
            for name in arguments[3:]:
                print(name, json.dumps(_containers()[name]["env"]))
        case "kill":
            os.kill(_containers()[arguments[1]]["pid"], signal.SIGKILL)
    return 0


def _run_container(arguments: list[str]) -> int:
    """The client: the container is a child in a session of its own, and outlives it."""
    environment = {k: v for k, v in os.environ.items() if k != "NEUROMAMBA_RUN"}
    process = subprocess.Popen(
        [sys.argv[0], "container", *arguments], start_new_session=True, env=environment
    )
    variables = [b for a, b in pairwise(arguments) if a == "-e"]
    path = _state() / "containers" / f"{process.pid:064d}.json"
    path.write_text(json.dumps({"pid": process.pid, "env": variables}))
    code = process.wait()
    path.unlink()
    return code if code >= 0 else 128 - code


def _in_container(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # process 1 does not hear it
    places = {}
    for flag, value in pairwise(arguments):
        if flag == "-v":
            source, target = value.split(":")[:2]
            places[target] = Path(source)
    filters = places["/tmp/bids_filter.json"]
    return fmriprep(places["/data"], places["/out"], places["/scratch"], arguments, filters)


def _containers() -> dict[str, dict]:
    """Those that run."""
    found = {}
    for path in sorted((_state() / "containers").glob("*.json")):
        container = json.loads(path.read_text())
        if Path(f"/proc/{container['pid']}/stat").exists() and not _is_zombie(container["pid"]):
            found[path.stem] = container
    return found


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _record(program: str, arguments: list[str]) -> None:
    line = json.dumps([program, *arguments]) + "\n"
    with (_state() / "calls.jsonl").open("a") as stream:
        stream.write(line)


def _state() -> Path:
    return Path(os.environ["FAKE_STATE"])
