"""Regular expressions on module names: whether one compiles, and whether matching it ends in reasonable time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from re import _constants as op  # type: ignore[attr-defined]  # private: only here does Python say what a pattern is made of
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

LONGEST = 1_000  # characters
MOST_IN_A_ROW = 3
MOST = 8
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)
_TOO_SLOW = "could take for ever to match:"


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a regular expression from a recipe or an adapter; None if nothing is.

    Python's engine tries every way to divide a text among repeats, and cannot be stopped. So a repeat of
    something that repeats or has alternatives itself (`(a+)+`, `(a|ab)*`: time doubles with each character) is refused, as
    are more than `MOST_IN_A_ROW` open repeats side by side (`.*.*.*.*`) and more than `MOST` in all.
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
    if max(_rows(parts), default=0) > MOST_IN_A_ROW:
        return f"{pattern!r} {_TOO_SLOW} more than {MOST_IN_A_ROW} repeats, such as .*, stand side by side."
    if sum(_is_open(kind, value) for kind, value in _walk(parts)) > MOST:
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


def _rows(parts: Any) -> Iterator[int]:
    """The lengths of runs of open repeats side by side; groups around them do not part them, what must match does."""
    run = 0
    for kind, value in _flat(parts):
        run = run + 1 if _is_open(kind, value) else 0
        yield run
    for kind, value in _walk(parts):
        if kind is op.BRANCH:
            for child in value[1]:
                yield from _rows(child)


def _flat(parts: Any) -> Iterator[tuple[Any, Any]]:
    for kind, value in parts:
        if kind is op.SUBPATTERN:
            yield from _flat(value[3])
        elif kind is not op.AT:
            yield kind, value
