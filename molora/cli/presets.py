"""`molora presets`: the published methods there are settings for."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument

from molora.cli.options import group

if TYPE_CHECKING:
    from molora.config import AdapterConfig

command = group("presets", "List or show the published methods a recipe can name.")


@command.command("list")
def show_list() -> None:
    """Name and method of every preset."""
    from molora.config.presets import PRESETS, summary

    for name in sorted(PRESETS):
        typer.echo(f"{name:20} {summary(name)}")


def table() -> str:
    """Every preset on the axes, as a Markdown table."""
    from molora.config.presets import PRESETS

    head = ("preset", "gate reads", "one per", "score", "select", "experts", "on", "combined as", "losses")
    return markdown(head, *(_row(name) for name in sorted(PRESETS)))


def releases() -> str:
    """Every preset's paper and release, as a Markdown table."""
    from molora.config.presets import RELEASES

    rows = (
        (f"`{name}`", release.paper, release.where, str(len(release.differs)))
        for name, release in sorted(RELEASES.items())
    )
    return markdown(("preset", "paper", "release", "differences"), *rows)


def markdown(head: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


@command.command("table")
def show_table() -> None:
    """Every preset on the axes of a mixture, then its paper and release, as Markdown tables."""
    typer.echo(f"{table()}\n\n{releases()}")


def _row(name: str) -> tuple[str, ...]:
    from molora.config import AdapterConfig

    adapter = AdapterConfig.model_validate({"preset": name})
    gate = adapter.gate
    score = gate.score + (f" ({gate.norm})" if gate.score == "cosine" else "")
    score += " + bias" if gate.bias else ""
    score = f"absolute {score}" if gate.absolute else score
    reads = gate.scope + (f" + {gate.blend}" if gate.blend != "none" else "")
    select = f"{gate.transform}, {gate.select}"
    select += {"top_k": f" {gate.top_k}", "top_p": f" {gate.top_p}"}.get(gate.select, "")
    select += f", renorm {gate.renorm}" if gate.renorm not in (None, "none") else ""
    select += f", noise {gate.noise}" if gate.noise else ""
    combined = adapter.combine + (f" in {gate.splits} parts" if gate.splits > 1 else "")
    combined = "whole feed-forwards" if adapter.ffn_targets else combined
    combined += ", one A" if adapter.share_A else ""
    always = [expert for expert, weight in adapter.always_on.items() if weight == "rest"]
    combined += "".join(f", {expert} always on" for expert in always)
    combined += ", starts subtracted" if adapter.init == "svd_segments" else ""
    return (
        f"`{name}`", reads, gate.share, score, select, f"{adapter.num_experts} x r={adapter.r}", _where(adapter),
        combined, ", ".join(adapter.aux_losses) or "none",
    )  # fmt: skip


def _where(adapter: AdapterConfig) -> str:
    from molora.config.presets.target_patterns import ATTENTION, FEED_FORWARD, OUTPUTS, QUERY_VALUE

    names = {
        FEED_FORWARD: "feed-forward", ATTENTION: "attention", QUERY_VALUE: "query, value", "all-linear": "all linears",
    }  # fmt: skip
    found = names.get(str(adapter.target_modules), str(adapter.target_modules))
    plain = {ATTENTION: "attention", OUTPUTS: "outputs"}.get(str(adapter.plain_targets))
    return f"{found}; plain LoRA on {plain}" if plain else found


def _names() -> list[str]:
    from molora.config.presets import PRESETS

    return sorted(PRESETS)


@command.command()
def show(name: Annotated[str, Argument(metavar="NAME", autocompletion=_names)]) -> None:
    """Print what a preset sets, its paper and release, where it differs from that, and how that was trained."""
    import yaml

    from molora.config.presets import preset_settings

    settings = preset_settings(name, {})
    typer.echo("\n".join(f"# {line}".rstrip() for line in _about(name.replace("-", "_"))))
    typer.echo(yaml.safe_dump({"adapter": settings}, sort_keys=False), nl=False)


def _about(name: str) -> Iterator[str]:
    """Description, release, differences and training of a preset, as lines."""
    import yaml

    from molora.config.presets import PRESETS, RELEASES

    release = RELEASES[name]
    yield from (inspect.getdoc(PRESETS[name]) or "").splitlines()
    yield from ("", f"Paper: {release.paper}.", f"Release: {release.where}.")
    if release.differs:
        yield "Differs from it:"
    for sentence in release.differs:
        yield from textwrap.wrap(
            sentence, 116, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        )
    if release.train:
        yield "It was trained so; a recipe's own `train` section decides here:"
        yield from yaml.safe_dump({"train": dict(release.train)}, sort_keys=False).splitlines()
