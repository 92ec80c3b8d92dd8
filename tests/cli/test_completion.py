"""Shell completion: verbs, verbs of verbs, options, and the names of recipes and presets, in a real bash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.terminal import ROOT


def completed(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    molora = folder / "molora"
    molora.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m molora.cli.main "$@"\n', encoding="utf-8")
    molora.chmod(0o755)
    typed = " ".join(f"'{word}'" for word in ("molora", *words))
    script = f"""
eval "$(molora --show-completion bash)"
COMP_WORDS=({typed}); COMP_CWORD={len(words)}
_molora_completion molora
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True,
        env={"PATH": f"{folder}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["va"], ["validate"]),
        (["runs", ""], ["list", "compare", "clean"]),
        (["eval", "--check"], ["--checkpoint"]),
        (["recipes", "show", "quick"], ["quickstart"]),
        (["presets", "show", "adam"], ["adamole"]),
    ],
    ids=" ".join,
)
def test_bash_completes(tmp_path: Path, words: list[str], wanted: list[str]) -> None:
    assert completed(tmp_path, *words) == wanted
