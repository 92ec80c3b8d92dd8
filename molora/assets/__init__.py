"""Finds the embedded base, a small byte-level Llama that needs no download, in each of its versions."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

TINY = "molora/tiny"
"""What recipes call it."""
TINY_VERSIONS = MappingProxyType({"v1": "tiny", "v2": "tiny_2"})
"""Folder of each version. None ever changes: adapters belong to the weights they were trained on."""
NEWEST = "v2"
FIRST = "v1"
"""What is meant where files from before there were versions name none."""


def tiny_path(version: str = NEWEST) -> Path:
    """Folder of the base called `molora/tiny` in recipes: model, tokenizer and model card."""
    return Path(__file__).parent / TINY_VERSIONS[version]
