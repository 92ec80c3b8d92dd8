"""The HTML report is one self-contained file with everything escaped, and says first what happened."""

import base64
import re
from html.parser import HTMLParser

from molora.evaluation.counterfactual import AS_IT_IS, BASE, EVEN, Counterfactuals
from molora.evaluation.naming import Naming
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import RoutingSummary
from molora.evaluation.similarity import Similarity
from molora.report.html import render
from molora.report.plots import loss_svg
from molora.report.several import render_several
from tests.report.conftest import gate_rows

VOID = {"meta", "img", "input", "path", "use", "rect", "line"}


class Page(HTMLParser):
    """Its elements, all closed in order; its pictures, headings and text."""

    def __init__(self, text):
        super().__init__()
        self.images, self.tags, self.ids, self.text, self.open = [], [], [], [], []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "note")
        self.tags.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            assert found["alt"]
            self.images.append(found["src"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_says_what_happened_and_holds_scores_and_recipe(report):
    page = Page(render(report, title="run <1>", config="name: x # <b>"))
    text = "".join(page.text)
    for expected in (
        "run <1>", "The 1 task from before went from 93.0 to 90.0 %", "90.0 %", "82.6 to 94.5 %", "a <note>", "name: x # <b>",
        "Before and after", "-0.0300", "2.13.0", "Hardly used: b", "Load: as if", "0.90",
    ):  # fmt: skip
        assert expected in text, expected
    assert page.images == [] and page.tags.count("h1") == 1 and "main" in page.tags


def test_every_link_has_its_place_and_ids_are_unique(report):
    text = render(report, title="t", config="x: 1")
    page = Page(text)
    assert set(re.findall(r"href='#([\w-]+)'", text)) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_a_report_without_extras_still_renders(report):
    report.before, report.routing, report.facts = [], None, {}
    text = "".join(Page(render(report, title="t")).text)
    assert "Before and after" not in text
    assert "Facts" not in text
    assert "No task has held-out records" in "".join(Page(render(Report(), title="t")).text)


def test_the_loss_curve_is_text_and_lines_in_the_pages_colour(report, tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("step,loss,val_loss\n1,2.5,\n2,1.5,1.7\n3,1.0,\n")
    page = render(report, title="t", curves=loss_svg(metrics, ["loss", "val_loss"]))
    assert "aria-label='Loss over training steps: loss, val_loss'" in page
    assert "currentColor" in page and ">step</text>" in page
    assert loss_svg(metrics, ["loss"]) == loss_svg(metrics, ["loss"]), "the same file each time"


def test_what_if_similarity_and_confusion_are_shown(report):
    pairs = {"a": {"a": 1.0, "b": 0.31}, "b": {"a": 0.31, "b": 1.0}}
    row = {AS_IT_IS: 0.9, EVEN: 0.2, BASE: 0.0}
    report.counterfactuals = Counterfactuals(
        "gate", 7, {"sum": "exact_match"}, {"sum": row}, {"sum": {"a": 0.55}}, {"sum": {"a": 0.44}}
    )
    report.similarity = Similarity(pairs, pairs)
    report.naming = Naming(
        {"sum": {"sum": 9, "reverse [x]": 1}, "reverse [x]": {"reverse [x]": 10}}, {"sum": 0.5}
    )
    text = "".join(Page(render(report, title="t")).text)
    for expected in (
        "only a",
        "without a",
        "55",
        "The gate is worth +70.0 points",
        "0.31",
        "as reverse [x]",
        "50 %",
    ):
        assert expected in text, expected


def test_several_reports_side_by_side(report):
    other = Report(
        scores=[Score("sum", "gate", "exact_match", 0.6, 100)],
        routing=RoutingSummary("gate", 9, {"sum": {"a": 0.8, "b": 0.2}}, gate_rows(0, {"a": 0.8, "b": 0.2})),
    )
    text = render_several({"one/<1>": report, "two/2": other}, title="two", inside={"two/2": ("", "name: y")})
    page = Page(text)
    shown = "".join(page.text)
    for expected in ("one/<1>", "60.0 % (-30.0)", "0.60", "name: y", "a <note>"):
        assert expected in shown, expected
    assert len(page.ids) == len(set(page.ids))


def test_a_large_report_stays_small_and_quick():
    """32 layers x 64 experts x 20 tasks: pictures instead of tables, below 5 MB."""
    experts = [f"expert_{i}" for i in range(64)]
    layers = {str(k): {f"t{t}": dict.fromkeys(experts, 1 / 64) for t in range(20)} for k in range(32)}
    gates = [row for k in range(32) for row in gate_rows(k, dict.fromkeys(experts, 1 / 64))]
    by_task = layers["0"]
    scores = [
        Score(f"t{t}", mode, "exact_match", 0.5, 100) for t in range(20) for mode in ("gate", "task", "base")
    ]
    whole = Report(scores=scores, routing=RoutingSummary("gate", 999, by_task, gates, layers))
    page = render(whole, title="large")
    assert len(page) < 5e6 and len(Page(page).images) == 2
    for picture in Page(page).images:
        assert base64.b64decode(picture.split(",", 1)[1]).startswith(b"\x89PNG")


def test_the_environment_is_written_out(report):
    report.environment = {"versions": {"torch": "2.13.0", "peft": "0.21.2"}, "devices": [], "threads": 1}
    shown = "".join(Page(render(report, title="t")).text)
    assert "torch 2.13.0, peft 0.21.2" in shown and "none" in shown and "{'" not in shown
