"""`molora schema`: the JSON schema of recipes, for editors."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from typer import Argument


class Kind(StrEnum):
    """What a YAML file of molora can be."""

    recipe = "recipe"
    growth = "growth"


def command(
    kind: Annotated[
        Kind, Argument(help="What `train`, `continual` and `federate` read, or what `add-expert` does.")
    ] = Kind.recipe,
) -> None:
    """Print the JSON schema that editors complete and check recipes by.

    Example: molora schema > recipe.schema.json
    """
    from molora.config.json_schema import schema

    typer.echo(json.dumps(schema(kind.value), indent=2, ensure_ascii=False))
