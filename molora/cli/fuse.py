"""`molora fuse`: several experts as one ordinary LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from molora.cli.options import OtherBase, folder_of, named
from molora.errors import ConfigError


def command(
    sources: Annotated[
        list[str], Argument(metavar="NAME=FOLDER...", help="Experts: LoRA folders, adapter folders or runs.")
    ],
    out: Annotated[Path, Option(help="A folder for the LoRA: new, empty, or written by molora.")],
    method: Annotated[
        str,
        Option(help="linear, svd, task_arithmetic, ties, dare, dare_ties, magnitude or core_space."),
    ] = "linear",
    weight: Annotated[
        list[str] | None, Option(metavar="NAME=WEIGHT", help="Of each source; may be negative.")
    ] = None,
    rank: Annotated[str | None, Option(metavar="N|full", help="Cut every layer to this rank.")] = None,
    expert: Annotated[
        list[str] | None, Option(metavar="NAME=EXPERT", help="Which expert of a run is meant.")
    ] = None,
    task: Annotated[
        list[str] | None, Option(metavar="NAME=TASK", help="The experts of this task of a run.")
    ] = None,
    density: Annotated[float | None, Option(help="Share of entries kept (ties, dare, magnitude).")] = None,
    sign: Annotated[str | None, Option(help="total or frequency: how signs are elected (ties).")] = None,
    seed: Annotated[int | None, Option(help="Of what dare drops.")] = None,
    inner: Annotated[str | None, Option(help="The method in the core space.")] = None,
    heads: Annotated[str | None, Option(metavar="NAME", help="The source whose heads go along.")] = None,
    base: Annotated[str | None, Option(help="Check layers and shapes against this model.")] = None,
    task_type: Annotated[str, Option(help="CAUSAL_LM, SEQ_2_SEQ_LM or SEQ_CLS, of --base.")] = "CAUSAL_LM",
    allow_other_base: OtherBase = False,
) -> None:
    """Make one LoRA of several, exact on products: ranks, alphas, scaling rules and targets may differ.

    Example: molora fuse words=loras/words sums=runs/sums --expert sums=sums --method ties --out loras/both
    """
    folders = {n: folder_of(Path(f)) for n, f in named(sources, "FOLDER", "words=loras/words").items()}
    shares = _numbers(weight)
    settings: dict[str, Any] = {"density": density, "sign": sign, "seed": seed, "inner": inner}
    limit = _rank(rank)

    from molora.config import BaseConfig
    from molora.fusion.fuse import fuse
    from molora.models.base import base_skeleton
    from molora.training.environment import quiet_libraries

    skeleton = None
    with quiet_libraries():
        if base is not None:
            skeleton = base_skeleton(BaseConfig.model_validate({"model": base, "task_type": task_type}))
        done = fuse(
            skeleton,
            folders,
            out=out,
            method=method,
            weights=shares,
            rank=limit,
            experts=named(expert or (), "EXPERT", "sums=additions"),
            tasks=named(task or (), "TASK", "sums=addition"),
            heads=heads,
            allow_other_base=allow_other_base,
            **{key: value for key, value in settings.items() if value is not None},
        )
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    cut = f", {100 * done.lost:.2g} % of the norm cut off" if done.lost > 1e-6 else ""
    typer.echo(f"{len(folders)} experts by {method}: {done.layers} layers, {ranks}{cut}")
    typer.echo(f"LoRA: {done.path}")


def _numbers(items: Sequence[str] | None) -> dict[str, float] | None:
    if not items:
        return None
    found = {}
    for name, text in named(items, "WEIGHT", "words=0.7").items():
        try:
            found[name] = float(text)
        except ValueError:
            raise ConfigError(f"--weight {name}={text!r} is no number.", hint="such as words=0.7") from None
    return found


def _rank(text: str | None) -> Any:
    if text is None or text == "full":
        return text
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"--rank {text!r}; allowed: a whole number from 1, or full.")
    return int(text)
