"""Read, merge and check the YAML files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from neuromamba.config.schema import Config
from neuromamba.files import InputError, write_text

PER_MODEL = ("pretrain", "finetune")
"""Sections that stand in `config.yaml` for all models, and that a model's own file may change."""

_NAMED = (("datasets",), ("models",), ("scaling", "models"))
"""Keys whose value may be names of files; only the last may be left out."""


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read one YAML file that holds a mapping; `InputError` names the file and the line."""
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold `key: value` lines, not a {type(value).__name__}")
    return value


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `change` on top; mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def load_config(paths: Sequence[Path | str], settings: Sequence[str] = ()) -> Config:
    """Read a run's YAML files, later ones on top, then `key.key=value` settings on top of those.

    Names under `datasets` and `models` are looked up in the folders `datasets/` and `models/`
    beside the first file.

    Raises
    ------
    InputError
        Naming the file, the key, the value and what would be right.
    """
    raw: dict[str, Any] = {}
    for path in paths:
        raw = merge(raw, read_yaml(path))
    changes: dict[str, Any] = {}
    for setting in settings:
        changes = merge(changes, _parse_setting(setting))
    source = " + ".join(str(path) for path in paths)
    return build_config(raw, Path(paths[0]).parent, source, changes)


def build_config(
    raw: Mapping[str, Any],
    folder: Path | str,
    source: str,
    changes: Mapping[str, Any] | None = None,
) -> Config:
    """Check a merged mapping, with `changes` from the command line above everything else.

    `folder` holds `datasets/` and `models/`; `source` names the files in error messages.
    """
    whole: dict[str, Any] = deepcopy(dict(raw))
    change: dict[str, Any] = deepcopy(dict(changes or {}))
    for_models = {key: change.pop(key) for key in PER_MODEL if key in change}
    files: dict[tuple[str, ...], str] = {}
    shared = {key: whole.pop(key) for key in PER_MODEL if key in whole}
    for place in _NAMED:
        given = _holder(change, place)
        if place[-1] in given and not isinstance(given[place[-1]], Mapping):
            whole = merge(whole, _nest(place, given.pop(place[-1])))
        holder = _holder(whole, place)
        value = holder.get(place[-1])
        if value is None and len(place) > 1:
            continue
        found = _resolve_names(value, place, Path(folder), source, files)
        if place[-1] == "models":
            # What the command line says of a base holds for the models that take it over.
            own = _of_models(change) if place == ("models",) else {}
            for name, model in _with_bases(merge(found, own)).items():
                if isinstance(model, Mapping):
                    found[name] = merge(merge(shared, model), for_models)
        holder[place[-1]] = found
    whole = merge(whole, change)
    try:
        return Config.model_validate(whole)
    except ValidationError as error:
        raise InputError(_explain(error, source, files)) from None


def _of_models(change: Mapping[str, Any]) -> Mapping[str, Any]:
    models = change.get("models")
    return models if isinstance(models, Mapping) else {}


def _with_bases(models: Mapping[str, Any]) -> dict[str, Any]:
    """The models, those of another (`base`, `ablation_of`) on top of what that one's file says."""

    def complete(name: str, *above: str) -> Any:
        model = models[name]
        given = model if isinstance(model, Mapping) else {}
        key = next((key for key in ("base", "ablation_of") if given.get(key) is not None), None)
        if key is None:
            return model
        of = given[key]
        if of not in models or of in (name, *above):
            raise InputError(
                f"models.{name}.{key} is {of!r}, which must be another one of `models` "
                f"({', '.join(models)})"
            )
        base = complete(of, name, *above)
        return merge(base, model) if isinstance(base, Mapping) else model

    return {name: complete(name) for name in models}


