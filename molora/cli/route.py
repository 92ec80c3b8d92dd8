"""`molora route`: which task each prompt belongs to, as the adapter's own router names it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from molora.cli.options import OtherBase, RunFolder
from molora.errors import ConfigError, DataError


def command(
    run: RunFolder,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="A text file with a prompt in each line; - is the standard input."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts read at once.")] = 16,
    allow_other_base: OtherBase = False,
) -> None:
    """Name the task of prompts: a line of JSON for each, with how likely every task is.

    Example: molora route runs/task_routed --prompt "shout(hello)="
    """
    prompts = _prompts(prompt or [], file)

    from molora.models.build import load_trained
    from molora.models.task_router import route
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        model, tokenizer, config = load_trained(run, allow_other_base=allow_other_base)
        length = 512 if config is None else config.data.max_length
        found = route(model, tokenizer, prompts, batch_size=batch_size, max_length=length)
    for text, named in zip(prompts, found, strict=True):
        typer.echo(json.dumps({"prompt": text, **named._asdict()}, ensure_ascii=False))


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the options, then those of the file; empty lines are none."""
    if not given and file is None:
        raise ConfigError(
            "no prompt to name.", hint="give --prompt TEXT, or --file FILE with one in each line."
        )
    if file is None:
        return given
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {file} cannot be read as UTF-8 text: {error}.") from error
    return [*given, *(line for line in text.splitlines() if line.strip())]
