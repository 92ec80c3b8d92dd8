"""The walk through stages and fusion in docs/fusion.md, command by command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "fusion.md").read_text(encoding="utf-8")
WALK = re.search(r"^## A walk through\n.*?```\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL)


def test_it_uses_what_there_is() -> None:
    from molora.cli.main import VERBS
    from molora.cli.recipes import available

    assert WALK is not None
    assert set(re.findall(r"\bmolora ([a-z-]+) ", WALK[1])) <= {*VERBS}
    assert set(re.findall(r"recipes/(\w+)\.yaml", WALK[1])) <= {*available()}


@pytest.mark.slow
def test_it_runs_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("nevergrad", reason="needs nevergrad: pip install molora[lorahub]")
    pytest.importorskip("optuna", reason="needs optuna: pip install molora[search]")
    assert WALK is not None
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-e", "-c", WALK[1]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    scores = {}
    for report in tmp_path.glob("scores/*/report.json"):
        rows = json.loads(report.read_text(encoding="utf-8"))["scores"]
        scores[report.parent.name] = {row["task"]: row["value"] for row in rows}
    assert {*scores} == {"sum", "fixed", "grid", "lorahub", "optuna", "curriculum"}
    # One sum of weights per model: all in full is the last stage's model, so its task is answered and the first forgotten.
    assert scores["sum"]["replies"] > 0.8 and scores["sum"]["terms"] < 0.2
