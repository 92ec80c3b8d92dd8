"""`molora runs`: list, compare and clean what training left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from molora.cli.options import group

command = group("runs", "List, compare or clean runs.")

Folder = Annotated[Path, Argument(metavar="[FOLDER]", help="Where the runs are.", show_default=True)]
_RUNS = Path("runs")


@command.command("list")
def show_list(folder: Folder = _RUNS) -> None:
    """Every run: how far it came, its mean score and its size.

    Example: molora runs list
    """
    from rich.markup import escape
    from rich.table import Table

    from molora.report.tables import console
    from molora.store.run_list import runs_below, state_of

    states = [state_of(run) for run in runs_below(folder)]
    if not states:
        typer.echo(f"no runs in {folder}")
        return
    table = Table("run", "state", "last checkpoint", "mean score", "size", box=None)
    for state in states:
        score = "" if state.score is None else f"{100 * state.score:.1f} %"
        table.add_row(escape(state.name), state.state, str(state.step or ""), score, _bytes(state.size))
    console().print(table)


@command.command()
def compare(
    runs: Annotated[list[Path], Argument(metavar="RUN RUN...", help="Runs with tasks in common.")],
) -> None:
    """The scores of several runs side by side, by task and mode.

    Example: molora runs compare runs/quickstart runs/soft_mixture
    """
    from rich.markup import escape
    from rich.table import Table

    from molora.errors import AdapterError
    from molora.evaluation.report import Report
    from molora.report.tables import console
    from molora.store.runs import Run

    found = [Run.find(path) for path in runs]
    reports = []
    for run in found:
        if not run.reports:
            raise AdapterError(f"{run.path} has no report.", hint=f"molora eval {run.path}")
        reports.append(Report.from_json(run.reports[0].read_text(encoding="utf-8")))
    cells = [{(score.task, score.mode): score.text() for score in report.scores} for report in reports]
    table = Table(
        "task", "mode", *(escape(f"{run.path.parent.name}/{run.path.name}") for run in found), box=None
    )
    for task, mode in dict.fromkeys(key for scores in cells for key in scores):
        table.add_row(escape(task), mode, *(scores.get((task, mode), "") for scores in cells))
    console().print(table)


@command.command()
def clean(
    folder: Folder = _RUNS,
    unfinished: Annotated[
        bool, Option("--unfinished", help="Remove whole runs that have no adapter too.")
    ] = False,
    yes: Annotated[bool, Option("--yes", help="Remove; without it, only say what would be.")] = False,
) -> None:
    """Remove all but the newest checkpoint of finished runs; adapters, reports and metrics stay.

    Example: molora runs clean
    """
    from molora.store.run_list import removals, remove, runs_below, state_of

    found = [*removals([state_of(run) for run in runs_below(folder)], unfinished=unfinished)]
    for removal in found:
        typer.echo(f"{removal.path}  {_bytes(removal.size)}  {removal.why}")
    total = _bytes(sum(removal.size for removal in found))
    if yes:
        remove(found)
        typer.echo(f"removed {len(found)} folders, {total}")
    else:
        typer.echo(f"{len(found)} folders, {total}; nothing was removed, --yes does.")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
