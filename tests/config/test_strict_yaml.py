"""The strict YAML reader: which scalars are what, what is refused, and that writing is the inverse of reading."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.config.strict_yaml import MAX_BYTES, MAX_DEPTH, dump, parse
from molora.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.0e-3", 5e-3),
        ("3E+2", 300.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("7", 7),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("012", "012"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("=", "="),
        ("'7'", "7"),
        ('"true"', "true"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    read = parse(f"key: {text}").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse("key: .nan").data["key"])


def test_keys_are_text_whatever_they_look_like() -> None:
    data = parse("no: a\n012: b\n12:30: c\n7: d\ntrue: e\nnull: f\n1.5: g").data
    assert data == {"no": "a", "012": "b", "12:30": "c", "7": "d", "true": "e", "null": "f", "1.5": "g"}


def test_lines_are_those_of_the_keys() -> None:
    document = parse("a:\n  b: 1\n\n  c:\n    - x\n    - y\n")
    assert document.line(("a",)) == 1
    assert document.line(("a", "b")) == 2
    assert document.line(("a", "c", 1)) == 6
    assert document.line(("a", "missing", "deeper")) == 1


def test_duplicate_keys_name_both_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("a:\n  lr: 1\n  other: 2\n  lr: 3\nb: 1\nb: 2\n", "file.yaml")
    assert str(caught.value).splitlines() == [
        "file.yaml:4  a.lr: written twice, first on line 2.",
        "file.yaml:6  b: written twice, first on line 5.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "key: !!python/object/apply:os.system [true]",
        "key: !!python/name:os.system",
        "key: !custom value",
        "key: !!binary aGVsbG8=",
        "key: !!timestamp 2024-01-02",
        "key: !!set {a, b}",
        "!!omap [a: 1]",
        "key: !!int no",
        "key: !!float text",
        "key: 123456789012345678901234567890",
    ],
)
def test_tags_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"text:1  .*is not allowed"):
        parse(text)


def test_keys_must_be_plain_text() -> None:
    with pytest.raises(ConfigError, match="text:1  a key must be plain text"):
        parse("? [a, b]\n: 1")


def test_merge_keys_mean_nothing_special() -> None:
    assert parse("a: &a {x: 1}\nb: {<<: *a}").data["b"] == {"<<": {"x": 1}}


def test_an_alias_repeats_a_value() -> None:
    data = parse("a: &one {x: 1}\nb: *one").data
    assert data == {"a": {"x": 1}, "b": {"x": 1}}
    assert data["a"] is not data["b"]


def test_an_alias_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ConfigError, match=r"stands for more than 50,000 values"):
        parse("\n".join(lines))


def test_an_alias_inside_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"text:1  an alias contains itself"):
        parse("a: &a [*a]")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 5000])
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse("[" * depth + "1" + "]" * depth)


def test_a_large_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"larger than 1,000,000 bytes"):
        parse("a: " + "x" * MAX_BYTES)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2", 1),
        ("a: 1\n\tb: 2", 2),
        ("a: 1\nb: 'open", 2),
        ("a: *missing", 1),
        ("a: 1\n--- \nb: 2", 2),
    ],
)
def test_broken_yaml_names_the_line(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"text:{line}  not valid YAML: ."):
        parse(text)


def test_control_characters_are_refused() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse("a: \x07")


def test_an_empty_text_is_no_data() -> None:
    assert parse("# only a comment\n").data is None


_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=20)
_SCALAR = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | _TEXT
_VALUE = st.recursive(_SCALAR, lambda v: st.lists(v, max_size=3) | st.dictionaries(_TEXT, v, max_size=3))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_TEXT, _VALUE, max_size=4))
def test_what_is_written_is_read_back_the_same(data: dict[str, Any]) -> None:
    read = parse(dump(data)).data
    assert read == data
    assert repr(read) == repr(data)  # 1 and True and 1.0 are told apart
