"""`molora tokens`: which expert each token of a prompt and its answer meets, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from molora.cli.generate import Chat, Length, Task
from molora.cli.options import AsJson, OtherBase, RunFolder, check_parent
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.evaluation.tokens import TokenView

_SHOWN = 6  # layers that fit a terminal, evenly spaced


def command(
    run: RunFolder,
    prompt: Annotated[str, Option("--prompt", help="The text to look at.")],
    answer: Annotated[
        bool, Option("--answer/--no-answer", help="Let it answer, and look at that too.")
    ] = True,
    task: Task = None,
    chat: Chat = None,
    max_new_tokens: Length = 32,
    out: Annotated[Path | None, Option(help="An HTML file with all layers.")] = None,
    as_json: AsJson = False,
    allow_other_base: OtherBase = False,
) -> None:
    """Show the expert with the largest weight for each token, layer by layer.

    Example: molora tokens runs/quickstart --prompt "pig(hello)="
    """
    if out is not None and out.exists():
        raise ConfigError(f"{out} exists.", hint="name another file with --out")
    if out is not None:
        check_parent(out)
    from molora.disk.atomic import write_file
    from molora.report.tokens import tokens_page
    from molora.serving.speaker import Search, open_speaker
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        speaker = open_speaker(run, task=task, chat=chat, allow_other_base=allow_other_base)
        speaker.choose(task=task)
        view = speaker.look(prompt, Search(max_new_tokens) if answer else None)
    if out is not None:
        write_file(out, tokens_page(view, title=f"molora: {prompt}").encode())
    if as_json:
        typer.echo(
            json.dumps(
                {"tokens": view.tokens, "experts": view.experts, "weights": view.weights}, ensure_ascii=False
            )
        )
    else:
        _show(view)
    if out is not None:
        typer.echo(str(out))


def _show(view: TokenView) -> None:
    from molora.report.tables import console, token_table

    layers = list(view.weights)
    step = max(1, -(-len(layers) // _SHOWN))
    console().print(token_table(view, layers[::step]))
    if step > 1:
        typer.echo(f"every {step}th of {len(layers)} layers; --json and --out have all")
