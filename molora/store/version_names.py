"""Names in a library: `medical_diagnosis` is an adapter, `medical_diagnosis_v2_20250315` one version, `stable` an alias.

`medical_diagnosis@stable`, `@v2` and `@latest` mean a version too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from molora.errors import ConfigError

LATEST = "latest"
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_NUMBER = re.compile(r"v[1-9][0-9]{0,5}")
_LABEL = re.compile(r"(?P<name>.+)_v(?P<number>[1-9][0-9]{0,5})_(?P<date>[0-9]{8})")
_MOST = 64


@dataclass(frozen=True, order=True)
class Label:
    """The name of one version: `<name>_v<number>_<date>`, the date as YYYYMMDD."""

    name: str
    number: int
    date: str

    def __str__(self) -> str:
        return f"{self.name}_v{self.number}_{self.date}"


def read_label(text: str) -> Label | None:
    """The label that a text is, or None where it is none."""
    found = _LABEL.fullmatch(text)
    if found is None or not _NAME.fullmatch(found["name"]):
        return None
    return Label(found["name"], int(found["number"]), found["date"])


def check_adapter_name(name: str) -> str:
    """An adapter's name, or a ConfigError that says what is wrong with it."""
    example = "such as medical_diagnosis; the library adds version and date: medical_diagnosis_v1_20250315"
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for an adapter: lower-case words of letters and digits, joined by '_', starting with a "
            "letter.",
            hint=example,
        )
    if len(name) > _MOST:
        raise ConfigError(f"{name!r} has {len(name)} characters; at most {_MOST}.", hint=example)
    if _NUMBER.fullmatch(name.rpartition("_")[2]) or read_label(name) is not None:
        raise ConfigError(f"{name!r} ends like a version.", hint=example)
    return name


def check_alias(alias: str) -> str:
    """An alias, or a ConfigError that says what is wrong with it."""
    if not _ALIAS.fullmatch(alias) or _NUMBER.fullmatch(alias) or alias == LATEST:
        raise ConfigError(
            f"{alias!r} is no alias: at most 32 lower-case letters, digits, '_' and '-', starting with a letter; not "
            f"{LATEST} and not v1, v2, ..., which always mean the same.",
            hint="such as stable or canary",
        )
    return alias


def is_number(text: str) -> bool:
    """Whether a text is v1, v2, ..."""
    return _NUMBER.fullmatch(text) is not None


def is_reference(text: str) -> bool:
    """Whether a text may mean a version: a label, or `name@which`."""
    name, at, which = text.partition("@")
    return read_label(text) is not None or bool(at and which and _NAME.fullmatch(name) and "/" not in which)
