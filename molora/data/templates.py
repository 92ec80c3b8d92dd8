"""Templates such as `Question: {question}`: plain field names and nothing else, filled from a record."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from molora.config.suggest import did_you_mean
from molora.data.records import where_of
from molora.errors import ConfigError, DataError

_FIELD = re.compile(r"\w[\w -]*")


@lru_cache(maxsize=256)
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """(literal text, field name or None) pieces of a template such as `Question: {question}`; `{{` is a brace.

    Only plain names are fields. Attributes, indices, conversions and formats are refused: a template comes
    with somebody's recipe and must not reach into objects. Raises ConfigError.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"template {template!r}: {error}.", hint="write {{ and }} for braces that are text"
        ) from None
    for _, field, form, conversion in pieces:
        if field is not None and (form or conversion or not _FIELD.fullmatch(field)):
            inside = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ConfigError(
                f"template {template!r}: {{{inside}}} is not a plain field name.",
                hint="a field is {name}; write {{ and }} for braces that are text",
            )
    return tuple((literal, field) for literal, field, _, _ in pieces)


def fill_template(template: str, record: Mapping[str, Any]) -> str:
    """The template with each field's value, which is never read as a template itself. Raises DataError."""
    return "".join(
        literal if field is None else literal + as_text(record, field)
        for literal, field in parse_template(template)
    )


def as_text(record: Mapping[str, Any], field: str) -> str:
    """A field as text: text as it is, numbers and booleans as JSON writes them; anything else is an error."""
    value = field_of(record, field)
    if isinstance(value, str):
        return value
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    kind = "null" if value is None else f"{type(value).__name__}, not text or a number"
    raise DataError(f"{where_of(record)}: the field {field!r} is {kind}.")


def field_of(record: Mapping[str, Any], field: str) -> Any:
    """`record[field]`, or a DataError that says where it is missing and which fields exist."""
    if field not in record:
        raise DataError(
            f"{where_of(record)}: has no field {field!r}.{did_you_mean(field, record)}",
            hint=f"its fields: {', '.join(map(str, record)) or 'none'}",
        )
    return record[field]


def single_field(template: str) -> str:
    """The one field of a template; ConfigError where it has not one."""
    fields = [name for _, name in parse_template(template) if name is not None]
    if len(fields) != 1:
        raise ConfigError(
            f"the target {template!r} has {len(fields)} fields; of `choices`, each takes the place of the one that it has.",
            hint="write the answer's field, as '{answer}'.",
        )
    return fields[0]
