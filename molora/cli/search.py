"""`molora search`: settings that score best for their size, found by training a recipe under many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from molora.cli.options import Overrides, RecipeFile, say_reach
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.training.search import Tried


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    trials: Annotated[int, Option(min=1, help="How many there shall be in all.")] = 12,
    space: Annotated[
        Path | None, Option(metavar="FILE", help="YAML: dotted keys, each with choices or a range.")
    ] = None,
    cost: Annotated[
        float, Option(min=0.0, help="What twice the trained parameters must gain in score.")
    ] = 0.01,
    mode: Annotated[str, Option(help="How trials are scored: gate or task.")] = "gate",
    out: Annotated[
        Path | None, Option(metavar="DIR", help="The search's folder; default <output>/<name>-search.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the search in that folder.")] = False,
) -> None:
    """Train a recipe under other ranks, targets, rates, numbers of experts and gates, and write out the best.

    The recipe itself is the first trial, and with smaller ranks the next ones. Scores are of held-out records, which the search
    selects on: keep others for the last word. Needs the extra `search`.

    Example: molora search recipes/quickstart.yaml --trials 12
    """
    from molora.config import load_recipe
    from molora.config.grow import is_grow
    from molora.config.reach import reach
    from molora.config.search_space import default_space, read_space

    if is_grow(recipe):
        raise ConfigError(f"{recipe} adds an expert to a trained run.", hint="give the recipe of a new run.")
    if mode not in ("gate", "task"):
        raise ConfigError(f"--mode {mode} is not one of gate, task.")
    config = load_recipe(recipe, overrides or [])
    tried = default_space(config) if space is None else read_space(space)
    say_reach(reach(config))

    from molora.training.search import BEST, TABLE, Search

    folder = out or Path(config.output) / f"{config.name}-search"
    found = Search(config, tried, folder, trials, cost, mode).run(resume=resume)
    _show(found)
    typer.echo(f"all trials: {folder / TABLE}")
    if found[0].value is not None:
        typer.echo(f"best recipe: {folder / BEST}")


def _show(found: list[Tried]) -> None:
    from rich.table import Table

    from molora.report.tables import console
    from molora.training.search import short

    table = Table("trial", "value", "score", "parameters", "settings", box=None)
    for one in found:
        numbers = [
            "-" if one.value is None else f"{one.value:.4f}",
            "-" if one.score is None else f"{one.score:.4f}",
        ]
        size = one.state if one.parameters is None else f"{one.parameters:,}"
        settings = ", ".join(f"{key.split('.')[-1]} {short(value)}" for key, value in one.values.items())
        table.add_row(str(one.number), *numbers, size, settings)
    console().print(table)
