"""Cells of a grid of runs: one JSON each, made once, by whichever process comes first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molora.assets import FIRST, TINY

Found = dict[str, Any]

FIRST_BASE = {"model": TINY, "revision": FIRST}
"""What figures made before there was a second version stand on: cells of two bases do not compare."""
OF_FIRST_BASE = f"base.revision={FIRST_BASE['revision']}"
"""The same, for recipes on `molora/tiny`."""


def load_cells(folder: Path) -> list[Found]:
    """All finished cells."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def claimed(folder: Path, name: str) -> bool:
    """Whether another living process works on the cell."""
    try:
        os.kill(int(_claim(folder, name).read_text(encoding="utf-8")), 0)
    except (OSError, ValueError):
        return False
    return True


def make_cell(folder: Path, name: str, make: Callable[[], Found]) -> Found:
    """Claim a cell, make it, and write it whole or not at all."""
    claim = _claim(folder, name)
    claim.write_text(str(os.getpid()), encoding="utf-8")
    try:
        found = make()
        partial = claim.with_suffix(".part")
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(claim.with_suffix(".json"))
    finally:
        claim.unlink(missing_ok=True)
    return found


def write_page(folder: Path, page: Callable[[Sequence[Found]], str]) -> None:
    """Write and print the page of the cells there are, beside their folder.

    Raises:
        SystemExit: there are none.
    """
    cells = load_cells(folder)
    if not cells:
        raise SystemExit(f"there are no cells in {folder}")
    text = page(cells)
    folder.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def _claim(folder: Path, name: str) -> Path:
    # Not with_suffix: a cell's name may have a dot.
    return folder / f"{name}.claim"
