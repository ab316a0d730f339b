"""The command lines that run fMRIPrep for one subject, and what must be there before.

Both ways to run it, the `fmriprep-docker` package and Apptainer, are given the same arguments of
fMRIPrep's own, made in one place. Nothing passes a shell.

Source: usage of fMRIPrep and fmriprep-docker 25.2 (https://fmriprep.org, Apache-2.0).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from neuromamba.config import Fmriprep, Preprocess
from neuromamba.files import InputError
from neuromamba.raw_bids import RawSubject

RESOLUTION = "res-2"
"""The 2 mm grid; outputs with `res` appear only when asked for."""
WITHOUT_RESOLUTION = {
    *("anat", "T1w", "run", "func", "sbref", "fsnative"),
    *("fsLR", "fsaverage", "fsaverage5", "fsaverage6"),
}
"""Output spaces that are native, or surfaces."""
OWN_FLAGS = {
    *("-w", "--work-dir", "--output-spaces", "--participant-label", "--participant_label"),
    *("--nthreads", "--n_cpus", "--n-cpus", "--omp-nthreads", "--mem", "--mem_mb", "--mem-mb"),
    *("--fs-license-file", "--fs-no-reconall", "--bids-filter-file", "--output-layout", "-i"),
    *("-t", "--task-id", "--session-label", "--image", "-u", "--user", "-e", "--env", "--no-tty"),
}
"""Flags that follow from other settings."""
MAX_OMP_THREADS = 8
"""fMRIPrep's own limit; ANTs gains nothing from more."""
VARIABLE = "NEUROMAMBA_RUN"
"""Variable by which a container is found again."""


class NotReadyError(InputError):
    """What keeps an engine from running lies not in the subject, so that no subject will do."""


def docker_command(
    bids: Path,
    subject: RawSubject,
    output: Path,
    work: Path,
    space: str,
    settings: Preprocess,
    token: str,
) -> list[str]:
    """The `fmriprep-docker` command line for one subject."""
    own = settings.fmriprep
    if importlib.util.find_spec("fmriprep_docker") is None:
        raise NotReadyError("fmriprep-docker is not installed; pip install 'neuromamba[workflow]'")
    _find_program("docker", settings.engine)
    licence = _licence(own)
    _refuse_characters(":", (bids, output, work, licence))
    _refuse_for_docker(bids, work, own, output_spaces(space, own))
    version = own.version or importlib.metadata.version("fmriprep-docker")
    return [
        *(sys.executable, "-m", "fmriprep_docker", str(bids), str(output), "participant"),
        *("-i", own.image or f"nipreps/fmriprep:{version}"),
        *("--no-tty", "--user", f"{os.getuid()}:{os.getgid()}", "-e", VARIABLE, token),
        *("-w", str(work), "--fs-license-file", str(licence)),
        *("--bids-filter-file", str(work / "bids_filter.json")),
        *_common(subject, space, settings),
    ]


def apptainer_command(
    bids: Path,
    subject: RawSubject,
    output: Path,
    work: Path,
    space: str,
    settings: Preprocess,
    token: str,
) -> list[str]:
    """The `apptainer run` command line for one subject; `singularity`, where only that is there."""
    own = settings.fmriprep
    program = "apptainer" if shutil.which("apptainer") else "singularity"
    _find_program(program, settings.engine)
    licence = _licence(own)
    binds = {bids: "/data:ro", output: "/out", work: "/scratch", licence: "/license.txt:ro"}
    variables = [f"{VARIABLE}={token}"]
    templates = _templates(own, output_spaces(space, own))
    if templates is not None:
        binds[templates] = "/templateflow"
        variables.append("TEMPLATEFLOW_HOME=/templateflow")
    _refuse_characters(",:", tuple(binds))
    return [
        *(program, "run", "--cleanenv", "-B", ",".join(f"{p}:{at}" for p, at in binds.items())),
        *("--env", ",".join(variables), _image_file(own), "/data", "/out", "participant"),
        *("-w", "/scratch", "--fs-license-file", "/license.txt"),
        *("--bids-filter-file", "/scratch/bids_filter.json"),
        *_common(subject, space, settings),
    ]


def _common(subject: RawSubject, space: str, settings: Preprocess) -> list[str]:
    """fMRIPrep's own arguments, whatever runs it."""
    own, threads = settings.fmriprep, settings.threads
    clash = sorted(OWN_FLAGS & {flag.partition("=")[0] for flag in own.flags})
    if clash:
        raise NotReadyError(
            f"preprocess.fmriprep.flags: {', '.join(clash)} is set by other settings; leave it out"
        )
    return [
        *("--participant-label", subject.name.removeprefix("sub-")),
        *("--output-spaces", *output_spaces(space, own)),
        *([] if own.freesurfer else ["--fs-no-reconall"]),
        *("--nthreads", str(threads), "--omp-nthreads", str(min(threads, MAX_OMP_THREADS))),
        *("--mem_mb", str(settings.memory_mb), "--notrack"),
        *own.flags,
    ]


