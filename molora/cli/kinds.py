"""`molora kinds`: what an expert's own parameters can be."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

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


# Settings that not every kind goes with: what they are called, and an adapter that has them.
_SETTINGS: dict[str, dict[str, Any]] = {
    "combine: factors": {"combine": "factors", "gate": {"kind": "sequence"}},
    "share_A": {"share_A": True},
    "task_cores": {"task_cores": True, "share_A": True, "gate": {"kind": "task_table"}},
    "ffn_targets": {"ffn_targets": ["up_proj", "down_proj"], "target_modules": ["up_proj", "down_proj"]},
    "init: svd_segments": {"init": "svd_segments"},
}


def _goes_with(name: str, settings: dict[str, Any]) -> bool:
    from molora.config.adapter import AdapterConfig
    from molora.config.choices import KINDS
    from molora.config.load import load_section
    from molora.errors import ConfigError

    losses = {"aux_losses": {"orthonormal": 0.1}} if KINDS[name].orthonormal else {}
    try:
        load_section(AdapterConfig, {"target_modules": ["up_proj"], **losses, **settings, "kind": name})
    except ConfigError:
        return False
    return True


def fits() -> str:
    """Which kinds go with what not all of them go with, as a Markdown table."""
    from molora.config.choices import KINDS
    from molora.config.federated import AGGREGATORS, aggregate_problems
    from molora.config.mixture import Mixture

    def marks(name: str) -> list[bool]:
        kind, mixture = KINDS[name], Mixture(kind=name)
        rounds = any(not [*aggregate_problems(way, mixture)] for way in AGGREGATORS)
        return [
            *(_goes_with(name, settings) for settings in _SETTINGS.values()),
            kind.imports is None, kind.grows, rounds,
        ]  # fmt: skip

    head = ("kind", *(f"`{setting}`" for setting in _SETTINGS), "import a LoRA", "`rank_growth`", "federate")
    return markdown(
        head, *((f"`{name}`", *("yes" if mark else "no" for mark in marks(name))) for name in KINDS)
    )


@command.command("fits")
def show_fits() -> None:
    """Which kinds go with settings that not all of them go with, as a Markdown table."""
    typer.echo(fits())


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
