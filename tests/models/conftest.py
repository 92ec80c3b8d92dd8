"""A base on disk, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model with dropout of its own."""
    return write_base(tmp_path_factory.mktemp("base") / "llama", dropout=0.1)
