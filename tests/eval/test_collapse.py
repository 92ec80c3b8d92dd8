"""The collapse table: what is committed shows a collapse and its cure, and the script runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from eval.collapse import page
from tests.training.runs import ROOT

RESULTS = ROOT / "eval" / "results"


def test_the_committed_table_shows_collapse_and_cure():
    record = json.loads((RESULTS / "collapse.json").read_text(encoding="utf-8"))
    even, results = 1 / record["settings"]["experts"], record["results"]
    assert min(run["least"] for run in results["none"].values()) < 0.5 * even
    assert all(run["gates_collapsed"] == 1 for run in results["none"].values())
    for arm in ("balance 1", "loss-free 0.003"):
        assert all(run["least"] > 0.5 * even for run in results[arm].values())
    assert all(run["gates_collapsed"] == 0 for run in results["balance 1"].values())
    steps, seeds = record["settings"]["steps"], len(results["none"])
    assert (RESULTS / "collapse.md").read_text(encoding="utf-8") == page(results, steps, seeds)


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    command = [sys.executable, "-m", "eval.collapse", "--quick", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    record = json.loads((tmp_path / "collapse.json").read_text())
    assert set(record["results"]) == {"none", "balance 1"}
    assert sum(record["results"]["none"]["0"]["shares"]) == pytest.approx(1, abs=0.01)
    assert "| none |" in (tmp_path / "collapse.md").read_text()
