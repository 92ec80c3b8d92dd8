"""Running the command line inside the test's process, or in one of its own where imports are the point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from molora.cli.main import main
from tests.pictures import blank_pictures

__all__ = ["blank_pictures"]

ROOT = Path(__file__).parents[2]


@dataclass
class Result:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Result(stop.value.code, printed.out, printed.err)

    return run


def fresh(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """`code` in a new Python process whose import path starts with `paths` (default: this checkout)."""
    path = os.pathsep.join(map(str, paths or (ROOT,)))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
