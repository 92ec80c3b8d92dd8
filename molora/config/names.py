"""The one rule for names of tasks, experts, adapters and runs: they become folder names and module names."""

from __future__ import annotations

import re
import unicodedata

from molora.errors import ConfigError

_NAME = re.compile(r"[\w][\w .-]{0,63}")
_WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
_RULE = "1 to 64 letters, digits, '_', '-', '.' or spaces, starting with a letter, a digit or '_'"


def check_name(name: object, what: str = "task") -> str:
    """Return `name` in Unicode normal form C, or raise ConfigError saying which part of the rule it breaks."""
    if not isinstance(name, str):
        raise ConfigError(f"{what} name must be text, got {name!r}.", hint="put it in quotes")
    text = unicodedata.normalize("NFC", name)
    problem = _problem(text)
    if problem:
        shown = ascii(text if len(text) <= 80 else text[:80] + "...")
        raise ConfigError(f"{what} name {shown} {problem}.", hint=f"a name is {_RULE}")
    return text


def _problem(text: str) -> str | None:
    if not text:
        return "is empty"
    if len(text) > 64:
        return f"has {len(text)} characters, at most 64 are allowed"
    if not _NAME.fullmatch(text) or not text.isprintable():
        bad = next((c for c in text if not re.fullmatch(r"[\w .-]", c) or not c.isprintable()), text[0])
        return f"contains {bad!a}, which is not allowed {'first' if bad == text[0] else 'in a name'}"
    if ".." in text or text[-1] in ". ":
        return "contains '..'" if ".." in text else "ends with a dot or a space"
    if text.split(".")[0].strip().casefold() in _WINDOWS:
        return "is reserved by Windows"
    return None
