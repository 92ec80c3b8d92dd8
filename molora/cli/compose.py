"""`molora compose`: a mixture out of ordinary LoRA folders; `molora export`: an expert as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from molora.errors import ConfigError


def run(
    base: str,
    loras: Sequence[str],
    out: Path,
    *,
    preset: str | None = None,
    fit: str | None = None,
    task_type: str = "CAUSAL_LM",
    dtype: str = "float32",
    tasks: Sequence[str] = (),
) -> None:
    """Compose, save the adapter, and say what was made."""
    folders = _named(loras, "FOLDER", "math=loras/math")
    served = {task: names.split(",") for task, names in _named(tasks, "EXPERT,...", "sums=math,code").items()}

    from molora.config import BaseConfig
    from molora.models.base import load_base
    from molora.store.adapter import save
    from molora.store.compose import compose
    from molora.training.environment import quiet_libraries

    if fit in ("average", "phatgoose"):
        raise ConfigError(
            f"--fit {fit} needs data of each expert.",
            hint='use Python: molora.compose(base, loras, fit="' + fit + '", data={expert: batches}).',
        )
    settings = BaseConfig.model_validate({"model": base, "task_type": task_type, "dtype": dtype})
    with quiet_libraries():
        model, _ = load_base(settings)
        mixed = compose(model, folders, preset=preset, fit=fit, task_type=task_type, tasks=served or None)
        save(mixed, out)
    config = mixed.active_peft_config
    typer.echo(
        f"{len(folders)} experts ({', '.join(folders)}), frozen, under a gate of scope {config.gate.scope}"
    )
    typer.echo(f"adapter: {out}")


def export(path: Path, out: Path, *, expert: str | None, task: str | None, fold_scaling: bool) -> None:
    """Write an expert, or a task's experts, as an ordinary LoRA folder."""
    from molora.models.build import load_trained
    from molora.store.lora_export import export_lora
    from molora.training.environment import quiet_libraries

    with quiet_libraries():
        model, _, _ = load_trained(path, device="cpu")
    export_lora(model, out, expert=expert, task=task, fold_scaling=fold_scaling)
    typer.echo(f"LoRA: {out}")


def _named(items: Sequence[str], value: str, example: str) -> dict[str, str]:
    """`NAME=VALUE` items as a map; ConfigError where one is not of that form or a name is there twice."""
    found: dict[str, str] = {}
    for item in items:
        name, equals, given = item.partition("=")
        if not (name and equals and given):
            raise ConfigError(f"{item!r} is not NAME={value}, such as {example}.")
        if name in found:
            raise ConfigError(f"the name {name!r} is there twice.")
        found[name] = given
    return found
