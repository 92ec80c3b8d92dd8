"""Several reports on one page: their scores side by side, how far their routing differs, then each as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from molora.evaluation.findings import headline
from molora.evaluation.measures import drift
from molora.evaluation.modes import MODE_TITLES
from molora.evaluation.report import LOWER_IS_BETTER, Report
from molora.report.html import body, page
from molora.report.html_parts import folded, paragraph, section, table


def render_several(
    reports: Mapping[str, Report], *, title: str, inside: Mapping[str, tuple[str, str]]
) -> str:
    """The page as text.

    Args:
        reports: by the name of their run, the one that the others are compared with first.
        inside: run -> loss curve (SVG) and recipe, as of `html.render`.
    """
    names = list(reports)
    parts = [section("side", "Side by side", _scores(reports), _drift(reports))]
    for i, (name, report) in enumerate(reports.items()):
        curves, config = inside.get(name, ("", ""))
        parts.append(
            section(
                f"run{i}", name, folded(headline(report), body(report, curves, config, prefix=f"run{i}-"))
            )
        )
    links = "".join(f"<li><a href='#run{i}'>{escape(name)}</a></li>" for i, name in enumerate(names))
    top = f"<header><h1>{escape(title)}</h1><nav aria-label='on this page'><ul>{links}</ul></nav></header>"
    return page(title, f"{top}<main>{''.join(parts)}</main>")


def _scores(reports: Mapping[str, Report]) -> str:
    keys = list(dict.fromkeys((s.task, s.mode) for report in reports.values() for s in report.scores))
    found = {name: {(s.task, s.mode): s for s in report.scores} for name, report in reports.items()}
    lines = []
    for task, mode in keys:
        row = [scores.get((task, mode)) for scores in found.values()]
        first = row[0]
        cells = []
        for score in row:
            text = "" if score is None else score.text()
            if (
                score is not None
                and first is not None
                and score is not first
                and score.metric == first.metric
            ):
                scale, digits = (1, 4) if score.metric in LOWER_IS_BETTER else (100, 1)
                text += f" ({scale * (score.value - first.value):+.{digits}f})"
            cells.append(text)
        lines.append([task, MODE_TITLES.get(mode, mode), *cells])
    caption = "In brackets: the difference from the first."
    return table(["task", "mode", *reports], lines, names=2, caption=caption)


def _drift(reports: Mapping[str, Report]) -> str:
    (_, first), *others = reports.items()
    if first.routing is None:
        return ""
    columns = {
        name: drift(first.routing.by_task, report.routing.by_task)
        for name, report in others
        if report.routing
    }
    tasks = list(dict.fromkeys(task for moved in columns.values() for task in moved))
    if not tasks:
        return ""
    lines = [[t, *(f"{moved[t]:.2f}" if t in moved else "" for moved in columns.values())] for t in tasks]
    about = (
        "How far a task's gate weights moved from the first run: 0 not at all, 1 to other experts altogether."
    )
    return "<h3>Routing</h3>" + paragraph(about) + table(["task", *columns], lines, names=1)
