"""Reports as terminal tables, readable in a terminal and in a pipe alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from molora.evaluation.continual import AccuracyMatrix
from molora.evaluation.report import LOWER_IS_BETTER, Difference, Report, Score, differences
from molora.evaluation.routing import Matrix, RoutingSummary, advice

MODE_TITLES = {"gate": "gate alone", "task": "task id given", "base": "base only"}
PIPE_WIDTH = 1000  # rich assumes 80 columns in a pipe and would cut wide tables


def console(file: TextIO | None = None) -> Console:
    """A console on `file` (default stdout) that never cuts a table when the output is not a terminal."""
    file = file or sys.stdout
    return Console(file=file, highlight=False, width=None if file.isatty() else PIPE_WIDTH)


def print_report(report: Report, *, to: Console | None = None) -> None:
    """Everything a report holds that fits a screen: scores, differences, routing, advice, facts, notes."""
    to = to or console()
    for table in report_tables(report):
        to.print(table)
    if report.routing:
        found = advice(report.routing.dead_experts(), mode=report.routing.mode)
        to.print(found or "No dead experts.", markup=False)
    for name, value in report.facts.items():
        to.print(f"{name}: {_fact(value)}", markup=False)
    for note in report.notes:
        to.print(f"note: {note}", markup=False)


def accuracy_table(matrix: AccuracyMatrix, title: str) -> Table:
    """An accuracy matrix in percent: turns from top to bottom, tasks from left to right."""
    table = _table(f"accuracy, {title}")
    table.add_column("after")
    for task in matrix.tasks:
        table.add_column(task, justify="right")
    turns = [*([("base", matrix.base)] if matrix.base else [])]
    turns += zip(matrix.turn_names, matrix.rows, strict=True)
    for name, row in turns:
        table.add_row(name, *("" if value is None else f"{100 * value:.1f}" for value in row))
    return table


def report_tables(report: Report) -> list[Table]:
    """The tables of a report, in reading order."""
    if report.before:
        tables = [difference_table(differences(report.before, report.scores))]
    else:
        tables = [score_table(report.scores)]
    if report.routing and report.routing.by_task:
        tables.append(
            matrix_table(report.routing.task_expert(), routing_title(report.routing), corner="task")
        )
    return tables


def score_table(scores: Sequence[Score], title: str = "Held-out scores") -> Table:
    """Task x mode."""
    modes = list(dict.fromkeys(score.mode for score in scores))
    found = {(score.task, score.mode): score for score in scores}
    table = _table(title)
    table.add_column("task")
    table.add_column("metric")
    table.add_column("items", justify="right")
    for mode in modes:
        table.add_column(MODE_TITLES.get(mode, mode), justify="right")
    for task in dict.fromkeys(score.task for score in scores):
        first = next(score for score in scores if score.task == task)
        cells = [found[task, mode].text() if (task, mode) in found else "-" for mode in modes]
        table.add_row(_plain(task), first.metric, str(first.count), *cells)
    return table


def difference_table(rows: Iterable[Difference], title: str = "Before and after") -> Table:
    """Task x mode, one line each: before, after, change."""
    table = _table(title)
    for heading in ("task", "mode", "metric"):
        table.add_column(heading)
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    rows, last = list(rows), None
    order = list(dict.fromkeys(row.task for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row.task)):
        scale, unit = (1.0, "") if row.metric in LOWER_IS_BETTER else (100.0, " %")
        digits = 4 if row.metric in LOWER_IS_BETTER else 1
        before = "new" if row.before is None else f"{scale * row.before:.{digits}f}{unit}"
        change = "" if row.change is None else f"{scale * row.change:+.{digits}f}"
        if last is not None and row.task != last:
            table.add_section()
        last = row.task
        table.add_row(
            _plain(row.task), MODE_TITLES.get(row.mode, row.mode), row.metric,
            before, f"{scale * row.after:.{digits}f}{unit}", change,
        )  # fmt: skip
    return table


def matrix_table(matrix: Matrix, title: str, *, corner: str) -> Table:
    """A labelled matrix of weights; each row's largest value is bold, and starred for a pipe's sake."""
    table = _table(title)
    table.add_column(corner)
    for column in matrix.columns:
        table.add_column(_plain(column), justify="right")
    for name, values in zip(matrix.rows, matrix.values, strict=True):
        top = max(values, default=0.0)
        cells = [f"[bold]{v:.2f}*[/bold]" if v == top and v > 0 else f"{v:.2f} " for v in values]
        table.add_row(_plain(name), *cells)
    return table


def routing_title(routing: RoutingSummary) -> str:
    """Names the mode the weights were recorded in."""
    return f"Mean gate weight, task x expert ({MODE_TITLES.get(routing.mode, routing.mode)})"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _plain(name: str) -> str:
    # names are free text: a bracket must not become rich markup
    return name.replace("[", r"\[")


def _fact(value: object) -> str:
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else str(value)
