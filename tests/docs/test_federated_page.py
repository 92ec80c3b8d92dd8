"""docs/federated.md: its Python runs, and every way of aggregating is in its table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from molora.config.federated import AGGREGATORS

TEXT = (Path(__file__).parents[2] / "docs" / "federated.md").read_text(encoding="utf-8")


def test_every_way_of_aggregating_is_described_with_its_paper() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| the mean(.*)$", TEXT, flags=re.MULTILINE))
    assert [*rows] == [*AGGREGATORS]
    assert all(spec.paper in rows[name] for name, spec in AGGREGATORS.items())


def test_the_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(code, "docs/federated.md", "exec"), names)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "north 0.5  " and shown[2].startswith("west 0.0 missing")
    assert names["due"].number == 2 and names["due"].start.folder.name == "round-1"  # type: ignore[attr-defined]
