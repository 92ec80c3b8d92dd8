"""Every key of a recipe with its default and meaning, made from the sections themselves: for the docs and `recipes keys`."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from molora.config.data import TaskConfig
from molora.config.grow import GrowConfig
from molora.config.run import RunConfig
from molora.config.section import Section
from molora.config.setting import meaning

# Of the recipes of `train`, `continual`, `federate` and `add-expert`: where a section is written -> its class.
_ROOTS: dict[str, type[Section]] = {"": RunConfig, "add-expert": GrowConfig}
_SHOWN_ELSEWHERE = (TaskConfig,)  # as a section of its own: one that inherits its keys shows what it adds


class Key(NamedTuple):
    """One key: its name, what may be written, its default ("needed" where it has none) and what it means."""

    name: str
    takes: str
    default: str
    means: str


class Part(NamedTuple):
    """One section: where it is written ("" for the top of a recipe), what it is and its keys."""

    path: str
    about: str
    keys: list[Key]


def parts() -> list[Part]:
    """All sections of a recipe, outer ones first; then those that only a recipe of `add-expert` has."""
    found: dict[type[Section], Part] = {}
    for path, section in _ROOTS.items():
        _collect(path, section, found)
    return list(found.values())


def markdown() -> str:
    """All of them as Markdown: a heading and a table for each section."""
    return "\n\n".join("\n".join(_table(part)) for part in parts())


def _table(part: Part) -> Iterator[str]:
    title = f"`{part.path}`" if part.path else "The top"
    yield from (
        f"## {title}",
        "",
        part.about,
        "",
        "| key | takes | default | means |",
        "| --- | --- | --- | --- |",
    )
    for key in part.keys:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{key.name}`", *key[1:])) + " |"


def _collect(path: str, section: type[Section], found: dict[type[Section], Part]) -> None:
    if section in found:
        return
    keys, inner = [], []
    for name, key, below in _keys(section):
        keys.append(key)
        inner += [(f"{path}.{name}".lstrip("."), one) for one in below]
    found[section] = Part(path, (inspect.getdoc(section) or "").partition("\n\n")[0], keys)
    for where, one in inner:
        _collect(where, one, found)


def _keys(section: type[Section]) -> Iterator[tuple[str, Key, list[type[Section]]]]:
    declared = {
        f.name: meaning(f)
        for base in section.__mro__
        if is_dataclass(base)
        for f in fields(base)
        if "doc" in f.metadata
    }
    inherited = section.__base__.model_fields if section.__base__ in _SHOWN_ELSEWHERE else {}
    for name, field in section.model_fields.items():
        if name in inherited:
            continue
        below = list(_sections(field.annotation))
        where = f"{name}.<name>" if get_origin(field.annotation) is dict else name
        default = field.get_default(call_default_factory=True, validated_data={})
        yield (
            where,
            Key(name, _takes(field.annotation), _shown(default), field.description or declared[name]),
            below,
        )


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _takes(annotation: Any) -> str:
    """What may be written, in a few words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(inner[0])
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_takes(one) for one in inner if one is not type(None)))
    if origin is list:
        return f"[{_takes(inner[0])}, ...]"
    if origin is dict:
        return f"{{name: {_takes(inner[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}.get(
        annotation, "any"
    )


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return "needed"
    if default is None or default == {} or default == []:
        return "none"
    if isinstance(default, Section):
        return "its own defaults"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"
