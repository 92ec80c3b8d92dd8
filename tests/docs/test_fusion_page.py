"""docs/fusion.md: its Python runs, its methods are the registered ones with their defaults, its verbs exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from molora.fusion.methods import FUSIONS, default_weight, settings_of

TEXT = (Path(__file__).parents[2] / "docs" / "fusion.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_runs(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "loras" / "both" / "adapter_model.safetensors").is_file()


def test_the_methods_are_the_registered_ones() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", TEXT, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [*FUSIONS]
    for name, row in rows:
        *_, settings, weight = (cell.strip() for cell in row.split("|"))
        if name == "core_space":
            assert settings.startswith(f"`inner` {FUSIONS[name].settings['inner']}")
            continue
        assert settings == ", ".join(f"`{key}` {value}" for key, value in FUSIONS[name].settings.items())
        assert weight == {0.25: "1/n", 1.0: "1"}[default_weight(name, settings_of(name, {}), 4)]


def test_the_verbs_exist() -> None:
    from molora.cli.main import VERBS

    assert set(re.findall(r"^molora ([a-z-]+)", TEXT, flags=re.MULTILINE)) <= {*VERBS}
