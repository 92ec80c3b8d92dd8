"""Regular expressions on module names: whether one compiles, and whether matching it ends in reasonable time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from re import _constants as op  # type: ignore[attr-defined]  # private: only here does Python say what a pattern is made of
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 1_000  # characters
MOST_IN_A_ROW = 3
MOST = 5
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)
_WIDE = (op.ANY, op.IN, op.CATEGORY, op.NOT_LITERAL)
_TOO_SLOW = "could take for ever to match:"


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a regular expression from a recipe or an adapter; None if nothing is.

    Python's engine tries every way to divide a text among repeats, and cannot be stopped. So a repeat of
    something that repeats or has alternatives itself (`(a+)+`, `(a|ab)*`: time doubles with each character) is refused, as
    are more than `MOST_IN_A_ROW` choices with no literal between them (`.*.*.*.*`) and more than `MOST` on one way
    through the pattern. A choice is a repeat of more than a literal, or alternatives with a wildcard in them.
    """
    if len(pattern) > LONGEST:
        return f"has {len(pattern):,} characters; at most {LONGEST:,} are allowed."
    try:
        re.compile(pattern)
        parts = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{pattern!r} is no regular expression: {error}."
    for body in _repeated(parts):
        if any(kind is op.BRANCH or _is_open(kind, value) for kind, value in _walk(body)):
            return f"{pattern!r} {_TOO_SLOW} it repeats something that repeats or has alternatives itself."
    total, row, _ = _choices(parts)
    if row > MOST_IN_A_ROW:
        return f"{pattern!r} {_TOO_SLOW} more than {MOST_IN_A_ROW} repeats, such as .*, stand side by side."
    if total > MOST:
        return f"{pattern!r} {_TOO_SLOW} it has more than {MOST} repeats, such as .*"
    return None


def _is_open(kind: Any, value: Any) -> bool:
    """Whether a part may match texts of several lengths by repeating; `x?` counts, `x{3}` does not."""
    return kind in _REPEATS and value[0] != value[1]


def _children(value: Any) -> Iterator[Any]:
    """The sequences of parts inside a part's value."""
    if isinstance(value, parser.SubPattern):
        yield value
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _children(inner)


def _walk(parts: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for kind, value in parts:
        yield kind, value
        for child in _children(value):
            yield from _walk(child)


def _repeated(parts: Any) -> Iterator[Any]:
    """What is repeated more than once, whatever depth it stands at."""
    return (value[2] for kind, value in _walk(parts) if kind in _REPEATS and value[1] > 1)


def _is_wide(parts: Any) -> bool:
    return any(kind in _WIDE for kind, _ in _walk(parts))


def _choices(parts: Any, before: int = 0) -> tuple[int, int, int]:
    """The choices on the way through `parts` that has most, the longest row of them, and the row that is open at the end.

    `before`: choices side by side that lead up to here.
    """
    total, longest, row = 0, before, before
    for kind, value in parts:
        if kind in (op.LITERAL, op.IN):
            row = 0 if kind is op.LITERAL else row
            continue
        if kind is op.AT or kind in _WIDE:
            continue
        own = _is_open(kind, value) and (value[1] > 1 or _is_wide(value[2]))
        own = own or (kind is op.BRANCH and any(map(_is_wide, value[1])))
        inside = [_choices(child, row) for child in _children(value)] or [(0, row, row)]
        total += max(found[0] for found in inside) + own
        row = max(found[2] for found in inside) + own
        longest = max(longest, row, *(found[1] for found in inside))
    return total, longest, row
