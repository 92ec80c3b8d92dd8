"""Overrides from the command line: `train.lr=3e-4` changes one value of a recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from molora.config.strict_yaml import Path, parse
from molora.errors import ConfigError

# Wherever it stands, a section of this name that is written as plain text is short for this key of it.
SHORTHANDS = {"base": "model", **dict.fromkeys(("gate", "router", "strategy", "objective"), "kind")}


def apply(data: Any, overrides: Sequence[str]) -> tuple[Any, dict[Path, str]]:
    """A changed copy of `data`, and which override each changed path came from.

    Raises ConfigError, listing every override that is not of the form `a.b=value`. Whether a path exists in
    the schema is checked with the rest of the recipe.
    """
    data = copy.deepcopy(data) if data is not None else {}
    origins: dict[Path, str] = {}
    problems: list[str] = []
    for text in overrides:
        dotted, equals, value = text.partition("=")
        if not equals or not dotted.strip(".") or ".." in dotted:
            problems.append(f"override {text!r}: write it as section.key=value, such as train.lr=3e-4.")
            continue
        try:
            origins[_set(data, dotted.strip(), parse(value, f"override {text!r}").data)] = text
        except ConfigError as error:
            problems.append(error.message)
    if problems:
        raise ConfigError("\n".join(problems))
    return data, origins


def _set(data: Any, dotted: str, value: Any) -> Path:
    path: list[str | int] = []
    here, rest = data, dotted
    while True:
        key, rest = _next_key(here, rest)
        path.append(key)
        if not rest:
            here[key] = value
            return tuple(path)
        here = _child(here, key, tuple(path))


def _next_key(here: Any, rest: str) -> tuple[str | int, str]:
    """Split off the next key; names may contain dots, so the longest key that is there wins."""
    if isinstance(here, list):
        key, _, rest = rest.partition(".")
        if not key.isdecimal() or int(key) >= len(here):
            raise ConfigError(f"override {key!r}: the list has items 0 to {len(here) - 1}.")
        return int(key), rest
    known = [key for key in here if rest == key or rest.startswith(f"{key}.")]
    if known:
        key = max(known, key=len)
        return key, rest[len(key) + 1 :]
    key, _, rest = rest.partition(".")
    return key, rest


def _child(here: Any, key: Any, path: Path) -> Any:
    child = here.get(key) if isinstance(here, dict) else here[key]
    if child is None:
        child = {}
    elif isinstance(child, str) and key in SHORTHANDS:
        child = {SHORTHANDS[key]: child}
    elif isinstance(child, (int, float)) and path[-2:-1] == ("aux_losses",):
        child = {"coefficient": child}
    elif not isinstance(child, (dict, list)):
        dotted = ".".join(map(str, path))
        raise ConfigError(f"override: {dotted} is {child!r}, which has no settings of its own.")
    here[key] = child
    return child
