"""`molora presets`: the published methods there are settings for."""

from __future__ import annotations

import inspect

import typer
import yaml

from molora.config.presets import PRESETS, preset_settings, summary


def show_list() -> None:
    """Name and method of every preset."""
    for name in sorted(PRESETS):
        typer.echo(f"{name:20} {summary(name)}")


def show(name: str) -> None:
    """What a preset sets, as a recipe's `adapter` section, under its description."""
    settings = preset_settings(name, {})
    typer.echo("\n".join(f"# {line}".rstrip() for line in (inspect.getdoc(PRESETS[name]) or "").splitlines()))
    typer.echo(yaml.safe_dump({"adapter": settings}, sort_keys=False), nl=False)
