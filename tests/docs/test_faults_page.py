"""docs/faults.md names tests that exist, one at least for every promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_names_tests_that_exist() -> None:
    rows = re.findall(
        r"^\| (\d+) \|.*\|(.*)\|$", (ROOT / "docs" / "faults.md").read_text(), flags=re.MULTILINE
    )
    assert [int(number) for number, _ in rows] == [*range(1, 36)]
    for number, cell in rows:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", cell)
        assert named, number
        for file, test in named:
            defined = {
                node.name
                for node in ast.walk(ast.parse((ROOT / file).read_text()))
                if isinstance(node, ast.FunctionDef)
            }
            assert test in defined, f"{file} has no {test}"
