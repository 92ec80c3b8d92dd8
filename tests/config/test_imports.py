"""Recipes are checked without torch: a refusal takes a moment, not the seconds an import of torch takes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.config.recipes import RECIPES

HEAVY = ("torch", "peft", "transformers", "lightning", "datasets", "numpy")


@pytest.mark.parametrize(
    "statements",
    [
        "import molora",
        "import molora.config.names, molora.config.choices, molora.config.suggest, molora.errors",
        f"from molora.config import load_recipe; load_recipe({str(RECIPES / 'quickstart.yaml')!r})",
        f"from molora.config import load_grow; load_grow({str(RECIPES / 'add_expert.yaml')!r})",
    ],
)
def test_no_heavy_import(statements: str) -> None:
    check = f"{statements}; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
