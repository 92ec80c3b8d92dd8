"""`molora kinds`: what an expert's own parameters can be."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated

import typer
from typer import Argument

from molora.cli.options import group
from molora.cli.presets import markdown

command = group("kinds", "List or show what an expert can be, by its paper and by what it trains.")


def _names() -> list[str]:
    from molora.config.choices import KINDS

    return list(KINDS)


Name = Annotated[str, Argument(metavar="NAME", autocompletion=_names)]


@command.command("list")
def show_list() -> None:
    """Name and parameters of every kind of expert."""
    from molora.config.choices import KINDS

    for name in KINDS:
        typer.echo(f"{name:14} {KINDS[name].about.trains}")


def table() -> str:
    """Every kind: what it trains, when to use it, its paper, as a Markdown table."""
    from molora.config.choices import KINDS

    rows = (
        (f"`{name}`", about.trains, about.when, about.paper)
        for name in KINDS
        for about in (KINDS[name].about,)
    )
    return markdown(("kind", "trains", "when to use it", "paper"), *rows)


@command.command("table")
def show_table() -> None:
    """Every kind as a Markdown table."""
    typer.echo(table())


@command.command()
def show(name: Name) -> None:
    """Print what a kind is, its paper, when to use it, and its settings with their defaults, for a recipe."""
    import yaml

    from molora.config.choices import KINDS

    found = KINDS[name.replace("-", "_")]
    lines = (inspect.getdoc(sys.modules[found.__module__]) or "").splitlines()
    lines += [
        "",
        f"Trains: {found.about.trains}.",
        f"When to use it: {found.about.when}.",
        f"Paper: {found.about.paper}.",
    ]
    if found.imports:
        lines.append(f"No LoRA can be imported into it: {found.imports}.")
    typer.echo("\n".join(f"# {line}".rstrip() for line in lines))
    settings = {"kind_settings": dict(found.settings)} if found.settings else {}
    shown = {"adapter": {"kind": name.replace("-", "_"), **settings}}
    typer.echo(yaml.safe_dump(shown, sort_keys=False), nl=False)
