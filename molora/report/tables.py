"""Reports as terminal tables, readable in a terminal and in a pipe alike."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from molora.evaluation.continual import TurnScores
from molora.evaluation.counterfactual import Counterfactuals, rows
from molora.evaluation.findings import advice, warnings
from molora.evaluation.harness import HarnessScore, titled
from molora.evaluation.modes import MODE_TITLES
from molora.evaluation.predictions import Prediction
from molora.evaluation.report import LOWER_IS_BETTER, Difference, Report, Score, differences
from molora.evaluation.routing import Matrix, RoutingSummary
from molora.evaluation.tokens import TokenView

PIPE_WIDTH = 1000  # rich assumes 80 columns in a pipe and would cut wide tables


def console(file: TextIO | None = None) -> Console:
    """A console on `file` (default stdout) that never cuts a table when the output is not a terminal."""
    file = file or sys.stdout
    return Console(file=file, highlight=False, width=None if file.isatty() else PIPE_WIDTH)


def print_report(report: Report, *, to: Console | None = None) -> None:
    """Everything a report holds that fits a screen: scores, differences, routing, advice, facts, notes."""
    to = to or console()
    if not report.scores:
        to.print("nothing was scored: no task has held-out records; `eval: 0.1` in a task holds out a tenth.")
        return
    for table in report_tables(report):
        to.print(table)
    if report.routing:
        for line in routing_lines(report.routing, grown=bool(report.before)):
            to.print(line, markup=False)
    for line in warnings(report):
        if report.routing is None or line not in routing_lines(report.routing, grown=bool(report.before)):
            to.print(f"warning: {line}", markup=False)
    for name, value in report.facts.items():
        to.print(f"{name}: {fact(value)}", markup=False)
    for note in report.notes:
        to.print(f"note: {note}", markup=False)


def turn_table(matrix: TurnScores, title: str) -> Table:
    """Scores after each turn in percent: turns from top to bottom, tasks from left to right."""
    table = _table(f"score of each task in its own metric, {title}", ["after"], matrix.tasks)
    for name, row in matrix.turns():
        table.add_row(name, *("" if value is None else f"{100 * value:.1f}" for value in row))
    return table


def report_tables(report: Report) -> list[Table]:
    """The tables of a report, in reading order."""
    if report.before:
        tables = [difference_table(differences(report.before, report.scores))]
    else:
        tables = [score_table(shown_scores(report))]
    if (routing := report.routing) and routing.by_task:
        tables.append(matrix_table(routing.task_expert(), routing_title(routing), corner="task"))
    if report.counterfactuals:
        tables.append(what_if_table(report.counterfactuals))
        if report.counterfactuals.shapley:
            tables.append(shapley_table(report.counterfactuals))
    return tables


def token_table(view: TokenView, layers: Sequence[str]) -> Table:
    """A token in each row, a layer in each column: the expert with the largest weight, and that weight."""
    table = _table(
        "Largest weight by token and layer", ["token", *(f"layer {layer}" for layer in layers)], []
    )
    for i, token in enumerate(view.tokens):
        tops = (view.top(layer, i) for layer in layers)
        table.add_row(_plain(repr(token)), *(_plain(f"{name} {weight:.2f}") for name, weight in tops))
    return table


def what_if_table(found: Counterfactuals) -> Table:
    """A change in each row, a task in each column: score under it."""
    shown = rows(found)
    table = _table(f"What if (first {found.records} records)", ["change"], map(_plain, shown))
    for change in dict.fromkeys(name for row in shown.values() for name in row):
        cells = (Score(t, "", found.metrics[t], row[change], 0).text() for t, row in shown.items())
        table.add_row(_plain(change), *cells)
    return table


def shapley_table(found: Counterfactuals) -> Table:
    """An expert in each row, a task in each column: its part of the score, in points or nats."""
    table = _table("Each expert's part of the score (Shapley)", ["expert"], map(_plain, found.shapley))
    for expert in dict.fromkeys(name for row in found.shapley.values() for name in row):
        parts = ((found.metrics[task] in LOWER_IS_BETTER, row[expert]) for task, row in found.shapley.items())
        table.add_row(
            _plain(expert), *(f"{part:+.4f}" if nats else f"{100 * part:+.1f}" for nats, part in parts)
        )
    return table


def shown_scores(report: Report) -> list[Score]:
    """All scores, but those with the task's id given where no router names tasks and an id changes nothing."""
    by_mode: dict[str, dict[str, float]] = {}
    for score in report.scores:
        by_mode.setdefault(score.mode, {})[score.task] = score.value
    same = "gate" in by_mode and by_mode["gate"] == by_mode.get("task") and report.naming is None
    return [score for score in report.scores if not (same and score.mode == "task")]


