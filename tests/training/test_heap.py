"""The allocator is set where glibc is, and a choice in the environment is left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def taken(**environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    code = "from molora.training.heap import keep_freed_memory as k; print(k())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True
    )
    return run.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt belongs to glibc")
def test_thresholds_are_taken_unless_the_environment_chose() -> None:
    assert taken() == "True"
    assert taken(MALLOC_TRIM_THRESHOLD_="1000000") == "False"
