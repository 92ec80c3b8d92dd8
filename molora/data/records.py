"""Records, and the strict reading of text files of them: JSON lines and CSV, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from molora.errors import DataError

MAX_LINE = 10_000_000  # bytes; a longer line means that the file does not hold one record per line
MAX_TEXT = 8_000_000_000  # bytes of one file, unpacked: records of text files are kept in memory
# Text of any language shrinks to a tenth, tables of repeated values to a fiftieth.
MAX_PACKED, _JUDGED_FROM = 200, 64_000_000

_BYTE_ORDER_MARKS = ((b"\xff\xfe", "UTF-16 or UTF-32"), (b"\xfe\xff", "UTF-16"), (b"\0\0\xfe\xff", "UTF-32"))
_UTF8_MARK = b"\xef\xbb\xbf"
_GZIP_MAGIC = b"\x1f\x8b"


class Record(dict[str, Any]):
    """One row: its fields by name, and `where` it was read, as `file:line` or `data set row n`."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        super().__init__(fields)
        self.where = where


def where_of(record: Mapping[str, Any]) -> str:
    """Where a record was read; a plain dict does not say."""
    return record.where if isinstance(record, Record) else "a record given in Python"


OnError = Callable[[DataError], None]
"""What becomes of a record that is faulty by itself: raising ends the reading, returning goes on with the next one."""


def stop(error: DataError) -> NoReturn:
    """The way to read that trusts nothing after a fault."""
    raise error


