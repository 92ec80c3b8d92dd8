"""`molora compose`: a mixture out of ordinary LoRA folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from molora.cli.options import folder_of, named
from molora.errors import ConfigError


def command(
    base: Annotated[str, Argument(metavar="BASE", help="The model the LoRAs were trained on.")],
    loras: Annotated[list[str], Argument(metavar="NAME=FOLDER...", help="Experts, each a LoRA folder.")],
    out: Annotated[Path, Option(help="A folder for the adapter: new, empty, or written by molora.")],
    preset: Annotated[str | None, Option(help="A method for the gate: xlora, arrow, ...")] = None,
    fit: Annotated[str | None, Option(help="Set the gate without training: arrow or uniform.")] = None,
    task: Annotated[
        list[str] | None, Option(metavar="NAME=EXPERT,...", help="A task and its experts.")
    ] = None,
    task_type: Annotated[str, Option(help="CAUSAL_LM, SEQ_2_SEQ_LM or SEQ_CLS.")] = "CAUSAL_LM",
    dtype: Annotated[str, Option(help="float32, bfloat16 or float16, of the base.")] = "float32",
) -> None:
    """Make a mixture of LoRAs that PEFT saved, of any ranks and targets; they stay exactly as they are.

    Example: molora compose Qwen/Qwen2.5-0.5B math=loras/math code=loras/code --preset arrow --fit arrow --out mix
    """
    folders = {n: folder_of(Path(f)) for n, f in named(loras, "FOLDER", "math=loras/math").items()}
    tasks = named(task or (), "EXPERT,...", "sums=math,code")
    served = {name: experts.split(",") for name, experts in tasks.items()}

    from molora.config import BaseConfig
    from molora.disk.card import CONFIG_FILE
    from molora.disk.out_folder import check_out
    from molora.models.base import load_base
    from molora.store.adapter import save
    from molora.store.compose import compose
    from molora.training.environment import quiet_libraries

    if fit in ("average", "phatgoose"):
        hint = f'use Python: molora.compose(base, loras, fit="{fit}", data={{expert: batches}}).'
        raise ConfigError(f"--fit {fit} needs data of each expert.", hint=hint)
    check_out(out, base, *folders.values(), mark=CONFIG_FILE)
    settings = BaseConfig.model_validate({"model": base, "task_type": task_type, "dtype": dtype})
    with quiet_libraries():
        model, _ = load_base(settings)
        mixed = compose(model, folders, preset=preset, fit=fit, task_type=task_type, tasks=served or None)
        save(mixed, out)
    scope = mixed.active_peft_config.gate.scope
    typer.echo(f"{len(folders)} experts ({', '.join(folders)}), frozen, under a gate of scope {scope}")
    typer.echo(f"adapter: {out}")
