"""Whether values are of the types that a declaration annotates: checked first, so that every other rule can rely on them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from enum import Enum
from functools import lru_cache
from numbers import Integral
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from molora.config.setting import is_number, limits_of

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}
_SHOWN = 60
_ENTRIES_HAVE_RULES = ("always_on", "aux_losses")  # they say of a text what may stand there


def type_problems(values: object, declared: type) -> Iterator[tuple[str, str]]:
    """Name and message of the fields whose values have other types than the declaration's annotations.

    Collections may be of any kind (a JSON list, a set, a tuple), whole numbers may stand for numbers. Text and numbers out of
    bounds are left to `value_problems`, which says what is allowed.
    """
    for name, hint in _hints(declared).items():
        value, limits = getattr(values, name), limits_of(declared)[name]
        one_number = any(
            part in (int, float) for part in (hint, *get_args(hint)) if get_origin(hint) is not dict
        )
        bounded = limits.bound is not None and is_number(value) and one_number
        if bounded or (isinstance(value, str) and (limits.choices or limits.bound)):
            continue
        if name in _ENTRIES_HAVE_RULES and isinstance(value, Mapping):
            value = {key: entry for key, entry in value.items() if not isinstance(entry, str)}
        if not fits(value, hint):
            yield name, f"{shown(value)} is not {in_words(hint)}."


@lru_cache
def _hints(declared: type) -> dict[str, Any]:
    hints = get_type_hints(declared)
    return {f.name: hints[f.name] for f in fields(declared)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, entries of collections and mappings included."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is dict or hint is dict:
        key, entry = inner or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, entry) for k, v in value.items())
    if origin in (list, tuple):
        kinds = (
            inner if origin is tuple else (inner[0],) * len(value) if isinstance(value, Collection) else ()
        )
        plain = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
        return (
            plain and len(value) == len(kinds) and all(fits(v, k) for v, k in zip(value, kinds, strict=True))
        )
    return _is(value, hint)


def _is(value: Any, hint: Any) -> bool:
    """`fits` for what has no parts."""
    if hint is Any:
        return True
    if hint is float:
        return is_number(value)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, (hint, str))
    return isinstance(value, hint)


def in_words(hint: Any) -> str:
    """An annotated type for people: `a whole number, a list (a whole number each) or null`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        parts = list(dict.fromkeys(in_words(one) for one in inner))
        return " or ".join([*([", ".join(parts[:-1])] if parts[1:] else []), parts[-1]])
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is dict and inner[1] is not Any:
        return f"a map ({in_words(inner[1])} each)"
    if origin is list:
        return f"a list ({in_words(inner[0])} each)"
    if origin is tuple:
        return f"{len(inner)} of {in_words(inner[0])}"
    named = {**_WORDS, dict: "a map"}.get(origin or hint)
    return str(named or getattr(hint, "__name__", hint))


def shown(value: Any) -> str:
    """A value for an error: its beginning."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
