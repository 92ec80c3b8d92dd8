"""docs/continual.md: its Python runs, its commands exist, and every strategy is in its table."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from molora.config.continual import STRATEGIES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "continual.md").read_text(encoding="utf-8")


def test_every_strategy_is_described() -> None:
    assert set(re.findall(r"^\| `(\w+)` \| one", TEXT, flags=re.MULTILINE)) == set(STRATEGIES)


def test_recipes_named_exist() -> None:
    named = set(re.findall(r"recipes/\w+\.yaml", TEXT))
    assert named and all((ROOT / name).is_file() for name in named)


def test_the_python_runs(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "after,pig,mirror" in done.stdout
    assert "['pig', 'spell']" in done.stdout
