"""`molora pull`: an adapter from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


def command(
    repo: Annotated[str, Argument(metavar="REPO", help="A repository of the hub, such as me/spelling.")],
    out: Annotated[Path, Option(help="A folder for the adapter: new, empty, or written by molora.")],
    revision: Annotated[str | None, Option(help="A branch, tag or commit.")] = None,
) -> None:
    """Download an adapter or a LoRA; every file is checked against its manifest. `molora library add` gives it a name.

    Example: molora pull me/spelling --out adapters/spelling
    """
    from molora.store.hub_copy import pull
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        folder = pull(repo, out, revision=revision)
    typer.echo(f"adapter: {folder}")
