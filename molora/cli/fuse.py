"""`molora fuse`: several experts as one ordinary LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from molora.cli.options import OtherBase, folder_of, named
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.fusion.lora_out import Fused


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
    search: Annotated[
        str | None, Option(help="Find the weights of a sum on held-out records: grid, lorahub or optuna.")
    ] = None,
    recipe: Annotated[
        Path | None, Option(help="Of the base and the tasks whose held-out records --search uses.")
    ] = None,
    step: Annotated[float, Option(help="Of the grid.")] = 0.1,
    trials: Annotated[int, Option(help="Of lorahub and optuna.")] = 40,
    records: Annotated[int, Option(min=1, help="Most held-out records of a task that --search uses.")] = 64,
    table: Annotated[
        Path | None, Option(metavar="FILE.csv", help="Write every trial, and their curve beside it.")
    ] = None,
    allow_other_base: OtherBase = False,
) -> None:
    """Make one LoRA of several, exact on products: ranks, alphas, scaling rules and targets may differ.

    Example: molora fuse words=loras/words sums=runs/sums --expert sums=sums --method ties --out loras/both
    """
    folders = {n: folder_of(Path(f)) for n, f in named(sources, "FOLDER", "words=loras/words").items()}
    shares = _numbers(weight)
    settings: dict[str, Any] = {"density": density, "sign": sign, "seed": seed, "inner": inner}
    limit = _rank(rank)

    from molora.fusion.fuse import fuse
    from molora.training.environment import quiet_libraries

    parts = named(expert or (), "EXPERT", "sums=additions"), named(task or (), "TASK", "sums=addition")
    with quiet_libraries():
        if search is not None:
            _check_search(method, shares, recipe)
            assert recipe is not None
            how = {"step": step, "trials": trials, "records": records, "allow_other_base": allow_other_base}
            shares = _found(recipe, folders, parts, table, search=search, seed=seed or 0, **how)
            settings["seed"] = None
        done = fuse(
            _skeleton(base, task_type),
            folders,
            out=out,
            method=method,
            weights=shares,
            rank=limit,
            experts=parts[0],
            tasks=parts[1],
            heads=heads,
            allow_other_base=allow_other_base,
            **{key: value for key, value in settings.items() if value is not None},
        )
    if len(folders) == 1:
        typer.echo(
            "there is one expert alone, so nothing is fused: it is written as it is, at its weight", err=True
        )
    typer.echo(f"{len(folders)} expert{'s' if len(folders) > 1 else ''} by {method}: {_told(done)}")
    typer.echo(f"LoRA: {done.path}")


def _told(done: Fused) -> str:
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    cut = f", {100 * done.lost:.2g} % of the norm cut off" if done.lost > 1e-6 else ""
    return f"{done.layers} layers, {ranks}{cut}"


def _skeleton(base: str | None, task_type: str) -> Any:
    """The base without weights, where it is named."""
    from molora.config import BaseConfig
    from molora.models.base import base_skeleton

    given = {"model": base, "task_type": task_type}
    return None if base is None else base_skeleton(BaseConfig.model_validate(given))


def _check_search(method: str, weights: dict[str, float] | None, recipe: Path | None) -> None:
    if method not in ("linear", "svd", "task_arithmetic"):
        raise ConfigError(
            f"--search finds the weights of a sum, and --method {method} is none.", hint="use linear or svd."
        )
    if weights is not None:
        raise ConfigError("--weight and --search both say what the weights are.", hint="give one of them.")
    if recipe is None:
        raise ConfigError(
            "--search needs --recipe, which names the base and the tasks with held-out records."
        )


def _found(
    recipe: Path, folders: Any, parts: tuple[Any, Any], table: Path | None, **how: Any
) -> dict[str, float]:
    """The weights of the search, told and written."""
    from molora.config import load_recipe
    from molora.disk.atomic import write_file
    from molora.fusion.search import find_weights
    from molora.models.base import load_base
    from molora.models.build import labels_of_tasks, tasks_of
    from molora.report.plots import plot_loss

    config = load_recipe(recipe)
    tasks = tasks_of(config)
    base, tokenizer = load_base(config.base, labels_of_tasks(config.base, tasks))
    how |= {"max_length": config.data.max_length, "batch_size": config.eval.batch_size}
    found = find_weights(base, tokenizer, folders, tasks, experts=parts[0], parts=parts[1], **how)
    if table is not None:
        write_file(table, found.to_csv().encode())
        plot_loss(table, table.with_suffix(".png"), ["loss", "score"])
        typer.echo(f"trials: {table}")
    weights = ", ".join(f"{name}={weight:.3g}" for name, weight in found.weights.items())
    typer.echo(f"best of {len(found.trials)} trials: {weights}, loss {found.best.loss:.4f}")
    typer.echo(f"equal weights: loss {found.equal.loss:.4f}")
    return found.weights


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
