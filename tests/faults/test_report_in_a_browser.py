"""A report with hostile texts in every place, opened in Chromium: no script of theirs runs, nothing is fetched."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from molora.evaluation.counterfactual import AS_IT_IS, BASE, EVEN, Counterfactuals
from molora.evaluation.naming import Naming
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import RoutingSummary
from molora.evaluation.similarity import Similarity
from molora.report.html import render
from molora.report.several import render_several

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]

PWNED = "document.documentElement.setAttribute('data-owned','yes')"
HOSTILE = [
    f"<script>{PWNED}</script>",
    f"</pre></td></table><script>{PWNED}</script>",
    f"<img src=x onerror=\"{PWNED}\">",
    f"'><svg onload=\"{PWNED}\">",
    f"\"><iframe srcdoc='<script>parent.{PWNED}</script>'></iframe>",
    f"</title><script>{PWNED}</script>",
    f"</style><script>{PWNED}</script>",
    f"<a href=\"javascript:{PWNED}\" autofocus onfocus=\"{PWNED}\">x</a>",
    "<!--<script>", "\u202e<b>", "&lt;script&gt;", "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'>",
]  # fmt: skip


def dumped(page: Path, profile: Path) -> str:
    """The document after every script had its time."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}",
        "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "<html" in done.stdout, done.stderr[-2000:]
    return done.stdout


class Elements(HTMLParser):
    """The elements of a document, and the names of their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.links.update(value or "" for name, value in attrs if name == "href")


def test_the_probe_sees_a_script_that_runs(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(f"<html><body>{HOSTILE[0]}{HOSTILE[2]}</body></html>")
    found = Elements(dumped(tmp_path / "bad.html", tmp_path / "profile"))
    assert "data-owned" in found.attributes and "script" in found.tags


def test_no_script_of_a_hostile_report_runs(tmp_path: Path) -> None:
    scores = [Score(name, "gate", "exact_match", 0.5, 3) for name in HOSTILE]
    gates = [
        {
            "gate": name,
            "layer": name,
            "expert": name,
            "share": 0.5,
            "mean_weight": 0.5,
            "top1_share": 0.5,
            "entropy": 0.1,
        }
        for name in HOSTILE
    ]
    report = Report(
        scores=scores,
        before=scores[:3],
        routing=RoutingSummary(
            HOSTILE[0],
            3,
            {name: dict.fromkeys(HOSTILE, 0.1) for name in HOSTILE},
            gates,
            {"0": {name: dict.fromkeys(HOSTILE, 0.1) for name in HOSTILE}},
        ),
        naming=Naming({name: {HOSTILE[0]: 1} for name in HOSTILE}, dict.fromkeys(HOSTILE, 0.5)),
        facts={name: name for name in HOSTILE},
        notes=list(HOSTILE),
        environment={name: name for name in HOSTILE},
    )
    report.similarity = Similarity(*({n: dict.fromkeys(HOSTILE, 0.99) for n in HOSTILE} for _ in range(2)))
    changed = {name: dict.fromkeys((AS_IT_IS, EVEN, BASE), 0.5) for name in HOSTILE}
    each = {name: dict.fromkeys(HOSTILE, 0.5) for name in HOSTILE}
    metrics = dict.fromkeys(HOSTILE, "exact_match")
    report.counterfactuals = Counterfactuals(HOSTILE[0], 3, metrics, changed, each, each)
    page = tmp_path / "report.html"
    several = {"".join(HOSTILE): report, HOSTILE[1]: report}
    page.write_text(
        render(report, title="".join(HOSTILE), config="\n".join(HOSTILE))
        + render_several(several, title=HOSTILE[0], inside={})
    )
    found = Elements(dumped(page, tmp_path / "profile"))
    assert found.tags <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "nav", "ul", "li", "a", "section", "details",
        "summary", "h1", "h2", "h3", "p", "div", "small", "table", "caption", "thead", "tbody", "tr", "th", "td", "img", "pre",
        "fieldset", "legend", "label", "input",
    }  # fmt: skip
    assert found.attributes <= {
        "lang", "charset", "name", "content", "class", "id", "href", "style", "scope", "tabindex", "alt", "src",
        "aria-label", "aria-labelledby", "type", "checked",
    }  # fmt: skip
    assert found.links and all(link.startswith("#") for link in found.links)


def test_a_reader_chooses_whose_layers_are_shown_and_each_report_of_a_page_by_itself(tmp_path: Path) -> None:
    weights = {"a": {"x": 0.9, "y": 0.1}, "b": {"x": 0.2, "y": 0.8}}
    report = Report(scores=[], routing=RoutingSummary("gate", 9, weights, [], {"0": weights, "1": weights}))
    shown = (
        "[...document.querySelectorAll('.panel')].map(p => +(getComputedStyle(p).display != 'none')).join('')"
    )
    script = (
        f"const seen = [{shown}];"
        f"for (const i of [1, 2, 4]) {{ document.querySelectorAll('input')[i].click(); seen.push({shown}) }}"
        "document.documentElement.setAttribute('data-seen', seen.join(' '))"
    )
    page = tmp_path / "report.html"
    text = render_several({"one": report, "two": report}, title="t", inside={})
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    assert 'data-seen="1111 1011 0111 0110"' in dumped(page, tmp_path / "profile")
