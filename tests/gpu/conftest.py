"""The device that the tests of this folder run on."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """The first CUDA device; without one the tests that ask for it are skipped."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
