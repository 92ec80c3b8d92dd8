"""A declared field: its default, what it means, and beside which others it acts. Checks, docstrings and tables follow.

A declaration is a plain dataclass whose annotations are exact (`PositiveInt`, `Literal[...]`). Recipes are checked against
the annotations by pydantic; `value_problems` and `idle_problems` say the same of objects made in Python.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, field, fields
from functools import lru_cache
from numbers import Real
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from molora.config.section import Bound
from molora.config.suggest import did_you_mean

T = TypeVar("T")


def setting(
    default: object,
    doc: str = "",
    *,
    acts_with: Mapping[str, Sequence[str]] | None = None,
    later: bool = False,
    was: Sequence[object] = (),
) -> Any:
    """A dataclass field that says what it is.

    Args:
        default: its default; `dict` or `list` for an empty one that is made anew each time.
        doc: what it means, one or a few lines.
        acts_with: other fields, and their values (none listed: any but None) beside one of which this field acts.
        later: adapters were written before there was such a field, so that files have it only where it is set.
        was: its defaults in earlier versions, which files hold also where it does not act.
    """
    metadata = {"doc": doc, "acts_with": dict(acts_with or {}), "later": later, "was": [*was]}
    if default is dict or default is list:
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def documented(declared: type[T]) -> type[T]:
    """Add the fields' meaning to a declaration's docstring."""
    lines = [f"    {f.name}: {meaning(f)}" for f in fields(declared) if "doc" in f.metadata]  # type: ignore[arg-type]
    about, raises, errors = inspect.cleandoc(declared.__doc__ or "").partition("Raises:")
    declared.__doc__ = "\n".join([about.rstrip(), "", "Args:", *lines, "", raises + errors]).rstrip()
    return declared


def settings_table(declared: type) -> str:
    """Every field with its default and meaning, as a Markdown table."""
    rows = ["| setting | default | means |", "| --- | --- | --- |"]
    for f in fields(declared):
        means = meaning(f).replace("|", "\\|")
        rows.append(f"| `{f.name}` | {_shown(default_of(f))} | {means} |")
    return "\n".join(rows)


def meaning(declared: Field[Any]) -> str:
    """What a field made by `setting` is, and beside what it acts."""
    doc = declared.metadata["doc"]
    return f"{doc} Acts only with {where(declared)}." if declared.metadata["acts_with"] else doc


def _shown(value: object) -> str:
    if value is None or value == {} or value == []:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def default_of(declared: Field[Any]) -> Any:
    """A field's default, made anew where it is made."""
    return declared.default_factory() if declared.default_factory is not MISSING else declared.default


def values_of(declared: Any) -> dict[str, Any]:
    """The fields of a declaration as they are, not copied."""
    return {f.name: getattr(declared, f.name) for f in fields(declared)}


def written(declared: Any) -> dict[str, Any]:
    """The fields of a declaration as a file has them: those that came later only where they are set."""
    kept = values_of(declared)
    for f in fields(declared):
        if f.metadata.get("later") and kept[f.name] == default_of(f):
            del kept[f.name]
    return deepcopy(kept)


def where(declared: Field[Any]) -> str:
    """Beside what a field acts, in words."""
    beside = declared.metadata["acts_with"].items()
    return " or ".join(f"{name}: {listed(values)}" if values else name for name, values in beside)


def acts(declared: Field[Any], values: Mapping[str, Any]) -> bool:
    """Whether a field acts beside these values of the others."""
    beside = declared.metadata["acts_with"]
    return not beside or any(
        values[name] in allowed if allowed else values[name] is not None for name, allowed in beside.items()
    )


def idle_problems(declared: Any) -> Iterator[tuple[str, str]]:
    """Name and message of the fields that were set and do not act."""
    values = values_of(declared)
    for f in fields(declared):
        if values[f.name] not in (default_of(f), *f.metadata["was"]) and not acts(f, values):
            yield f.name, f"acts only with {where(f)}."


def value_problems(values: object, declared: type) -> Iterator[tuple[str, str]]:
    """Name and message of the fields whose annotations do not allow their values: names of a choice, and numbers."""
    for name, (choices, bound, several) in limits_of(declared).items():
        value = getattr(values, name)
        if isinstance(value, str):
            if choices and value not in choices:
                either = "a number or one" if bound else "one"
                yield (
                    name,
                    f"{value!r} is not {either} of {', '.join(choices)}.{did_you_mean(value, choices)}",
                )
            elif bound and not choices:
                yield name, f"must be a number, not {value!r}."
        elif value is not None and bound is not None:
            if isinstance(value, (list, dict)) and not several:
                yield name, f"must be one number, not {value!r}."
                continue
            wrong = [n for n in numbers_of(value) if not (is_number(n) and bound.holds(n))]
            if bound.whole and several and (wrong or value == []):
                yield (
                    name,
                    f"{bound.words}, everywhere: a number, a list by block, or a map of name patterns.",
                )
            elif wrong:
                infinite = isinstance(wrong[0], float) and not math.isfinite(wrong[0])
                words = f"{bound.words}." if is_number(wrong[0]) else f"must be a number, not {wrong[0]!r}."
                yield name, "must be a finite number." if infinite else words


def is_number(value: object) -> bool:
    """Whether a value is a number, of numpy too; true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


class Limits(NamedTuple):
    """What an annotation allows: names, numbers, and whether several of them in a list or map."""

    choices: tuple[str, ...]
    bound: Bound | None
    several: bool


@lru_cache
def limits_of(declared: type) -> dict[str, Limits]:
    """The limits of each field of a declaration, from its annotations."""
    hints = get_type_hints(declared, include_extras=True)
    return {f.name: _limits([*_parts(hints[f.name])]) for f in fields(declared)}


def _limits(parts: list[Any]) -> Limits:
    choices = tuple(name for part in parts if get_origin(part) is Literal for name in get_args(part))
    extras = [extra for part in parts if get_origin(part) is Annotated for extra in get_args(part)]
    bound = next((extra for extra in extras if isinstance(extra, Bound)), None)
    return Limits(choices, bound, any(get_origin(part) in (list, dict) for part in parts))


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    if get_origin(annotation) not in (Annotated, Literal):
        for part in get_args(annotation):
            yield from _parts(part)


def numbers_of(value: Any) -> list[Any]:
    """The numbers in a setting that is one, a list by block, or `{pattern: number}`."""
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else [value]


def listed(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join([*([", ".join(names[:-1])] if names[1:] else []), names[-1]])
