"""Atomic writes, digests, and the error that every stage raises on bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """A problem with the user's data or settings.

    The message names the file (or key), says what is wrong with it, and what to do about it. The
    command line prints it without a traceback; a stage that works run by run records it as the
    reason for leaving the run out.
    """


@contextmanager
def atomic_path(path: Path | str, keep: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block succeeds.

    The block creates either a file or a folder there. When it raises, what it wrote is removed and
    whatever stood at `path` before stays. A process that dies leaves a hidden `.tmp-*` entry that
    nothing reads. A folder is replaced by moving the old one aside first, because POSIX cannot
    rename over a folder that is not empty. Where `keep()` is true by then, as another process has
    put the same there meanwhile, that stays instead.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        yield temporary
        if keep():
            return
        if path.is_dir():
            old = path.with_name(f".tmp-{uuid.uuid4().hex[:8]}-old-{path.name}")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; raise `InputError` naming the file when it is absent or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); repair or regenerate it") from None


def digest_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_folder(folder: Path) -> str:
    """SHA-256 of the names and contents of the JSON and safetensors files in a folder of weights.

    What else lies there, such as a model card, is no part of the model.
    """
    files = [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    return digest_json({path.name: digest_file(path) for path in files})


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON-able value with sorted keys, so that key order does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