def output_spaces(space: str, settings: Fmriprep) -> list[str]:
    """The output spaces: the dataset's first, and a resolution for each standard one."""
    wanted = list(settings.output_spaces)
    if space not in {name.partition(":")[0] for name in wanted}:
        wanted.insert(0, space)
    return [
        name
        if ":res-" in name or name.partition(":")[0] in WITHOUT_RESOLUTION
        else f"{name}:{RESOLUTION}"
        for name in wanted
    ]


# --- What must be there before ------------------------------------------------------------------


def _find_program(name: str, engine: str) -> None:
    if shutil.which(name) is None:
        raise NotReadyError(
            f"preprocess.engine is {engine}, but there is no {name} on PATH; install it, load its "
            "module, or choose another engine"
        )


def _licence(settings: Fmriprep) -> Path:
    """FreeSurfer's licence, which fMRIPrep needs with `--fs-no-reconall` too."""
    home = os.environ.get("FREESURFER_HOME")
    places = [
        ("preprocess.fmriprep.license", settings.license),
        ("FS_LICENSE", os.environ.get("FS_LICENSE")),
        ("FREESURFER_HOME", f"{home}/license.txt" if home else None),
    ]
    for source, path in places:
        if path and Path(path).is_file():
            return Path(path).resolve()
        if path and source != "FREESURFER_HOME":
            raise NotReadyError(f"{path} ({source}) is not a file; it must be FreeSurfer's licence")
    raise NotReadyError(
        "fMRIPrep needs a licence file of FreeSurfer (free, from "
        "https://surfer.nmr.mgh.harvard.edu/registration.html): set preprocess.fmriprep.license "
        "or the variable FS_LICENSE to it"
    )


def _refuse_characters(characters: str, paths: Sequence[Path]) -> None:
    for path in paths:
        strange = [character for character in characters if character in str(path)]
        if strange:
            raise NotReadyError(
                f"{path}: {strange[0]!r} in a path has a meaning for the container's mounts; "
                "rename the folder, or use a link without it"
            )


def _refuse_for_docker(bids: Path, work: Path, settings: Fmriprep, spaces: Sequence[str]) -> None:
    """What `fmriprep-docker` would refuse, or cannot do."""
    known = importlib.import_module("fmriprep_docker.__main__")
    if work.is_relative_to(bids):
        raise NotReadyError(
            f"{work} is in the raw dataset {bids}, where fMRIPrep does not work; set "
            "preprocess.scratch to a folder outside of it"
        )
    if settings.templateflow is not None:
        raise NotReadyError(
            "preprocess.fmriprep.templateflow: fmriprep-docker mounts no folder of templates; "
            "leave it out (the image has those of MNI152NLin2009cAsym), or use engine: apptainer"
        )
    named = {space.partition(":")[0] for space in spaces}
    unknown = named - {*known.TF_TEMPLATES, *known.NONSTANDARD_REFERENCES}
    if unknown:
        raise NotReadyError(
            f"fmriprep-docker knows no space {', '.join(sorted(unknown))}; it has "
            f"{', '.join(known.TF_TEMPLATES)}; change space in the dataset YAML, or use "
            "engine: apptainer"
        )


def _image_file(settings: Fmriprep) -> str:
    """The image for Apptainer: a file or folder, or an address such as `docker://...`."""
    image = settings.image
    if image is None:
        version = settings.version or "25.2.7"
        raise NotReadyError(
            "preprocess.fmriprep.image is needed for engine: apptainer; make one by: apptainer "
            f"build fmriprep-{version}.sif docker://nipreps/fmriprep:{version}"
        )
    if "://" not in image and not Path(image).exists():
        raise NotReadyError(f"{image} (preprocess.fmriprep.image) does not exist")
    return image


def _templates(settings: Fmriprep, spaces: Sequence[str]) -> Path | None:
    """The folder of templates, if one is set; it must hold those of the output spaces."""
    folder = settings.templateflow or os.environ.get("TEMPLATEFLOW_HOME")
    if folder is None:
        return None
    names = {space.partition(":")[0] for space in spaces} - WITHOUT_RESOLUTION
    missing = [name for name in sorted(names) if not Path(folder, f"tpl-{name}").is_dir()]
    if missing:
        raise NotReadyError(
            f"{folder} (preprocess.fmriprep.templateflow, or TEMPLATEFLOW_HOME) has no "
            f"tpl-{missing[0]}; fetch it where there is a network: TEMPLATEFLOW_HOME={folder} "
            f"python -c \"from templateflow import api; api.get('{missing[0]}')\""
        )
    return Path(folder).resolve()
