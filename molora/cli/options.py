"""What several verbs share: arguments, options, groups of verbs, and how a finished run is shown."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

RecipeFile = Annotated[Path, Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
RunFolder = Annotated[Path, Argument(metavar="RUN", help="A run folder, runs/<name>, or an adapter folder.")]
Overrides = Annotated[
    list[str] | None,
    Argument(metavar="[a.b=c]...", help="Settings that replace the recipe's.", show_default=False),
]
Resume = Annotated[bool, Option("--resume", help="Go on with the recipe's latest run.")]
ResumeFrom = Annotated[Path | None, Option(metavar="RUN", help="Go on with this run.")]
OtherBase = Annotated[
    bool,
    Option("--allow-other-base", help="Go on where the base is not the one the adapter was trained on."),
]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]


def group(name: str, about: str) -> typer.Typer:
    """A verb that has verbs of its own."""
    return typer.Typer(name=name, help=about, no_args_is_help=True, add_completion=False)


def say_reach(found: Iterable[str]) -> None:
    """Print what of a recipe lies outside the working folder, before it is used."""
    for line in found:
        typer.echo(f"outside the working folder: {line}", err=True)


def check_out_of(run: Path, out: Path, *, mark: str) -> None:
    """`check_out` for what is made from a run or an adapter folder, before a model is loaded."""
    from molora.disk.card import CONFIG_FILE
    from molora.disk.out_folder import check_out
    from molora.store.runs import Run

    trained = None if (run / CONFIG_FILE).is_file() else Run.find(run)
    check_out(out, run, *(() if trained is None else (trained.path, trained.adapter)), mark=mark)


def show_run(run: Path) -> None:
    """Print the report of a run and where it is; of processes that trained together, the first one does."""
    from molora.evaluation.report import Report
    from molora.report.tables import console, print_report
    from molora.training.environment import is_first_process

    if not is_first_process():  # the first may still be writing the report
        return
    to = console()
    print_report(Report.from_json((run / "report.json").read_text(encoding="utf-8")), to=to)
    to.print(f"run: {run}\nreport: {run / 'report.html'}", markup=False)
