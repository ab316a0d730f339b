"""What the preprocessing engine needs, and whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from neuromamba.ants_template import PACKAGED_SPACE
from neuromamba.config import Config, Dataset, Preprocess, Template
from neuromamba.files import InputError
from neuromamba.findings import Finding
from neuromamba.fmriprep_command import apptainer_command, docker_command
from neuromamba.raw_bids import RawSubject
from neuromamba.sidecars import read_sidecar


def check_engine(config: Config, dataset: Dataset) -> list[Finding]:
    """What keeps the engine from preprocessing the dataset on this machine."""
    root, settings = Path(str(dataset.bids)), config.preprocess
    if settings.engine == "ants":
        messages = _check_ants(settings.ants.template, dataset.space)
    else:
        messages = _check_fmriprep(root, Path(dataset.derivatives), dataset.space, settings)
    return [Finding("blocked", "", message) for message in messages]


def _check_ants(template: Template | None, space: str) -> Iterator[str]:
    if find_spec("ants") is None:
        yield "antspyx is not installed: the engine `ants` needs it; pip install 'neuromamba[ants]'"
    if template is None:
        if space != PACKAGED_SPACE:
            yield (
                f"space: the packaged template of the engine `ants` is in {PACKAGED_SPACE}, and "
                f"the dataset YAML says {space}; set space: {PACKAGED_SPACE} there, or give the "
                "files of a template in that space by preprocess.ants.template"
            )
        return
    if not (template.t1w or template.epi):
        yield "template: preprocess.ants.template has neither t1w nor epi; give one of them"
    for key, path in template.model_dump().items():
        if path is not None and not Path(path).is_file():
            yield f"template: preprocess.ants.template.{key} is {path}, which does not exist"


def _check_fmriprep(
    root: Path, derivatives: Path, space: str, settings: Preprocess
) -> Iterator[str]:
    """What the engine itself would refuse before it starts a subject."""
    command = docker_command if settings.engine == "docker" else apptainer_command
    place = derivatives.absolute()
    scratch = Path(settings.scratch).absolute() if settings.scratch else place / "work"
    subject = RawSubject("sub-01", ())
    try:
        command(root.absolute(), subject, place, scratch, space, settings, "check")
    except InputError as error:
        yield f"the engine `{settings.engine}` is not ready: {error}"
    yield from _check_description(root)


def _check_description(root: Path) -> Iterator[str]:
    """fMRIPrep refuses a folder without `dataset_description.json`; `ants` does not read it."""
    if not root.is_dir():
        return
    path = root / "dataset_description.json"
    try:
        missing = [key for key in ("Name", "BIDSVersion") if key not in read_sidecar(path)]
    except InputError as error:
        yield f"{error} (fMRIPrep needs it)"
    else:
        if missing:
            yield f"{path} lacks {' and '.join(missing)}, which fMRIPrep needs; add them"
