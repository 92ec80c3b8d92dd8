"""`molora eval`: score a trained run or adapter, with thresholds for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from molora.cli.options import AsJson, OtherBase, Overrides, RunFolder
from molora.errors import ConfigError


def command(
    run: RunFolder,
    overrides: Overrides = None,
    task: Annotated[list[str] | None, Option(help="Score this task only; may be repeated.")] = None,
    mode: Annotated[list[str] | None, Option(help="gate, task or base; may be repeated.")] = None,
    recipe: Annotated[Path | None, Option(help="Data and settings other than the run's own.")] = None,
    checkpoint: Annotated[
        int | None, Option(metavar="N", help="Score the run as it was after step N; default its end.")
    ] = None,
    out: Annotated[Path | None, Option(help="Folder for the report.")] = None,
    fail_under: Annotated[
        list[str] | None, Option(metavar="[TASK=]VALUE", help="Exit 6 below this score, 0 to 1.")
    ] = None,
    what_if: Annotated[
        int | None,
        Option(
            min=1,
            metavar="RECORDS",
            help="Also score so many records of each task with each expert alone and left out.",
        ),
    ] = None,
    as_json: AsJson = False,
    allow_other_base: OtherBase = False,
) -> None:
    """Score a trained mixture: with the gate alone, by task id, and the base only.

    Example: molora eval runs/quickstart --task pig --fail-under 0.9
    """
    given = [_floor(text) for text in fail_under or ()]
    floors = dict(given)
    if len(floors) < len(given):
        raise ConfigError("--fail-under gives a task two thresholds.", hint="give each task one.")

    from molora.evaluation.report import check_thresholds
    from molora.report.tables import console, print_report
    from molora.training.evaluate import evaluate

    report = evaluate(
        run,
        tasks=task,
        modes=mode,
        recipe=recipe,
        overrides=overrides or [],
        out=out,
        allow_other_base=allow_other_base,
        floors=floors,
        what_if=what_if,
        checkpoint=checkpoint,
    )
    if as_json:
        console().print(report.to_json(), markup=False, end="", soft_wrap=True)
    else:
        print_report(report)
        if report.folder is not None:
            console().print(f"report: {report.folder / 'report.html'}", markup=False, soft_wrap=True)
    check_thresholds(report, floors)


def _floor(text: str) -> tuple[str, float]:
    """`TASK=VALUE`, or `VALUE` for every task."""
    task, _, value = text.rpartition("=")
    try:
        return task or "*", float(value)
    except ValueError:
        example = "such as 0.9 or mirror=0.9"
        raise ConfigError(f"--fail-under {text!r} is not VALUE or TASK=VALUE, {example}.") from None
