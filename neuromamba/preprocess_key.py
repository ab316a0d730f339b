"""What derivatives depend on beside the raw scans: the engine, its settings, template and code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuromamba.config import Preprocess
from neuromamba.files import InputError, digest_file
from neuromamba.source_code import code_of


def engine_settings(settings: Preprocess) -> list[Any]:
    """The part of a subject's key that is the same for all subjects, JSON-able.

    Raises
    ------
    InputError
        When a file of the template cannot be read.
    """
    match settings.engine:
        case "none":
            return ["none"]
        case "ants":
            own = settings.ants.model_dump(mode="json")
            template = template_digests(settings) or None
            return ["ants", {**own, "template": template}, code_of("ants_engine")]
        case _:
            places = {"license", "templateflow"}
            return [settings.engine, settings.fmriprep.model_dump(mode="json", exclude=places)]


def template_digests(settings: Preprocess) -> dict[str, str]:
    """SHA-256 of the template's files that the `ants` engine reads, by what they are (`t1w`).

    Nothing for the packaged template, which is the same wherever its version is.

    Raises
    ------
    InputError
        When a file cannot be read.
    """
    return {name: _digest(name, Path(path)) for name, path in template_files(settings).items()}


def template_files(settings: Preprocess) -> dict[str, str]:
    """The files of a template that is not the packaged one, by what they are."""
    if settings.engine != "ants" or settings.ants.template is None:
        return {}
    return settings.ants.template.model_dump(exclude_none=True)


def _digest(name: str, path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        raise InputError(
            f"{path} (preprocess.ants.template.{name}) cannot be read ({error.strerror}); give the "
            "template's file"
        ) from None
