"""The HTML report is one self-contained file with everything escaped."""

import base64
from html.parser import HTMLParser

from molora.report.html import render
from molora.report.plots import plot_scores


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.headings, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe", "note")
        if tag == "img":
            self.images.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.text.append(data)


def test_page_holds_scores_pictures_and_recipe(report, tmp_path):
    picture = plot_scores(report, tmp_path / "scores.png")
    page = Page(render(report, title="run <1>", pictures=[picture], config="name: x # <b>"))
    assert len(page.images) == 1
    prefix, data = page.images[0].split(",", 1)
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data) == picture.read_bytes()
    text = "".join(page.text)
    for expected in (
        "run <1>",
        "90.0 %",
        "a <note>",
        "name: x # <b>",
        "Before and after",
        "-0.0300",
        "2.13.0",
    ):
        assert expected in text


def test_a_report_without_extras_still_renders(report):
    report.before, report.routing, report.facts = [], None, {}
    text = "".join(Page(render(report, title="t")).text)
    assert "Before and after" not in text
    assert "Facts" not in text
