"""The one rule for names: nothing that is a path, a module separator or unprintable gets through."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.config.names import check_name
from molora.errors import ConfigError

GOOD = [
    "a",
    "law",
    "expert_0",
    "Größe",
    "日本語",
    "a b",
    "v1.2",
    "no",
    "012",
    "_x",
    "x" * 64,
    "con_1",
    "a-b.c d",
    "é",
]
BAD = {
    "": "is empty",
    "x" * 65: "has 65 characters",
    "..": "contains '.', which is not allowed first",
    ".hidden": "not allowed first",
    "-flag": "not allowed first",
    " lead": "not allowed first",
    "a/b": "contains '/'",
    "a\\b": r"contains '\\'",
    "../../etc": "not allowed",
    "a..b": "contains '..'",
    "a.": "ends with a dot or a space",
    "a ": "ends with a dot or a space",
    "a\n": "not allowed",
    "a\nb": r"contains '\n'",
    "a\0b": r"contains '\x00'",
    "a\tb": r"contains '\t'",
    "a:b": "contains ':'",
    "a*": "contains '*'",
    "a\u202eb": r"contains '\u202e'",
    "a\u200bb": r"contains '\u200b'",
    "\U0001f600": "not allowed first",
    "{x}": "not allowed first",
    "CON": "is reserved by Windows",
    "con.txt": "is reserved by Windows",
    "lpt9": "is reserved by Windows",
    "\ud800": "not allowed",
}


@pytest.mark.parametrize("name", GOOD)
def test_good_names(name: str) -> None:
    assert check_name(name) == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_name(name, "expert")
    assert BAD[name] in str(caught.value)
    assert str(caught.value).startswith("expert name ")
    assert str(caught.value).isascii()  # safe to print anywhere
    assert "hint: a name is 1 to 64 letters" in str(caught.value)


@pytest.mark.parametrize("name", [None, 7, True, 1.5, ["a"], b"a"])
def test_names_are_text(name: object) -> None:
    with pytest.raises(ConfigError, match="must be text"):
        check_name(name)


def test_two_spellings_of_a_letter_are_one_name() -> None:
    assert check_name("e\u0301") == check_name("\u00e9") == "\u00e9"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=70))
def test_an_accepted_name_is_one_harmless_path_part(name: str) -> None:
    try:
        accepted = check_name(name)
    except ConfigError:
        return
    assert Path(accepted).parts == (accepted,)
    assert Path("/runs", accepted).resolve().parent == Path("/runs").resolve()
    assert accepted.isprintable()
    assert check_name(accepted) == accepted
