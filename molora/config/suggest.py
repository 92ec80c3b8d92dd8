"""Nearest-name suggestions for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name most like `name`, or None when nothing is close."""
    options = {option.casefold(): option for option in allowed}
    found = difflib.get_close_matches(str(name).casefold(), options, n=1, cutoff=0.6)
    return options[found[0]] if found else None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A sentence to append to an error, with a leading space; empty when nothing is close."""
    option = nearest(name, allowed)
    return "" if option is None else f" Did you mean {option!r}?"
