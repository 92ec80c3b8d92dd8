"""One HTML file that holds a whole report: scores, pictures, facts, recipe; nothing to download."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from molora.evaluation.naming import Naming
from molora.evaluation.report import Report, differences
from molora.evaluation.runner import MODE_TITLES
from molora.report.tables import routing_lines, score_cells

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.2rem }
table { border-collapse: collapse } th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
"""


def render(report: Report, *, title: str, pictures: Sequence[Path] = (), config: str = "") -> str:
    """The page as text. pictures: PNG files, embedded. config: the resolved recipe as YAML."""
    head, rows = score_cells(report.scores)
    parts = [f"<h2>Held-out scores</h2>{_table(head, rows, names=2)}"]
    if report.before:
        parts.append(_differences(report))
    if report.routing:
        parts += [f"<p>{escape(line)}</p>" for line in routing_lines(report.routing)]
    if report.naming:
        parts.append(_naming(report.naming))
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    parts += [_picture(path) for path in pictures]
    for heading, values in (("Facts", report.facts), ("Environment", report.environment)):
        pairs = [[str(key), str(value)] for key, value in values.items()]
        if pairs:
            parts.append(f"<h2>{heading}</h2>{_table(['', ''], pairs, names=2)}")
    if config:
        parts.append(f"<h2>Recipe</h2><pre>{escape(config)}</pre>")
    meta = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    return f"<!doctype html>\n<html lang='en'><head>{meta}</head><body>\n{body}\n</body></html>\n"


def _differences(report: Report) -> str:
    rows = []
    for row in differences(report.before, report.scores):
        before = "new" if row.before is None else f"{row.before:.4f}"
        change = "" if row.change is None else f"{row.change:+.4f}"
        rows.append([row.task, MODE_TITLES.get(row.mode, row.mode), before, f"{row.after:.4f}", change])
    return f"<h2>Before and after</h2>{_table(['task', 'mode', 'before', 'after', 'change'], rows, names=2)}"


def _naming(naming: Naming) -> str:
    """The router's confusion table, a row for the prompts of each task."""
    rows = []
    for task, counts in naming.named.items():
        share = naming.refused.get(task)
        told = "" if share is None else f"{100 * share:.0f} %"
        rows.append([task, *(str(counts.get(name, 0)) for name in naming.names), told])
    head = ["prompts of", *(f"as {name}" for name in naming.names), "told apart if unknown"]
    return f"<h2>What the router takes held-out prompts for</h2>{_table(head, rows, names=1)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, names: int) -> str:
    """names: how many leading columns are text; the others are numbers."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = (f"<td{'' if i < names else ' class=n'}>{escape(cell)}</td>" for i, cell in enumerate(row))
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"<p><img alt='{escape(path.stem, quote=True)}' src='data:image/png;base64,{data}'></p>"
