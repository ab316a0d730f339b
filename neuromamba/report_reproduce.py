"""The report's section on how it came about: versions, digests, revisions and commands."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from neuromamba.collect import Training
from neuromamba.config import Config
from neuromamba.files import digest_file, digest_json
from neuromamba.layout import Layout

PACKAGES = (
    "neuromamba",
    "numpy",
    "scipy",
    "scikit-learn",
    "nibabel",
    "nilearn",
    "zarr",
    "xarray",
    "torch",
)


def describe_provenance(config: Config, trainings: Sequence[Training]) -> dict[str, Any]:
    """What someone who wants the same results has to know."""
    saved = Layout.of(config, next(iter(config.datasets))).config
    return {
        "writer": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "trainers": _versions(trainings),
        "revisions": sorted({str(t.info.get("git_revision") or "unknown") for t in trainings}),
        "digests": _digests(config, trainings),
        "config_yaml": yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        "commands": _commands(config, saved),
    }


def _versions(trainings: Sequence[Training]) -> dict[str, str]:
    """Versions that the trainings recorded; several where they differ."""
    found: dict[str, set[str]] = {}
    for training in trainings:
        for name, text in training.info.get("versions", {}).items():
            found.setdefault(name, set()).add(str(text))
    return {name: ", ".join(sorted(versions)) for name, versions in sorted(found.items())}


def _digests(config: Config, trainings: Sequence[Training]) -> list[tuple[str, str]]:
    """What is digested, and its SHA-256."""
    rows = [("all settings", digest_json(config.model_dump(mode="json")))]
    for name in config.datasets:
        saved = Layout.of(config, name).config
        if saved.exists():
            rows.append((f"{name}: config.yaml beside its results", digest_file(saved)))
    for training in trainings:
        where = f"{training.dataset}, {training.stage}, {training.model}, seed {training.seed}"
        where += f", {training.fold}" if training.fold else ""
        for name, digest in training.info.get("inputs", {}).items():
            if isinstance(digest, str):
                rows.append((f"{where}: input {name}", digest))
        weights = training.info.get("files", {}).get("model.safetensors")
        if weights:
            rows.append((f"{where}: weights", weights))
    return rows


def _commands(config: Config, saved: Path) -> list[tuple[str, str]]:
    """What a command is for, and the command."""
    return [
        ("All of it, on this machine", f"snakemake --cores 2 all --configfile {saved}"),
        ("All of it, on a SLURM cluster", f"snakemake --profile slurm all --configfile {saved}"),
        ("This page again, from the results", f"neuromamba report --config {saved}"),
    ]
