"""`molora route`: which task each prompt belongs to, as the adapter's own router names it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from molora.cli.options import OtherBase, PromptFile, Prompts, RunFolder, read_prompts


def command(
    run: RunFolder,
    prompt: Prompts = None,
    file: PromptFile = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts read at once.")] = 16,
    allow_other_base: OtherBase = False,
) -> None:
    """Name the task of prompts: a line of JSON for each, with how likely every task is.

    Example: molora route runs/task_routed --prompt "shout(hello)="
    """
    prompts = read_prompts(prompt, file)

    from molora.models.build import load_trained
    from molora.models.task_router import route
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        model, tokenizer, config = load_trained(run, allow_other_base=allow_other_base)
        length = 512 if config is None else config.data.max_length
        found = route(model, tokenizer, prompts, batch_size=batch_size, max_length=length)
    for text, named in zip(prompts, found, strict=True):
        typer.echo(json.dumps({"prompt": text, **named._asdict()}, ensure_ascii=False))
