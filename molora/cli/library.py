"""`molora library`: adapters by name, in versions that never change and under aliases that move."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from molora.cli.options import AsJson, RunFolder, group

if TYPE_CHECKING:
    from molora.store.library import Library

command = group("library", "Name, version, promote and roll back adapters.")

Where = Annotated[
    Path | None,
    Option("--library", metavar="DIR", help="The library; else MOLORA_LIBRARY, else ./library.", show_default=False),
]  # fmt: skip
Name = Annotated[str, Argument(metavar="NAME", help="An adapter's name, such as medical_diagnosis.")]
Reference = Annotated[
    str, Argument(metavar="VERSION", help="NAME@ALIAS, NAME@v2, NAME@latest, or a version's whole name.")
]
Alias = Annotated[str, Option("--alias", help="Which alias.")]
Expect = Annotated[str | None, Option(metavar="VERSION", help="Only if the alias means this version so far.")]


def _library(where: Path | None) -> Library:
    from molora.store.library import Library
    from molora.store.resolve import default_library

    return Library(where or default_library())


@command.command()
def add(
    source: RunFolder,
    name: Name,
    parent: Annotated[
        list[str] | None, Option(metavar="VERSION", help="What it was made of; may be repeated.")
    ] = None,
    note: Annotated[str, Option(help="A sentence to keep with it.")] = "",
    library: Where = None,
) -> None:
    """Copy a run, an adapter or a LoRA folder in as the next version of a name.

    Example: molora library add runs/quickstart spelling
    """
    version, new = _library(library).add(source, name, parents=parent or (), note=note)
    typer.echo(f"{version.label}{'' if new else ' (it was there already)'}")


@command.command("list")
def show_list(
    name: Annotated[
        str | None, Argument(metavar="[NAME]", help="This adapter only.", show_default=False)
    ] = None,
    library: Where = None,
    as_json: AsJson = False,
) -> None:
    """Every version, its aliases, mean score and parents.

    Example: molora library list
    """
    from rich.table import Table

    from molora.report.tables import console

    shelf = _library(library)
    rows = []
    for each in [name] if name is not None else shelf.names():
        aliases = shelf.aliases(each)
        for version in shelf.versions(each):
            label = str(version.label)
            mine = [alias for alias, at in aliases.items() if at == label]
            rows.append({**version.facts, "aliases": mine})
    if as_json:
        keys = ("label", "aliases", "added", "sha256", "parents", "scores", "note")
        _print_json([{key: row.get(key) for key in keys} for row in rows])
        return
    table = Table("version", "aliases", "mean score", "made of", "content", box=None)
    for row in rows:
        score = _mean(row.get("scores"))
        table.add_row(
            row["label"], ", ".join(row["aliases"]), score, ", ".join(row["parents"]), row["sha256"][:12]
        )
    console().print(table)


@command.command()
def show(reference: Reference, library: Where = None) -> None:
    """What is known of one version, after comparing its files with what was added.

    Example: molora library show spelling@stable
    """
    version = _library(library).find(reference)
    version.verify()
    _print_json({**version.facts, "folder": str(version.folder)})


@command.command()
def tag(
    reference: Reference,
    alias: Annotated[str, Argument(metavar="ALIAS", help="A new alias, such as canary.")],
    library: Where = None,
) -> None:
    """Give a version a new alias; promote moves an alias that is there.

    Example: molora library tag spelling@v2 canary
    """
    version = _library(library).tag(reference, alias)
    typer.echo(f"{version.label.name}@{alias} means {version.label}")


@command.command()
def promote(
    reference: Reference, alias: Alias = "stable", expect: Expect = None, library: Where = None
) -> None:
    """Let an alias mean this version, if nobody has moved it meanwhile.

    Example: molora library promote spelling@canary --alias stable --expect v1
    """
    version = _library(library).promote(reference, alias, expect=expect)
    typer.echo(f"{version.label.name}@{alias} means {version.label}")


@command.command()
def rollback(name: Name, alias: Alias = "stable", expect: Expect = None, library: Where = None) -> None:
    """Let an alias mean again what it meant before its last move.

    Example: molora library rollback spelling
    """
    version = _library(library).rollback(name, alias, expect=expect)
    typer.echo(f"{name}@{alias} means {version.label}")


@command.command()
def diff(
    before: Reference,
    after: Annotated[str, Argument(metavar="VERSION", help="The later version.")],
    library: Where = None,
) -> None:
    """Settings, scores and routing of two versions, side by side.

    Example: molora library diff spelling@stable spelling@canary
    """
    from rich.markup import escape
    from rich.table import Table

    from molora.evaluation.version_diff import version_diff
    from molora.report.tables import console, difference_table

    shelf = _library(library)
    old, new = shelf.find(before), shelf.find(after)
    found = version_diff(old, new)
    to = console()
    table = Table("setting", str(old.label), str(new.label), box=None)
    for name, one, other in found.settings:
        table.add_row(*(escape(str(value)) for value in (name, one, other)))
    to.print(table if found.settings else "no setting differs", soft_wrap=True)
    if found.scores:
        to.print(difference_table(found.scores))
    if found.drift:
        moved = Table("gates' weight that moved", "share", box=None)
        for what, share in found.drift.items():
            moved.add_row(escape(what), f"{100 * share:.1f} %")
        to.print(moved)


@command.command()
def remove(
    reference: Annotated[str, Argument(metavar="VERSION", help="NAME@v2, a version's whole name, or NAME.")],
    alias: Annotated[
        str | None, Option("--alias", help="Forget this alias of NAME, and no version.", show_default=False)
    ] = None,
    yes: Annotated[bool, Option("--yes", help="Remove; without it, only say what would be.")] = False,
    library: Where = None,
) -> None:
    """Delete a version that no alias means, or forget an alias.

    Example: molora library remove spelling@v1
    """
    from molora.errors import ConfigError

    shelf = _library(library)
    if alias is not None:
        shelf.remove_alias(reference, alias)
        typer.echo(f"{reference}@{alias} is no more")
        return
    if "@" not in reference and reference in shelf.names():
        raise ConfigError(f"{reference} is an adapter with versions.", hint=f"name one: {reference}@v1")
    version = shelf.find(reference)
    if not yes:
        typer.echo(f"{version.path}: nothing was removed, --yes does.")
        return
    shelf.remove(reference)
    typer.echo(f"removed {version.label}")


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _mean(scores: Any) -> str:
    values = [
        row["value"] for row in scores or () if row["mode"] == scores[0]["mode"] and row["metric"] != "loss"
    ]
    return f"{100 * sum(values) / len(values):.1f} %" if values and None not in values else ""
