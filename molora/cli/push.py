"""`molora push`: an adapter to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer
from typer import Argument, Option

from molora.cli.options import RunFolder


def command(
    run: RunFolder,
    repo: Annotated[str, Argument(metavar="REPO", help="A repository of the hub, such as me/spelling.")],
    private: Annotated[bool, Option("--private", help="If it is made now, only you see it.")] = False,
    revision: Annotated[str | None, Option(help="A branch that is there.")] = None,
    message: Annotated[str | None, Option(help="Of the commit.")] = None,
) -> None:
    """Upload the adapter of a run, an adapter, a LoRA, or a version of the library, as one commit.

    Example: molora push spelling@stable me/spelling
    """
    from molora.store.hub_copy import push
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        where = push(run, repo, private=private, revision=revision, message=message)
    typer.echo(f"pushed: {where}")
