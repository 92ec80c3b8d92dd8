"""Turns validation errors into lines a person can act on: where, what, what is allowed, the nearest name."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ValidationError

from molora.config.section import CLASH
from molora.config.strict_yaml import Path
from molora.config.suggest import options

TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a section (key: value)",
    "model_attributes_type": "a section (key: value)",
    "none_required": "null",
}
BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
MAX_ROUNDS = 8
# Where the first has a problem of its own, the second cannot be judged.
READ_BESIDE: tuple[tuple[Path, Path], ...] = (
    (("adapter", "num_experts"), ("adapter", "gate", "top_k")),
    (("adapter", "num_experts"), ("adapter", "expert_names")),
    (("adapter", "num_experts"), ("adapter", "tasks")),
    (("adapter", "expert_names"), ("adapter", "tasks")),
    (("data", "tasks"), ("adapter", "tasks")),
    (("base", "task_type"), ("data", "tasks")),
)
Problems = dict[Path, str]


def check(model: type[BaseModel], data: Any) -> tuple[BaseModel | None, Problems]:
    """Validate `data`; everything wrong with it, by path, at once.

    Sections compare their settings only when each of them is fine alone, so the faulty ones are taken out and
    the rest is validated again: a misspelt key does not hide that top_k is too large.
    """
    problems: Problems = {}
    rest = data
    for round_number in range(MAX_ROUNDS):
        try:
            value = model.model_validate(rest)
        except ValidationError as error:
            clashes = {path for item in error.errors(include_url=False) for path in _clash_paths(rest, item)}
            for path, text in _collect(model, rest, error).items():
                # After the first round only clashes count: anything else was caused by taking things out.
                if round_number == 0 or (path in clashes and not _concerns(path, problems)):
                    problems[path] = text
            rest = _without(rest, error)
        else:
            return (None, problems) if problems else (value, {})
    return None, problems


def _collect(model: type[BaseModel], data: Any, error: ValidationError) -> Problems:
    alternatives: dict[Path, list[str]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == CLASH:
            for path, (_, text) in zip(_clash_paths(data, item), item["ctx"]["problems"], strict=True):
                alternatives.setdefault(path, []).append(text)
            continue
        path = _real_path(data, item["loc"], missing=item["type"] == "missing")
        texts = alternatives.setdefault(path, [])
        text = _describe(model, path, item)
        if text not in texts:
            texts.append(text)
    kept = [path for path in alternatives if not _is_refined(path, alternatives, data)]
    return {path: _join(alternatives[path]) for path in kept}


def _clash_paths(data: Any, item: Any) -> list[Path]:
    if item["type"] != CLASH:
        return []
    base = _real_path(data, item["loc"])
    return [(*base, *below) for below, _ in item["ctx"]["problems"]]


def _real_path(data: Any, loc: tuple[int | str, ...], missing: bool = False) -> Path:
    """`loc` without the names of union members pydantic puts in between."""
    path: list[int | str] = []
    here = data
    for i, part in enumerate(loc):
        keys = here if isinstance(here, Mapping) else range(len(here)) if isinstance(here, list) else ()
        if part in keys:
            path.append(part)
            here = here[part]
        elif missing and i == len(loc) - 1:
            path.append(part)
    return tuple(path)


def _is_refined(path: Path, all_paths: Mapping[Path, Any], data: Any) -> bool:
    """Of a union's complaints the ones from deeper inside the value are those the user meant."""
    here = data
    for part in path:
        try:
            here = here[part]
        except (KeyError, IndexError, TypeError):
            return False
    if not isinstance(here, (list, Mapping)):
        return False
    texts = all_paths[path]
    about_type = all(text.startswith("must be ") for text in texts)
    return about_type and any(len(other) > len(path) and other[: len(path)] == path for other in all_paths)


