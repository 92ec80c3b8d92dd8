"""docs/continual.md: its Python runs, its commands exist, and every strategy is in its table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from molora.config.continual import STRATEGIES
from tests.pictures import blank_pictures

__all__ = ["blank_pictures"]

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "continual.md").read_text(encoding="utf-8")


def test_every_strategy_is_described() -> None:
    assert set(re.findall(r"^\| `(\w+)` \| one", TEXT, flags=re.MULTILINE)) == set(STRATEGIES)


def test_recipes_named_exist() -> None:
    named = set(re.findall(r"recipes/\w+\.yaml", TEXT))
    assert named and all((ROOT / name).is_file() for name in named)


@pytest.mark.slow
def test_the_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL))
    monkeypatch.chdir(tmp_path)
    known = list(STRATEGIES)
    try:
        exec(compile(code, "docs/continual.md", "exec"), {"__name__": "page"})
    finally:
        for name in set(STRATEGIES) - set(known):
            STRATEGIES.remove(name)
    shown = capsys.readouterr().out
    assert "after,pig,mirror" in shown
    assert "['pig', 'spell']" in shown
