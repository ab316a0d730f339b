"""What a stage's code is: the modules of this package that its results depend on.

A stage's modules are found by following their imports, so that no list can be forgotten. What no
result depends on (paths, tables, progress, messages) is `NEUTRAL` and is not followed.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
NEUTRAL = frozenset(
    {
        "__init__",
        "checkpoint",
        "cli",
        "config",
        "contents",
        "distributed",
        "files",
        "key_inputs",
        "keys",
        "launch",
        "layout",
        "models",
        "owned",
        "prefetch",
        "qc_rules",
        "raw_listing",
        "record",
        "recording",
        "records",
        "runtime",
        "source_code",
        "stage",
        "stage_settings",
        "stages",
        "tables",
        "throughput",
    }
)
"""Modules and packages that only carry results about; `models` is its `__init__`, which picks."""


@cache
def code_of(*modules: str) -> dict[str, str]:
    """Digests of the source of some modules and of all modules that they import, by file.

    Comments and empty lines do not count, so that explaining a stage does not repeat it.

    Parameters
    ----------
    modules
        Names inside the package: `tokens`, `models.neuromamba`.

    Returns
    -------
    dict
        `neuromamba/tokens.py` -> 16 hexadecimal digits, sorted.
    """
    found: set[str] = set()
    queue = list(modules)
    while queue:
        module = queue.pop()
        if module not in found:
            found.add(module)
            queue += _imported(module)
    files = [file for name in sorted(found) for file in (_file(name), *_templates(name))]
    return {f"{PACKAGE.name}/{file}": _digest(file) for file in files}


def _file(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _templates(module: str) -> list[str]:
    """The templates that bear a module's name: those of `report` are `report.*.j2`."""
    return sorted(path.name for path in PACKAGE.glob(f"{module}.*.j2"))


@cache
def _digest(file: str) -> str:
    source = (PACKAGE / file).read_text(encoding="utf-8")
    counted = without_comments(source) if file.endswith(".py") else source
    return hashlib.sha256(counted.encode()).hexdigest()[:16]


def without_comments(source: str) -> str:
    """Python source without its comments, the spaces before them, and empty lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line for line in map(str.rstrip, lines) if line)


@cache
def _imported(module: str) -> list[str]:
    """Modules of this package that a module imports, at its top or inside, but for neutral ones."""
    tree = ast.parse((PACKAGE / _file(module)).read_text(encoding="utf-8"))
    names = {name for node in ast.walk(tree) for name in _names(node)}
    return sorted(name for name in names if not _is_neutral(name) and _is_module(name))


def _names(node: ast.AST) -> Iterator[str]:
    """What an import statement may name inside this package."""
    start = f"{PACKAGE.name}."
    if isinstance(node, ast.Import):
        yield from (a.name.removeprefix(start) for a in node.names if a.name.startswith(start))
    if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(start):
        module = f"{node.module}."[len(start) :]
        yield module.rstrip(".")
        yield from (f"{module}{alias.name}" for alias in node.names)


def _is_neutral(module: str) -> bool:
    return module in NEUTRAL or module.split(".")[0] in NEUTRAL - {"models"}


def _is_module(name: str) -> bool:
    return bool(name) and (PACKAGE / _file(name)).is_file()