def read_lines(path: Path, on_error: OnError = stop) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of a UTF-8 file with their line ends; a UTF-8 byte order mark is dropped.

    Raises DataError, starting with `file:line`, where the file is missing, not UTF-8, has a NUL character or a line
    over `MAX_LINE` bytes, its gzip data is damaged or unpacks to more than `MAX_PACKED` times its size, or it is
    larger than `MAX_TEXT`.
    """
    number = read = 0
    try:
        with _open(path) as file:
            limit = _most_text(path)
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if (read := read + len(line)) > limit:
                    raise _too_much(path, number, limit)
                try:
                    text = _decode(line, path, number)
                except DataError as error:
                    if len(line) > MAX_LINE:  # the rest of it would be read as another line
                        raise
                    on_error(error)
                    continue
                yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}:{number + 1}: the gzip data is damaged or cut off ({error}).", hint="copy the file again"
        ) from None
    except OSError as error:
        hint = None if path.parent.is_dir() else f"there is no folder {path.parent}"
        if path.is_dir():
            hint = "it is a folder: name a file in it, or use source: folder"
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.", hint=hint) from None


def _most_text(path: Path) -> int:
    return min(MAX_TEXT, max(_JUDGED_FROM, MAX_PACKED * path.stat().st_size))


def _too_much(path: Path, number: int, limit: int) -> DataError:
    if limit == MAX_TEXT:
        hint = "use source: parquet or folder, whose records stay on disk"
        return DataError(f"{path}:{number}: more than {MAX_TEXT:,} bytes of text.", hint=hint)
    text = f"{path}:{number}: {path.stat().st_size:,} bytes of gzip data unpack to more than {limit:,}."
    return DataError(text, hint="unpack the file, if it is what you think it is")


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file() and not path.is_dir():  # reading might wait for ever
        raise DataError(f"{path}: is a pipe or a device, not a file.", hint="write its content to a file")
    with path.open("rb") as file:
        start = file.read(4)
    if path.suffix == ".gz" and start and not start.startswith(_GZIP_MAGIC):
        raise DataError(f"{path}: ends in .gz but is not gzip data.")
    for mark, encoding in _BYTE_ORDER_MARKS:
        if start.startswith(mark):
            raise DataError(f"{path}:1: is {encoding} text, not UTF-8.", hint="save the file as UTF-8")
    return cast(BinaryIO, gzip.open(path)) if start.startswith(_GZIP_MAGIC) else path.open("rb")


def _decode(line: bytes, path: Path, number: int) -> str:
    place = f"{path}:{number}"
    if len(line) > MAX_LINE:
        raise DataError(
            f"{place}: the line is longer than {MAX_LINE:,} bytes.", hint="write one record per line"
        )
    if number == 1:
        line = line.removeprefix(_UTF8_MARK)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = " ".join(f"{byte:#04x}" for byte in line[error.start : error.end])
        raise DataError(
            f"{place}: byte {error.start + 1} ({bad}) is not UTF-8.", hint="save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise DataError(f"{place}: character {text.index(chr(0)) + 1} is NUL, which no text contains.")
    return text


def read_jsonl(path: str | Path, on_error: OnError = stop) -> Iterator[Record]:
    """The records of a JSON lines file: one object per line, blank lines only at the end.

    Raises DataError as `read_lines`, and for anything that is not strict JSON: other values than objects, a key written
    twice, NaN or Infinity, lone surrogates, a line that is cut off.
    """
    path = Path(path)
    blank = 0
    for number, line in read_lines(path, on_error):
        if not line.strip():
            blank = blank or number
            continue
        place = f"{path}:{number}"
        try:
            _no_blank(path, blank)
        except DataError as error:
            on_error(error)
            blank = 0
        try:
            fields = _parse_object(line, place)
        except DataError as error:
            on_error(error)
            continue
        yield Record(fields, place)


def _no_blank(path: Path, blank: int) -> None:
    if blank:
        raise DataError(f"{path}:{blank}: the line is blank.", hint="blank lines are allowed at the end only")


def _parse_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        # An object that ends too early leaves an error at or behind its last character.
        cut = not line.endswith("\n") or error.pos >= len(line.rstrip())
        what = "the record is cut off" if cut else "not valid JSON"
        raise DataError(
            f"{place}: {what}: {error.msg} at character {error.pos + 1}.",
            hint="write one JSON object per line",
        ) from None
    except RecursionError:
        raise DataError(f"{place}: the record is nested too deeply.") from None
    except ValueError as error:
        # Ours, or Python's own limit on the digits of one integer, which adds advice after a semicolon.
        raise DataError(f"{place}: {str(error).split(';')[0]}") from None
    if not isinstance(value, dict):
        kinds = {"list": "an array", "str": "a string", "NoneType": "null"}
        kind = kinds.get(type(value).__name__, "a bare value")
        raise DataError(f"{place}: a record must be a JSON object, this is {kind}.")
    if "\\u" in line:
        _check_escapes(value, place)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {twice!r} is written twice.")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number.")


def _check_escapes(value: dict[str, Any], place: str) -> None:
    r"""Refuse what `\u` escapes can smuggle into text: half a character, or NUL."""
    for text in _texts(value):
        bad = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if bad is not None:
            what = "NUL" if bad == "\0" else "half a surrogate pair"
            raise DataError(f"{place}: the escape \\u{ord(bad):04x} is {what}, not a character.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def read_csv(path: str | Path, on_error: OnError = stop) -> Iterator[Record]:
    """The records of a comma-separated file with a header line; every value stays text, exactly as written.

    Raises DataError as `read_lines`, and for a header with an empty or repeated name, a row with more or fewer values
    than the header, or quotes that do not close.
    """
    path = Path(path)
    # The module's own limit is 131,072 characters for one value.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    rows = csv.reader((line for _, line in read_lines(path)), strict=True)
    header: list[str] | None = None
    blank = 0
    while True:
        first = rows.line_num + 1  # a quoted value may span several lines
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}:{first}: not valid CSV: {error}.") from None
        place = f"{path}:{first}"
        if header is None:
            header = row
            other = next((sign for sign in ";\t|" if len(row) == 1 and sign in row[0]), None)
            if other is not None:
                named = {";": "semicolons", "\t": "tabs", "|": "bars"}[other]
                raise DataError(
                    f"{place}: values are separated by {named}.", hint="save the file with commas"
                )
            if len(set(row)) < len(row) or "" in row or not row:
                named = ", ".join(row) or "nothing"
                raise DataError(f"{place}: the header must name every column once, it reads {named!r}.")
        elif not row:
            blank = blank or first
        else:
            try:
                _no_blank(path, blank)
            except DataError as error:
                on_error(error)
                blank = 0
            if len(row) != len(header):
                text = f"{place}: {len(row)} values, but the header names {len(header)} columns."
                on_error(DataError(text, hint="put values that contain a comma in double quotes"))
                continue
            yield Record(dict(zip(header, row, strict=True)), place)


READERS: dict[str, Callable[..., Iterator[Record]]] = {"jsonl": read_jsonl, "csv": read_csv}
