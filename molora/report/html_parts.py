"""The parts of the HTML report: tables, heat maps, facts. Everything that is shown is escaped here and nowhere else."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

from molora.evaluation.routing import Matrix

DEEP_FROM = (
    0.86  # of the deepest colour: from here on the other ink has the better contrast, 4.5 : 1 at least
)
NUMBERED_UP_TO = 600  # cells of a heat map that are shown as a table; larger ones are a picture


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph; kind: a class of the style."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    names: int,
    caption: str = "",
    notes: Sequence[str] = (),
) -> str:
    """A table whose first `names` columns are texts and whose others are numbers; notes: small text behind the last cells."""
    lines = [f"<caption>{escape(caption)}</caption>" if caption else ""]
    cells = "".join(
        f"<th scope=col{_class('' if i < names else 'n')}>{escape(cell)}</th>" for i, cell in enumerate(head)
    )
    lines.append(f"<thead><tr>{cells}</tr></thead><tbody>")
    for r, row in enumerate(rows):
        line = [f"<th scope=row>{escape(row[0])}</th>"]
        line += [
            f"<td{_class('' if i < names else 'n')}>{escape(cell)}</td>"
            for i, cell in enumerate(row[1:], start=1)
        ]
        if notes:
            line.append(f"<td><small>{escape(notes[r])}</small></td>")
        lines.append(f"<tr>{''.join(line)}</tr>")
    return f"<div class=scroll tabindex=0><table>{''.join(lines)}</tbody></table></div>"


def heat(
    matrix: Matrix,
    *,
    corner: str,
    caption: str,
    percent: bool = False,
    top: bool = True,
    peak: float | None = None,
) -> str:
    """A matrix as a table of coloured numbers; each row's largest is bold, NaN stays empty.

    percent: the values are shares, shown as whole percent. peak: the value of the deepest colour; default the largest.
    """
    finite = [value for row in matrix.values for value in row if not math.isnan(value)]
    peak = peak or max(finite, default=0.0) or 1.0
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in (corner, *matrix.columns))
    lines = []
    for name, row in zip(matrix.rows, matrix.values, strict=True):
        largest = max((value for value in row if not math.isnan(value)), default=math.nan)
        cells = "".join(_cell(value, peak, top and value == largest and value > 0, percent) for value in row)
        lines.append(f"<tr><th scope=row>{escape(name)}</th>{cells}</tr>")
    return (
        f"<div class=scroll tabindex=0><table class=heat><caption>{escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: float, peak: float, top: bool, percent: bool) -> str:
    if math.isnan(value):
        return "<td class=none></td>"
    depth = min(1.0, max(0.0, value / peak))
    classes = " ".join([*(["deep"] if depth >= DEEP_FROM else []), *(["top"] if top else [])])
    text = f"{100 * value:.0f}" if percent else f"{value:.2f}"
    return f"<td{_class(classes)} style='--w:{depth:.2f}'>{text}</td>"


def picture(png: bytes, says: str) -> str:
    """An embedded picture, with what it shows in words."""
    data = base64.b64encode(png).decode("ascii")
    return f"<p><img alt='{escape(says, quote=True)}' src='data:image/png;base64,{data}'></p>"


def folded(summary: str, inside: str) -> str:
    """What is shown when it is opened."""
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def choice(group: str, legend: str, panels: Mapping[str, str], *, whole: str = "") -> str:
    """Panels of which a reader looks at one by a radio button, so that the arrow keys go through them; no script.

    Args:
        group: a name that no other group of the page has.
        whole: what is shown instead at first; without it all panels are. A browser without `:has` shows everything.
    """
    every = f"<div class='panel whole'>{whole}</div>" if whole else ""
    name = escape(group, quote=True)
    parts = [f"<label class=every><input type=radio name='{name}' checked> all</label>{every}"]
    parts += [
        f"<label><input type=radio name='{name}'> {escape(label)}</label><div class=panel>{inside}</div>"
        for label, inside in panels.items()
    ]
    kind = "choice" if whole else "choice some"
    return f"<fieldset class='{kind}'><legend>{escape(legend)}</legend>{''.join(parts)}</fieldset>"


def section(anchor: str, heading: str, *inside: str) -> str:
    """A part of the page that the list at its top leads to; anchor: ours, not a user's text."""
    return f"<section id={anchor} aria-labelledby={anchor}-h><h2 id={anchor}-h>{escape(heading)}</h2>{''.join(inside)}</section>"


def _class(name: str) -> str:
    if not name:
        return ""
    return f" class='{name}'" if " " in name else f" class={name}"
