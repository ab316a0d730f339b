"""What a training depends on, and what it ran with: the part of its files that is compared.

A record holds `settings` (config) and `inputs` (digests). Continuing a training, or using a model,
under other ones is refused with the difference, or starts again where that is asked for.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import neuromamba
from neuromamba.files import InputError, digest_file, read_json

FORMAT = 2
"""Raised when older checkpoints or models can no longer be read."""

OnChange = Literal["refuse", "restart"]

COMPARED = ("settings", "inputs")


class ChangedError(InputError):
    """A training on disk was made under other settings or inputs; the message shows which."""

    def __init__(self, path: Path, changes: list[str]) -> None:
        super().__init__(
            f"{path} was made under other settings or inputs:\n  "
            + "\n  ".join(changes)
            + "\nput them back, or use --on-change restart to train from the start"
        )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], compared: Sequence[str] = COMPARED
) -> list[str]:
    """Lines `key: old -> new` for all settings and inputs that differ."""
    before, after = _flatten(old, compared), _flatten(new, compared)
    return [
        f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key, "unset") != after.get(key, "unset")
    ]


def provenance() -> dict[str, Any]:
    """Versions of what ran, and the git revision of this package, `None` outside a checkout."""
    versions = {
        "neuromamba": neuromamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {"format": FORMAT, "versions": versions, "git_revision": _git_revision()}


def read_verified(path: Path, may_lack: str = "") -> dict[str, Any]:
    """Read a JSON file whose `files` are digests of the files beside it, and check these.

    The file `may_lack` need not be there.

    Raises
    ------
    InputError
        When something is missing, broken, of another format, or not what the digest says.
    """
    facts = read_json(path)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or "files" not in facts:
        raise InputError(f"{path} is not of this version's format ({FORMAT})")
    for name, digest in facts["files"].items():
        file = path.with_name(name)
        if not file.exists():
            if name == may_lack:
                continue
            raise InputError(f"{file} is missing")
        if digest_file(file) != digest:
            raise InputError(f"{file} differs from the digest in {path.name}")
    return facts


def ancestry(info: Mapping[str, Any]) -> dict[str, Any]:
    """What the `model.json` of a model says of the one it started from."""
    names = ("dataset", "model", "seed", "subjects", "files", "pretrained_from")
    return {name: info[name] for name in names if name in info}


def seen_subjects(info: Mapping[str, Any], dataset: str) -> set[str]:
    """Every subject of `dataset` that a model, or any that it started from, has seen.

    Seen is what it was trained or chosen on. Models of a mixture name subjects `dataset/sub-01`;
    names without a dataset are taken to be of this one, for the weights may have come from a copy.
    """
    own = {name.removeprefix(f"{dataset}/") for part in info["subjects"].values() for name in part}
    earlier = info.get("pretrained_from")
    return own | (seen_subjects(earlier, dataset) if earlier else set())


@cache
def _git_revision() -> str | None:
    """Commit of the checkout that holds this file, with `-dirty` when it has changes."""
    here = Path(__file__)
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    for command in (["ls-files", "--error-unmatch", here.name], describe):
        try:
            done = subprocess.run(
                ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
    return done.stdout.strip()


def _flatten(record: Mapping[str, Any], compared: Sequence[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, below in value.items():
                visit(f"{prefix}.{key}", below)
        else:
            flat[prefix.removeprefix(".")] = value

    for name in compared:
        visit("" if name == "settings" else f".{name}", record.get(name, {}))
    return flat
