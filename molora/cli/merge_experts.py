"""`molora merge-experts`: one expert in place of several whose tasks turn out to be one skill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from molora.cli.options import OtherBase, RunFolder, check_out_of, weights_of


def command(
    run: RunFolder,
    experts: Annotated[list[str], Argument(metavar="NAME[=WEIGHT]...", help="Two or more experts to merge.")],
    into: Annotated[str, Option(metavar="NAME", help="What the new expert is called.")],
    out: Annotated[Path, Option(help="A folder for the adapter: new, empty, or written by molora.")],
    rank: Annotated[
        int | None, Option(min=1, help="Of the new expert; the sum of the experts' ranks loses nothing.")
    ] = None,
    allow_other_base: OtherBase = False,
) -> None:
    """Replace experts of a task gate by their weighted mean, which serves all of their tasks; other tasks stay bit-equal.

    Example: molora merge-experts runs/task_routed french german --into translation --out adapters/two
    """
    weights = weights_of(experts, "the expert")

    from molora.disk.card import CONFIG_FILE
    from molora.models.build import load_trained
    from molora.store.adapter import save
    from molora.training.environment import quiet_libraries

    check_out_of(run, out, mark=CONFIG_FILE)
    with quiet_libraries():
        model, _, _ = load_trained(run, device="cpu", allow_other_base=allow_other_base)
        model.merge_experts([*weights], into, weights=weights, rank=rank)
        save(model, out)
    served = [task for task, shares in model.tasks.items() if into in shares]
    typer.echo(f"{into}: the mean of {', '.join(weights)}, for {', '.join(served) or 'no task'}")
    typer.echo(f"adapter: {out}")
