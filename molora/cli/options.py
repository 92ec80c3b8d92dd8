"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, runs/<name>, or an adapter folder.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c]...", help="Settings that replace the recipe's.", show_default=False),
]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the recipe's latest run.")]
ResumeFrom = Annotated[Path | None, typer.Option("--resume-from", metavar="RUN", help="Go on with this run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
