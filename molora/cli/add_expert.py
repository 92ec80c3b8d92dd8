"""`molora add-expert`: one more expert for a new task, in a new run, and every task before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from molora.cli.options import OtherBase, Overrides, RunFolder, say_reach, show_run
from molora.errors import ConfigError

SOURCES = {".jsonl": "jsonl", ".gz": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def command(
    run: RunFolder,
    overrides: Overrides = None,
    recipe: Annotated[Path | None, Option(help="A recipe of the new task and its training.")] = None,
    task: Annotated[str | None, Option(help="The new task's name, where there is no recipe.")] = None,
    data: Annotated[Path | None, Option(help="Its training records: .jsonl, .csv, .parquet.")] = None,
    eval_data: Annotated[Path | None, Option(help="Its held-out records.")] = None,
    synthetic: Annotated[str | None, Option(help="A synthetic generator instead of --data.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the latest run of this growth.")] = False,
    allow_other_base: OtherBase = False,
) -> None:
    """Add an expert for a new task; the old ones stay as they are.

    Example: molora add-expert runs/quickstart --task loud --synthetic loud train.max_steps=60
    """
    source = _source(recipe, task, data, eval_data, synthetic)

    from molora.config import DataConfig, load_grow
    from molora.config.reach import data_reach

    new = load_grow(source, overrides or []).task
    say_reach(data_reach(DataConfig(tasks={new.name: new.as_task()})))

    from molora.continual.grow import add_expert

    grown = add_expert(run, source, overrides or [], resume=resume or None, allow_other_base=allow_other_base)
    show_run(grown.path)


def _source(
    recipe: Path | None, task: str | None, data: Path | None, eval_data: Path | None, synthetic: str | None
) -> Path | dict[str, Any]:
    """The recipe file, or a recipe made of the options."""
    if recipe is not None:
        if task or data or eval_data or synthetic:
            others = "--task, --data, --eval-data and --synthetic"
            raise ConfigError(f"--recipe describes the task; leave out {others}.")
        return recipe
    if task is None or (data is None) == (synthetic is None):
        hint = "give --recipe FILE, or --task NAME with --data FILE or --synthetic GENERATOR."
        raise ConfigError("say which task to add.", hint=hint)
    if synthetic is not None:
        return {"task": {"name": task, "source": "synthetic", "generator": synthetic}}
    assert data is not None
    if data.suffix not in SOURCES:
        raise ConfigError(f"--data {data}: its ending is not one of {', '.join(SOURCES)}.")
    files = {"train": str(data)} | ({"eval": str(eval_data)} if eval_data is not None else {})
    return {"task": {"name": task, "source": SOURCES[data.suffix], **files}}