def save_config(path: Path | str, config: Config) -> None:
    """Write the whole checked config as YAML that `load_config` reads back to the same value."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _parse_setting(setting: str) -> dict[str, Any]:
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise InputError(f"setting {setting!r} must have the form key.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"the value in setting {setting!r} is not valid YAML: {error}") from None
    return _nest(key.split("."), value)


def _nest(place: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(place):
        value = {key: value}
    return value


def _holder(tree: dict[str, Any], place: Sequence[str]) -> dict[str, Any]:
    """The mapping in `tree` that holds the last key of `place`; an empty one if there is none."""
    for key in place[:-1]:
        below = tree.get(key)
        tree = below if isinstance(below, dict) else {}
    return tree


def _resolve_names(
    value: Any,
    place: tuple[str, ...],
    folder: Path,
    source: str,
    files: dict[tuple[str, ...], str],
) -> dict[str, Any]:
    """Turn `[demo]` into `{"demo": contents of datasets/demo.yaml}`; a mapping stays as it is."""
    kind, key = place[-1], ".".join(place)
    if isinstance(value, Mapping):
        return dict(value)
    if value is None:
        raise InputError(f"{source}: key {key!r} is missing; give a list of names")
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{source}: {key} must be a list of names, like `{kind}: [demo]`")
    found = {}
    for name in value:
        path = folder / kind / f"{name}.yaml"
        if not path.exists():
            known = sorted(file.stem for file in (folder / kind).glob("*.yaml"))
            raise InputError(
                f"{source}: {key}: {name!r} has no file {path}; there are: {', '.join(known)}"
            )
        found[name] = read_yaml(path)
        files[(*place, name)] = str(path)
    return found


def _explain(error: ValidationError, source: str, files: Mapping[tuple[str, ...], str]) -> str:
    lines = []
    for problem in error.errors():
        whole = [str(part) for part in problem["loc"]]
        at = _place_of_member(whole)
        place = whole[:at] + whole[at + 1 :]
        named = next((n for n in (2, 3) if tuple(place[:n]) in files), 0)
        file, keys = files.get(tuple(place[:named])), place[named:]
        if file and keys[:1] in ([section] for section in PER_MODEL):
            file = f"{source} with {file}"  # the key may stand in either
        lines.append(f"{file or source}: {_explain_one(problem, whole, keys)}")
    return "\n".join(lines)


def _place_of_member(place: Sequence[str]) -> int:
    """Where the name of a union's member stands, which is no key of the file; else the end."""
    if place[:1] == ["datasets"] and place[2:3] == ["targets"]:
        return 4
    studied = place[:2] == ["scaling", "models"]
    return 3 if studied else 2 if place[:1] == ["models"] else len(place)


def _explain_one(problem: Any, whole: list[str], keys: list[str]) -> str:
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(whole[:-1])
        return f"unknown key {key!r}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    if problem["type"].startswith("union_tag"):
        member = problem["ctx"]["discriminator"].strip("'")
        key = f"{key}.{member}".lstrip(".")
        if problem["type"] == "union_tag_not_found":
            return f"key {key!r} is missing"
        tag, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        return f"{key} (is {tag!r}): must be one of {known}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = "" if isinstance(value, (Mapping, BaseModel)) else f" (is {value!r})"
    return f"{key}{shown}: {message}" if key else message


def _known_keys(place: Sequence[str]) -> list[str]:
    """The fields of the section at `place`, found by walking the schema's JSON form."""
    schema = Config.model_json_schema()
    nodes = [schema]
    for part in place:
        nodes = [child for node in nodes for child in _children(schema, node, part)]
    nodes = [_follow(schema, node) for node in nodes]
    nodes += [_follow(schema, option) for node in nodes for option in node.get("oneOf", [])]
    keys = {key for node in nodes for key in node.get("properties", {})}
    if not place:
        keys |= set(PER_MODEL)
    return sorted(keys)


def _follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[1]] if reference else node


def _children(schema: dict[str, Any], node: dict[str, Any], part: str) -> list[dict[str, Any]]:
    node = _follow(schema, node)
    member = node.get("discriminator", {}).get("mapping", {}).get(part)
    if member:
        return [{"$ref": member}]
    options = node.get("anyOf", []) + node.get("oneOf", [])
    if options:
        return [child for option in options for child in _children(schema, option, part)]
    named = node.get("properties", {}).get(part)
    other = node.get("additionalProperties") or next(
        iter(node.get("patternProperties", {}).values()), None
    )
    child = named or other
    return [child] if isinstance(child, dict) else []
