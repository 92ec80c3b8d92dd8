"""What several verbs share: arguments, options, groups of verbs, and how a finished run is shown."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from molora.errors import ConfigError, DataError

RecipeFile = Annotated[Path, Argument(metavar="RECIPE", help="A recipe: a YAML file.")]


def folder_of(given: Path) -> Path:
    """The folder that an argument means: a path, or a version of the library."""
    if given.exists() or not ("@" in given.name or "_v" in given.name):
        return given
    from molora.store.resolve import resolve

    return resolve(given)


RunFolder = Annotated[
    Path,
    Argument(
        metavar="RUN",
        help="A run folder, runs/<name>, an adapter folder, or NAME@ALIAS of the library.",
        callback=folder_of,
    ),
]
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


Prompts = Annotated[list[str] | None, Option("--prompt", help="A prompt; may be given several times.")]
PromptFile = Annotated[
    Path | None, Option("--file", help="A text file with a prompt in each line; - is the standard input.")
]


def read_prompts(prompts: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts of the options, then those of the file; empty lines are none."""
    given = list(prompts or ())
    if not given and file is None:
        raise ConfigError("no prompt.", hint="give --prompt TEXT, or --file FILE with one in each line.")
    if file is None:
        return given
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {file} cannot be read as UTF-8 text: {error}.") from error
    return [*given, *(line for line in text.splitlines() if line.strip())]


def weights_of(given: Iterable[str], what: str) -> dict[str, float]:
    """Texts `NAME` (weight 1) or `NAME=WEIGHT` as a map; ConfigError, which calls them `what`, for others."""
    found: dict[str, float] = {}
    for text in given:
        name, weighed, value = text.rpartition("=")
        try:
            weight = float(value) if weighed else 1.0
        except ValueError:
            raise ConfigError(f"{what} {text!r} is not NAME or NAME=WEIGHT, such as pig=0.5.") from None
        name = name if weighed else text
        if name in found or not isfinite(weight):
            raise ConfigError(f"{what} names {name!r} twice, or a weight that is not finite.")
        found[name] = weight
    return found


def check_parent(out: Path) -> None:
    """Raise ConfigError where the folder that a file is to be written into is not there."""
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: {out.parent} is not a folder.", hint="make it first")


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


def named(items: Sequence[str], value: str, example: str) -> dict[str, str]:
    """`NAME=VALUE` items as a map; ConfigError where one is not of that form or a name is there twice."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, given = item.partition("=")
        if not (name and equals and given):
            raise ConfigError(f"{item!r} is not NAME={value}, such as {example}.")
        if name in found:
            raise ConfigError(f"the name {name!r} is there twice.")
        found[name] = given
    return found
