"""`molora report`: the HTML report of a run, or of several side by side, as one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from molora.cli.options import check_parent
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.evaluation.report import Report
    from molora.store.runs import Run


def command(
    runs: Annotated[
        list[Path],
        Argument(
            metavar="RUN...",
            help="Runs, or their evaluations (RUN/evaluations/1), the one to compare with first.",
        ),
    ],
    out: Annotated[Path, Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write the report of a run, or of several side by side, as one HTML file that needs nothing else.

    Example: molora report runs/quickstart runs/soft_mixture --out both.html
    """
    from molora.report.html import GENERATOR

    if out.is_dir() or (
        out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:400]
    ):
        raise ConfigError(f"{out} exists and is no report of molora's.", hint="name another file with --out")
    check_parent(out)
    from molora.config.load import recipe_text
    from molora.disk.atomic import write_file
    from molora.report.html import render
    from molora.report.plots import curve_of
    from molora.report.several import render_several

    found = [_read(path) for path in runs]
    inside = {name: (curve_of(run.path), recipe_text(run.config)) for name, run, _ in found}
    if len(inside) < len(found):
        raise ConfigError("a run is named twice.", hint="name each one once")
    if len(found) == 1:
        name, _, report = found[0]
        curves, config = inside[name]
        page = render(report, title=f"molora: {name}", curves=curves, config=config)
    else:
        reports = {name: report for name, _, report in found}
        page = render_several(reports, title=f"molora: {len(found)} runs", inside=inside)
    write_file(out, page.encode())
    typer.echo(str(out))


def _read(path: Path) -> tuple[str, Run, Report]:
    """A run's name, the run, and the report of its training, or of the evaluation that was named."""
    from molora.errors import AdapterError
    from molora.evaluation.report import Report
    from molora.store.runs import REPORT_FILE, Run

    of_evaluation = path.parent.name == "evaluations" and (path / REPORT_FILE).is_file()
    run = Run.find(path.parent.parent if of_evaluation else path)
    files = [path / REPORT_FILE] if of_evaluation else run.reports
    if not files:
        raise AdapterError(f"{run.path} has no report.", hint=f"molora eval {run.path}")
    try:
        report = Report.from_json(files[0].read_text(encoding="utf-8"))
    except AdapterError as error:
        raise AdapterError(f"{files[0]}: {error}") from error
    name = f"{run.path.parent.name}/{run.path.name}"
    place = files[0].parent
    return name if place == run.path else f"{name}/evaluations/{place.name}", run, report
