"""The README's Python runs as printed, its commands exist, and it names no machine and no package host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_the_python_blocks_run_in_order(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "spelling-lora" / "adapter_config.json").is_file()


def test_the_commands_exist():
    from typer.testing import CliRunner

    from molora.cli.main import app

    verbs = sorted(set(re.findall(r"(?:^|`|/)molora ([a-z-]+)", TEXT, flags=re.MULTILINE)) - {"recipes"})
    assert {"train", "eval", "inspect", "add-expert", "validate"} <= set(verbs)
    for verb in verbs:
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0, verb
    targets = re.findall(r"^make ([a-z-]+)$", TEXT, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets[:2] == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_recipes_and_places_named_exist():
    for name in re.findall(r"^\| `(\w+)` \|", TEXT.split("## Gates and methods")[0], flags=re.MULTILINE):
        assert (ROOT / "recipes" / f"{name}.yaml").is_file(), name
    for place in re.findall(r"`(molora/[\w/.]+)` \|$", TEXT, flags=re.MULTILINE):
        assert (ROOT / place).exists(), place


@pytest.mark.parametrize("pattern", [r"(?<![\w.])/(home|tmp|root|work)/", r"https?://\S*(pypi|whl|index)"])
def test_no_machine_and_no_package_host(pattern):
    assert not re.search(pattern, TEXT)
