"""Strict JSON lines and CSV: every fault names its file and line."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molora.data.records import MAX_LINE, read_csv, read_jsonl, where_of
from molora.errors import DataError

GOOD = b'{"a": 1}\n'

BAD_JSONL = {
    "cut off in a string": (GOOD + b'{"a": "wor', 2, "cut off"),
    "cut off after a value": (GOOD + b'{"a": 1', 2, "cut off"),
    "cut off with a line end": (GOOD + b'{"a": 1\n', 2, "cut off"),
    "blank line inside": (GOOD + b"\n" + GOOD, 2, "blank"),
    "spaces only inside": (GOOD * 2 + b"  \t\r\n" + GOOD, 3, "blank"),
    "array": (GOOD + b"[1]\n", 2, "an array"),
    "text": (b'"a"\n', 1, "a string"),
    "null": (b"null\n", 1, "null"),
    "number": (b"1\n", 1, "bare value"),
    "two values": (b'{"a": 1} {"a": 2}\n', 1, "not valid JSON"),
    "single quotes": (b"{'a': 1}\n", 1, "not valid JSON"),
    "raw tab in a string": (b'{"a": "x\ty"}\n', 1, "not valid JSON"),
    "key twice": (GOOD + b'{"a": 1, "a": 2}\n', 2, "'a' is written twice"),
    "key twice inside": (b'{"a": {"b": 1, "b": 1}}\n', 1, "'b' is written twice"),
    "NaN": (b'{"a": NaN}\n', 1, "NaN"),
    "Infinity": (b'{"a": -Infinity}\n', 1, "Infinity"),
    "endless number": (b'{"a": ' + b"1" * 5000 + b"}\n", 1, "digits"),
    "invalid UTF-8": (GOOD + b'{"a": "\xff"}\n', 2, "byte 8 (0xff) is not UTF-8"),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}\n', 1, "not UTF-8"),
    "lone surrogate escaped": (b'{"a": "\\ud800"}\n', 1, "half a surrogate pair"),
    "lone surrogate in a key": (b'{"\\udc00": 1}\n', 1, "half a surrogate pair"),
    "lone surrogate inside": (b'{"a": [{"b": "\\udc00"}]}\n', 1, "half a surrogate pair"),
    "NUL": (GOOD + b'{"a": "\x00"}\n', 2, "NUL"),
    "NUL escaped": (b'{"a": "\\u0000"}\n', 1, "NUL"),
    "UTF-16": ('{"a": 1}\n'.encode("utf-16"), 1, "UTF-16"),
    "too deep": (b'{"a": ' + b"[" * 200_000, 1, "nested too deeply"),
    "binary": (b"PK\x03\x04\x14\x00", 1, "NUL"),
}


@pytest.mark.parametrize("name", BAD_JSONL)
def test_a_faulty_line_is_named(name, tmp_path):
    content, line, words = BAD_JSONL[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_jsonl(path))
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\n{"a": 2}',
        b'{"a": 1}\r\n{"a": 2}\r\n',
        b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n',
        b'{"a": 1}\n{"a": 2}\n\n \r\n',
    ],
    ids=["plain", "no last line end", "CRLF", "byte order mark", "blank lines at the end"],
)
def test_harmless_differences_are_read(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    records = list(read_jsonl(path))
    assert records == [{"a": 1}, {"a": 2}]
    assert [where_of(record) for record in records] == [f"{path}:1", f"{path}:2"]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(content))
    assert list(read_jsonl(packed)) == records


def test_a_line_over_the_limit_is_refused_without_reading_it_whole(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b'{"a": "' + b"x" * (MAX_LINE + 1)))
    with pytest.raises(DataError, match=r"rows.jsonl.gz:2: the line is longer than 10,000,000 bytes"):
        list(read_jsonl(path))


def test_damaged_gzip_names_the_place(tmp_path):
    whole = gzip.compress(b"".join(json.dumps({"a": i}).encode() + b"\n" for i in range(5000)))
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:100] + b"\0" * 50 + whole[150:]):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows.jsonl.gz:\d+: "):
            list(read_jsonl(path))
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match=r"ends in \.gz but is not gzip data"):
        list(read_jsonl(path))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="there is no folder"):
        list(read_jsonl(tmp_path / "none" / "rows.jsonl"))
    with pytest.raises(DataError, match="source: folder"):
        list(read_jsonl(tmp_path))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(exclude_characters="\0", codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.lists(st.dictionaries(st.text("xyz é"), VALUES, max_size=4), min_size=1, max_size=6)


@given(rows=ROWS, ascii_only=st.booleans(), line_end=st.sampled_from(["\n", "\r\n"]))
def test_what_json_writes_is_read_back(rows, ascii_only, line_end, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=ascii_only) + line_end for row in rows), "utf-8", newline=""
    )
    assert list(read_jsonl(path)) == rows


@given(rows=ROWS, cut=st.data())
def test_a_cut_file_is_read_up_to_the_cut_or_refused(rows, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    content = b"".join(lines)
    path.write_bytes(content[: cut.draw(st.integers(0, len(content) - 1))])
    remaining = path.read_bytes().split(b"\n")
    try:
        assert list(read_jsonl(path)) == rows[: sum(bool(line) for line in remaining)]
    except DataError as error:
        # Only the last line can be at fault, and only when it was cut.
        assert str(error).startswith(f"{path}:{len(remaining)}: ")
        assert remaining[-1] != lines[len(remaining) - 1].rstrip(b"\n")


@given(content=st.binary(max_size=60))
def test_no_bytes_break_the_readers(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(content)
    for read in (read_jsonl, read_csv):
        try:
            for record in read(path):
                json.dumps(record, ensure_ascii=False).encode("utf-8")
        except DataError as error:
            assert str(error).startswith(str(path))


def test_csv_keeps_every_value_as_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufefftext,label\r\n"a, ""b""\r\nc",NA\r\né,007\r\n\r\n'.encode())
    records = list(read_csv(path))
    assert records == [{"text": 'a, "b"\r\nc', "label": "NA"}, {"text": "é", "label": "007"}]
    assert [where_of(record) for record in records] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"a,b\n1\n", 2, "1 values, but the header names 2"),
        (b"a,b\n1,2\n1,2,3\n", 3, "3 values"),
        (b"a,a\n1,2\n", 1, "every column once"),
        (b"a,\n1,2\n", 1, "every column once"),
        (b'a,b\n1,2\n1,"open\n', 3, "not valid CSV"),
        (b"a,b\n1,2\n\n3,4\n", 3, "blank"),
        (b"a,b\n1,\xe9\n", 2, "not UTF-8"),
    ],
)
def test_a_faulty_csv_row_is_named(content, line, words, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_csv(path))
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert words in str(error.value)
