"""`molora rank`: a short training tells which layers need experts, or how much rank each of them needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from molora.cli.options import Overrides, RecipeFile, check_parent, say_reach
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.training.rank_probe import LayerShare


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    method: Annotated[
        str, Option(help="drop: leave out layers that add little. sensitivity: a rank for each layer.")
    ] = "drop",
    steps: Annotated[int, Option(min=1, help="Optimiser steps of the short training.")] = 60,
    keep: Annotated[
        float, Option(min=0.01, max=1.0, help="drop: the share of what all layers add that is kept.")
    ] = 0.9,
    most: Annotated[int | None, Option(min=1, help="sensitivity: the largest rank; by default 2 r.")] = None,
    out: Annotated[Path | None, Option(metavar="FILE", help="Write the recipe with it, a new file.")] = None,
) -> None:
    """Measure a recipe's layers in a short training, and print the part of its `adapter` section that follows.

    Nothing of the training is kept.

    Example: molora rank recipes/quickstart.yaml --method drop --out smaller.yaml
    """
    import yaml

    from molora.config import load_recipe
    from molora.config.grow import is_grow
    from molora.config.load import recipe_text
    from molora.config.reach import reach

    if is_grow(recipe):
        raise ConfigError(f"{recipe} adds an expert to a trained run.", hint="give the recipe of a new run.")
    if out is not None:
        check_parent(out)
        if out.exists():
            raise ConfigError(f"--out {out} is there already.", hint="choose another file, or remove it.")
    config = load_recipe(recipe, overrides or [])
    say_reach(reach(config))

    from molora.disk.atomic import write_file
    from molora.training.rank_probe import dealt, kept, probe

    layers = probe(config, method, steps)
    part: dict[str, Any]
    if method == "drop":
        part = {"target_modules": kept(layers, keep)}
    else:
        part = {"rank_pattern": dealt(layers, most or 2 * max(layer.rank for layer in layers))}
    _show(layers, part)
    typer.echo(yaml.safe_dump({"adapter": part}, sort_keys=False, width=200), nl=False)
    if out is not None:
        plain = config.model_dump(mode="json")
        plain["adapter"] |= part
        if method == "drop":  # the layers are named one by one
            plain["adapter"] |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
        write_file(out, recipe_text(load_recipe(plain)).encode())
        typer.echo(f"recipe: {out}")


def _show(layers: list[LayerShare], part: dict[str, Any]) -> None:
    """Each layer's share and what becomes of it, and the parameters of all experts before and after."""
    from rich.table import Table

    from molora.report.tables import console

    total = sum(layer.value for layer in layers)
    ranks = {
        layer.key: part["rank_pattern"][layer.key]
        if "rank_pattern" in part
        else layer.rank * (layer.key in part["target_modules"])
        for layer in layers
    }
    table = Table("layer", "share", "rank", "becomes", box=None)
    for layer in sorted(layers, key=lambda one: -one.value):
        becomes = str(ranks[layer.key]) if ranks[layer.key] else "no experts"
        table.add_row(layer.key, f"{layer.value / total:.1%}", str(layer.rank), becomes)
    to = console()
    to.print(table)
    before = sum(layer.numbers for layer in layers)
    after = round(sum(layer.numbers * ranks[layer.key] / layer.rank for layer in layers))
    to.print(f"parameters of the experts: {before:,} -> {after:,} ({after / before:.0%})")
