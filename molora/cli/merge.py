"""`molora merge`: the base with a static mixture in its weights, as a plain transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from molora.cli.options import OtherBase, RunFolder, check_out_of, weights_of
from molora.errors import ConfigError


def command(
    run: RunFolder,
    out: Annotated[Path, Option(help="A folder for the model: new, empty, or written by molora.")],
    task: Annotated[str | None, Option(help="The experts of this task (under a task gate).")] = None,
    expert: Annotated[
        list[str] | None,
        Option(metavar="NAME[=WEIGHT]", help="This expert, with this weight (1); may be repeated."),
    ] = None,
    allow_other_base: OtherBase = False,
) -> None:
    """Write the model with its experts merged in, and its tokenizer: molora is not needed to load it.

    Weights must not depend on the input: those of a task, of a constant gate, or of the experts named here.

    Example: molora merge runs/task_routed --task capitals --out models/capitals
    """
    weights = weights_of(expert or (), "--expert")
    if task is not None and weights:
        raise ConfigError("--task and --expert both say what is merged.", hint="give one of them.")

    from molora.disk.atomic import write_folder
    from molora.models.build import load_trained
    from molora.training.environment import quiet_libraries
    from molora.tuner.merge import UndecidedError

    check_out_of(run, out, mark="config.json")
    with quiet_libraries():
        model, tokenizer, config = load_trained(run, device="cpu", allow_other_base=allow_other_base)
        if config is not None and config.base.head == "match":
            raise ConfigError(
                "a head that matches texts of labels is molora's own: a merged model could not be loaded without it.",
                hint="export the experts as LoRAs of the encoder, or train with base.head: own.",
            )
        try:
            plain = model.merge_and_unload(task=task, expert_weights=weights or None)
        except UndecidedError as error:
            if task is not None or weights:
                raise
            hint = "say what is merged: --expert NAME=WEIGHT (may be repeated), or under a task gate --task NAME."
            raise ConfigError(error.message, hint=hint) from error
        size = sum(tensor.nbytes for tensor in plain.state_dict().values())
        with write_folder(out, size=size) as folder:
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    typer.echo(f"model: {out}")
