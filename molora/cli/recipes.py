"""`molora recipes`: the recipes that come with the package, and the keys that any recipe may have."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from molora.cli.options import group
from molora.config.suggest import options
from molora.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

command = group("recipes", "List, show or copy the recipes that come with molora; list every key.")


def available() -> dict[str, Traversable]:
    """Name -> recipe file, sorted. They are installed as molora/recipes; a checkout has them at its top."""
    from importlib.resources import files

    installed = files("molora").joinpath("recipes")
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
    entries = (entry for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return dict(sorted((entry.name.removesuffix(".yaml"), entry) for entry in entries))


Name = Annotated[str, Argument(metavar="NAME", autocompletion=lambda: list(available()))]


def find(name: str) -> Traversable:
    """One recipe; ConfigError naming the others where there is none of that name."""
    recipes = available()
    name = name.removesuffix(".yaml")
    if name not in recipes:
        raise ConfigError(f"no recipe {name!r}.{options(name, recipes, 'Recipes')}")
    return recipes[name]


@command.command("list")
def show_list() -> None:
    """One line per recipe."""
    recipes = available()
    width = max(map(len, recipes))
    for name, entry in recipes.items():
        purpose = entry.read_text(encoding="utf-8").splitlines()[1].lstrip("# ")  # the second line says it
        typer.echo(f"{name:{width}} {purpose}")


@command.command()
def show(name: Name) -> None:
    """Print a recipe."""
    typer.echo(find(name).read_text(encoding="utf-8"), nl=False)


@command.command()
def copy(
    name: Name,
    to: Annotated[Path, Argument(metavar="[DEST]", help="A folder or a file.", show_default=False)] = Path(),
    force: Annotated[bool, Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from molora.disk.atomic import write_file

    recipe = find(name)
    target = to / recipe.name if to.is_dir() else to
    if target.exists() and not force:
        raise ConfigError(f"{target} exists.", hint="give another name, or pass --force to replace it")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder.")
    write_file(target, recipe.read_bytes())
    typer.echo(str(target))


@command.command()
def keys(
    section: Annotated[
        str | None, Argument(metavar="[SECTION]", help="One section, as adapter.gate.", show_default=False)
    ] = None,
    as_markdown: Annotated[bool, Option("--markdown", help="As the tables of docs/recipes.md.")] = False,
) -> None:
    """Every key of a recipe: what may be written, the default, what it means."""
    from molora.config.keys import markdown, parts

    if as_markdown:
        typer.echo(markdown())
        return
    found = [part for part in parts() if section in (None, part.path)]
    if not found:
        named = [part.path for part in parts() if part.path]
        raise ConfigError(f"no section {section!r}.{options(section, named, 'Sections')}")
    for part in found:
        typer.echo(f"{part.path or 'the top of a recipe'}: {part.about}")
        for key in part.keys:
            typer.echo(f"  {key.name}: {key.takes}; default {key.default}".replace("`", ""))
            for line in textwrap.wrap(key.means, 92):
                typer.echo(f"      {line}")
        typer.echo("")
