"""A page with every part, in Chromium under axe-core: no rule of accessibility is broken, in light and in dark."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from molora.evaluation.counterfactual import AS_IT_IS, BASE, EVEN, Counterfactuals
from molora.evaluation.naming import Naming
from molora.evaluation.report import Report
from molora.evaluation.similarity import Similarity
from molora.report.html import render
from molora.report.plots import curve_of
from tests.faults.test_report_in_a_browser import CHROMIUM, dumped

AXE = importlib.util.find_spec("axe_playwright_python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(AXE is None, reason="pip install --no-deps axe-playwright-python"),
]


@pytest.mark.parametrize("dark", [False, True])
def test_an_accessibility_audit_finds_nothing(report: Report, tmp_path: Path, dark: bool) -> None:
    """axe-core's rules, on a page with every part, with its folded parts open."""
    assert AXE is not None and AXE.origin is not None
    axe = (
        (Path(AXE.origin).parent / "axe.min.js").read_text(encoding="utf-8").replace("</script", r"<\/script")
    )
    run = (
        "axe.run(document, {resultTypes: ['violations']}).then(found => { const p = document.createElement('pre'); p.id = 'axe';"
        "p.textContent = JSON.stringify(found.violations.map(v => [v.id, v.nodes[0].html, v.nodes[0].failureSummary]));"
        "document.body.appendChild(p) })"
    )
    pairs = {"a": {"a": 1.0, "b": 0.31}, "b": {"a": 0.31, "b": 1.0}}
    assert report.routing is not None
    report.routing.layers["0"] = report.routing.by_task
    report.similarity = Similarity(pairs, pairs)
    row = {AS_IT_IS: 0.9, EVEN: 0.2, BASE: 0.0}
    each = {"sum": {"a": 0.55, "b": 0.86}}
    report.counterfactuals = Counterfactuals("gate", 7, {"sum": "exact_match"}, {"sum": row}, each, each)
    report.naming = Naming({"sum": {"sum": 9, "reverse [x]": 1}}, {"sum": 0.5})
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2.5\n2,1.5\n")
    text = render(report, title="t", curves=curve_of(tmp_path), config="x: 1").replace(
        "<details>", "<details open>"
    )
    if dark:
        text = text.replace("@media (prefers-color-scheme: dark)", "@media all")
    page = tmp_path / "report.html"
    page.write_text(
        text.replace("</body>", f"<script>{axe}</script><script>{run}</script></body>"), encoding="utf-8"
    )
    (found,) = re.findall(r'<pre id="axe">(.*)</pre>', dumped(page, tmp_path / "profile"))
    assert json.loads(found) == []
