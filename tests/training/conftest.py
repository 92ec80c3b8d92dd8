"""Bases on disk, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pictures import blank_pictures
from tests.training.runs import write_base, write_encoder

__all__ = ["blank_pictures"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model with dropout of its own."""
    return write_base(tmp_path_factory.mktemp("base") / "llama", dropout=0.1)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with dropout of its own."""
    return write_encoder(tmp_path_factory.mktemp("base") / "bert")
