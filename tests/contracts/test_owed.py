"""The table of owed invariants is complete, and every file it names exists and holds tests."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (I\d+) \|.*\| ([^|]+) \|$", (HERE / "OWED.md").read_text(), flags=re.MULTILINE)


def test_every_invariant_has_a_row():
    assert [name for name, _ in ROWS] == [f"I{i}" for i in range(1, 16)]


def test_every_owner_exists():
    for _, owners in ROWS:
        for owner in owners.split(", "):
            path = HERE.parent.parent / owner if owner.startswith("tests/") else HERE / owner
            files = sorted(path.glob("test_*.py")) if path.is_dir() else [path]
            assert files and all("def test_" in file.read_text() for file in files), owner


def test_invariants_named_in_the_table_have_tests_of_that_name():
    text = (HERE / "test_invariants.py").read_text()
    for name, owners in ROWS:
        if "test_invariants.py" in owners:
            assert f"def test_{name}_" in text, name
