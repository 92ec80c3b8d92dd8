"""Finds the embedded base: a small byte-level Llama that needs no download."""

from __future__ import annotations

from pathlib import Path


def tiny_path() -> Path:
    """Folder of the base called `molora/tiny` in recipes: model, tokenizer and model card."""
    return Path(__file__).parent / "tiny"
