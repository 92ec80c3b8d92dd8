"""Nearest-name suggestions for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """A sentence to append to an error, with a leading space; empty when nothing is close."""
    names = {option.casefold(): option for option in allowed}
    found = difflib.get_close_matches(str(name).casefold(), names, n=1)
    return f" Did you mean {names[found[0]]!r}?" if found else ""


def options(name: object, allowed: Collection[str], label: str = "Allowed") -> str:
    """What to append to an error about an unknown name: the nearest one, then all of them."""
    return f"{did_you_mean(name, allowed)} {label}: {', '.join(allowed) or 'none'}."


def not_one_of(name: object, allowed: Collection[str]) -> str:
    """What to say of a name that is not among those allowed."""
    return f"{name!r} is not one of {', '.join(allowed)}.{did_you_mean(name, allowed)}"
