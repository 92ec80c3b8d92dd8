"""`molora recipes`: the recipes that come with the package."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import typer

from molora.config.suggest import did_you_mean
from molora.disk.atomic import write_file
from molora.errors import ConfigError


def available() -> dict[str, Traversable]:
    """Name -> recipe file, sorted. They are installed as molora/recipes; a checkout has them at its top."""
    installed = files("molora").joinpath("recipes")
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
    found = {
        entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")
    }
    return dict(sorted(found.items()))


def find(name: str) -> Traversable:
    """One recipe; ConfigError naming the others where there is none of that name."""
    recipes = available()
    name = name.removesuffix(".yaml")
    if name not in recipes:
        raise ConfigError(f"no recipe {name!r}.{did_you_mean(name, recipes)} Recipes: {', '.join(recipes)}.")
    return recipes[name]


def show_list() -> None:
    """Name and purpose of every recipe; the purpose is its second line."""
    width = max(map(len, available()))
    for name, entry in available().items():
        purpose = entry.read_text(encoding="utf-8").splitlines()[1].lstrip("# ")
        typer.echo(f"{name:{width}} {purpose}")


def show(name: str) -> None:
    """Print a recipe as it is."""
    typer.echo(find(name).read_text(encoding="utf-8"), nl=False)


def copy(name: str, to: Path, *, force: bool = False) -> None:
    """Copy a recipe into a folder, or to a file name; an existing file is kept unless `force`."""
    recipe = find(name)
    target = to / recipe.name if to.is_dir() else to
    if target.exists() and not force:
        raise ConfigError(f"{target} exists.", hint="give another name, or pass --force to replace it")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder.")
    write_file(target, recipe.read_bytes())
    typer.echo(str(target))