def score_table(scores: Sequence[Score], title: str = "Held-out scores") -> Table:
    """Task x mode."""
    head, rows = score_cells(scores)
    table = _table(title, head[:2], head[2:])
    for task, *cells in rows:
        table.add_row(_plain(task), *cells)
    return table


def score_cells(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of task x mode; the first two columns are texts, the others numbers."""
    modes = list(dict.fromkeys(score.mode for score in scores))
    found = {(score.task, score.mode): score.text() for score in scores}
    first = {score.task: score for score in reversed(scores)}
    rows = [
        [task, first[task].metric, str(first[task].count), *(found.get((task, mode), "-") for mode in modes)]
        for task in dict.fromkeys(score.task for score in scores)
    ]
    return ["task", "metric", "items", *(MODE_TITLES.get(mode, mode) for mode in modes)], rows


def difference_table(rows: Iterable[Difference], title: str = "Before and after") -> Table:
    """Task x mode, one line each: before, after, change."""
    table = _table(title, ["task", "mode", "metric"], ["before", "after", "change"])
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
    table = _table(title, [corner], map(_plain, matrix.columns))
    for name, values in zip(matrix.rows, matrix.values, strict=True):
        top = max(values, default=0.0)
        cells = [f"[bold]{v:.2f}*[/bold]" if v == top and v > 0 else f"{v:.2f} " for v in values]
        table.add_row(_plain(name), *cells)
    return table


def routing_title(routing: RoutingSummary) -> str:
    """Names the mode the weights were recorded in."""
    return f"Mean gate weight, task x expert ({MODE_TITLES.get(routing.mode, routing.mode)})"


def routing_lines(routing: RoutingSummary, *, grown: bool = False) -> list[str]:
    """Sentences below the table of weights: how far experts specialise, and which are hardly used."""
    found = advice(routing.dead_experts(), mode=routing.mode, grown=grown)
    apart = routing.specialisation()
    lines = [] if apart is None else [f"Experts specialise by task: {apart:.2f} of 1."]
    return [*lines, found or "No dead experts."]


def example_lines(found: Iterable[Prediction]) -> list[str]:
    """`pig, gate alone, right: pig(abc)= → bcaay`, and of a wrong answer what it should have been."""
    lines = []
    for p in found:
        said = "no label" if p.prediction is None else visible(p.prediction)
        worth = f"right: {visible(p.prompt)} → {said}"
        if not p.right:
            worth = f"wrong: {visible(p.prompt)} → {said}, not {visible(p.answer)}"
        lines.append(f"{p.task}, {MODE_TITLES.get(p.mode, p.mode)}, {worth}")
    return lines


def visible(text: str) -> str:
    """A text on one line, its control characters written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text.replace("\n", "⏎"))


def harness_table(scores: Sequence[HarnessScore]) -> Table:
    """Scores of lm-evaluation-harness with their standard errors, a column for each who decided."""
    modes = dict.fromkeys(score.mode for score in scores)
    found = {(score.task, score.metric, score.mode): score for score in scores}
    table = _table("lm-evaluation-harness", ["task", "metric"], map(titled, modes))
    for task, metric in dict.fromkeys((score.task, score.metric) for score in scores):
        cells = (found.get((task, metric, mode)) for mode in modes)
        table.add_row(task, metric, *("" if cell is None else cell.text() for cell in cells))
    return table


def _table(title: str, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """An empty table with these columns of texts, then these of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _plain(name: str) -> str:
    # names are free text: a bracket must not become rich markup
    return name.replace("[", r"\[")


def fact(value: object) -> str:
    """A value of a report's facts or environment, as a reader would write it."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value)) or "none"
    return str(value)
