"""`molora merge-experts`: a new run with one expert in place of several, and every task before and after."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from molora.cli.options import OtherBase, RunFolder, show_run, weights_of


def command(
    run: RunFolder,
    experts: Annotated[list[str], Argument(metavar="NAME[=WEIGHT]...", help="Two or more experts to merge.")],
    into: Annotated[str, Option(metavar="NAME", help="What the new expert is called.")],
    rank: Annotated[
        int | None, Option(min=1, help="Of the new expert; the sum of the experts' ranks loses nothing.")
    ] = None,
    allow_other_base: OtherBase = False,
) -> None:
    """Replace experts of a task gate by their weighted mean, which serves all of their tasks; other tasks stay bit-equal.

    Example: molora merge-experts runs/task_routed vowels letters --into characters
    """
    weights = weights_of(experts, "the expert")

    from molora.continual.merge_experts import merge_experts

    made = merge_experts(run, [*weights], into, weights=weights, rank=rank, allow_other_base=allow_other_base)
    show_run(made.path)
