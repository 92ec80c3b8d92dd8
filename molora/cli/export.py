"""`molora export`: an expert, or a task's experts, as an ordinary LoRA folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from molora.cli.options import OtherBase, RunFolder, check_out_of


def command(
    run: RunFolder,
    out: Annotated[Path, Option(help="A folder for the LoRA: new, empty, or written by molora.")],
    expert: Annotated[str | None, Option(help="This expert alone.")] = None,
    task: Annotated[str | None, Option(help="The experts of this task.")] = None,
    fold_scaling: Annotated[
        bool, Option("--fold-scaling", help="For engines that read only r and lora_alpha.")
    ] = False,
    allow_other_base: OtherBase = False,
) -> None:
    """Write an expert as an ordinary LoRA that PEFT loads without molora.

    Example: molora export runs/task_routed --expert capitals --out loras/capitals
    """
    from molora.disk.card import CONFIG_FILE
    from molora.models.build import load_trained
    from molora.store.lora_export import export_lora
    from molora.training.environment import quiet_libraries

    check_out_of(run, out, mark=CONFIG_FILE)
    with quiet_libraries():
        model, _, _ = load_trained(run, device="cpu", allow_other_base=allow_other_base)
    export_lora(model, out, expert=expert, task=task, fold_scaling=fold_scaling)
    typer.echo(f"LoRA: {out}")
