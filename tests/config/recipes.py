"""A small valid recipe, as YAML text and as a mapping, and what a faulty one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molora.config import load_recipe
from molora.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "recipes"

SMALL = """\
name: small
base: molora/tiny
adapter:
  num_experts: 4
  gate: {kind: top_k, top_k: 2}
data:
  tasks:
    copy: {source: synthetic, generator: copy}
train:
  max_steps: 10
"""


def small(**sections: Any) -> dict[str, Any]:
    """The small recipe as a mapping, with `sections` in place of its own."""
    return {
        "name": "small",
        "base": "molora/tiny",
        "adapter": {"num_experts": 4, "gate": {"kind": "top_k", "top_k": 2}},
        "data": {"tasks": {"copy": {"source": "synthetic", "generator": "copy"}}},
        "train": {"max_steps": 10},
        **sections,
    }


def refusal(recipe: Any, *overrides: str) -> str:
    """The message of the ConfigError that loading `recipe` must end in."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)