def _join(texts: list[str]) -> str:
    if len(texts) == 1 or not all(text.startswith("must be ") for text in texts):
        return " ".join(texts)
    wanted = dict.fromkeys(text.removeprefix("must be ").split(", not ")[0] for text in texts)
    _, found, given = texts[0].partition(", not ")
    return f"must be {' or '.join(wanted)}{found}{given if found else '.'}"


def _within(model: type[BaseModel], name: Any) -> list[str]:
    """`train.lr` for `lr`: the sections that have a setting of this name."""
    return [f"{section}.{name}" for section in model.model_fields if name in settings_at(model, (section,))]


def _describe(model: type[BaseModel], path: Path, item: Any) -> str:
    kind, given, ctx = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        elsewhere = _within(model, path[-1]) if len(path) == 1 else []
        meant = f" Did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
        return f"not a setting.{meant}{options(path[-1], settings_at(model, path[:-1]), 'Settings here')}"
    if kind == "missing":
        return "is missing, and has no default."
    if kind == "literal_error":
        allowed = [part.strip(" '") for part in ctx["expected"].replace(" or ", ", ").split(",")]
        return f"{given!r} is not allowed.{options(given, allowed)}"
    if kind in TYPE_NAMES:
        plain = kind == "string_type" and isinstance(given, (int, float))
        return f"must be {TYPE_NAMES[kind]}, not {_short(given)}{'; put it in quotes' if plain else ''}."
    if kind in BOUNDS:
        key, words = BOUNDS[kind]
        bound = ctx[key]
        return f"must be {words} {bound:{',' if isinstance(bound, int) else 'g'}}, not {given!r}."
    if kind in ("too_short", "string_too_short"):
        return "must not be empty."
    if kind == "finite_number":
        return f"must be a finite number, not {given!r}."
    return str(item["msg"])


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)


def settings_at(model: type[BaseModel], path: Path) -> list[str]:
    """The settings a recipe may have at `path`."""
    found: Any = model
    for part in path:
        fields = getattr(found, "model_fields", {})
        if fields:
            found = _section(fields[part].annotation if part in fields else None)
        else:  # an item of a list or a map
            found = _section((typing.get_args(found) or (None,))[-1])
    if not hasattr(found, "model_fields"):
        return []
    shorthand = ["kind"] if found.__name__ == "GateSection" else []
    return [*shorthand, *found.model_fields]


def _section(annotation: Any) -> Any:
    """The section (or the container of sections) in an annotation such as `Section | None`."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        sections = (_section(option) for option in typing.get_args(annotation))
        return next((section for section in sections if section is not None), None)
    return annotation if origin in (list, dict) or hasattr(annotation, "model_fields") else None


def _without(data: Any, error: ValidationError) -> Any:
    """`data` without the values `error` is about; where something is missing, without the section that lacks it."""
    paths: set[Path] = set()
    for item in error.errors(include_url=False):
        paths.update(_clash_paths(data, item) or [_real_path(data, item["loc"])])
    # With a list item its list goes too; with a value those that are only right or wrong beside it.
    paths = {tuple(takewhile(lambda part: not isinstance(part, int), path)) for path in paths}
    paths |= {other for path in paths for cause, other in READ_BESIDE if path[: len(cause)] == cause}
    pruned = copy.deepcopy(data)
    for path in sorted(paths, key=str):  # which goes first may decide what is found next
        while path and not _delete(pruned, path):
            path = path[:-1]
    return pruned


def _delete(data: Any, path: Path) -> bool:
    try:
        for part in path[:-1]:
            data = data[part]
        del data[path[-1]]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _concerns(path: Path, problems: Problems) -> bool:
    return any(path[: len(other)] == other or other[: len(path)] == path for other in problems if other)


def report(problems: Problems, place: Callable[[Path], str], title: str) -> str:
    """The message for all problems: a title when there are several, then `place path: what`, in file order."""
    lines = [
        f"{place(path)}  {'.'.join(map(str, path)) or 'the recipe'}: {text}"
        for path, text in problems.items()
    ]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{title}: {len(lines)} problems", *(f"  {line}" for line in lines)])
