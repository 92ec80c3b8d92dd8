"""`molora eval`: score a trained run or adapter, with thresholds for scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from molora.cli.options import AsJson, OtherBase, Overrides, RunFolder
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.evaluation.report import Report

WhatIf = Annotated[
    int | None,
    Option(
        min=1,
        metavar="RECORDS",
        help="Also score so many records of each task with each expert alone and left out.",
    ),
]
Shapley = Annotated[
    bool,
    Option(
        "--shapley", help="With --what-if: how much of each score every expert accounts for; up to 8 experts."
    ),
]
Predictions = Annotated[
    bool,
    Option("--predictions", help="Write every answer, and the experts it used, as predictions.jsonl."),
]
Examples = Annotated[
    int | None,
    Option(
        min=0,
        metavar="N",
        help="Show N right and N wrong answers of a task; default 3 where they are short.",
    ),
]
LmEval = Annotated[
    str | None,
    Option(
        "--lm-eval",
        metavar="NAMES",
        help="Score these tasks of lm-evaluation-harness instead, as `arc_easy,piqa` (extra lm-eval).",
    ),
]
LmEvalTasks = Annotated[
    Path | None, Option("--lm-eval-tasks", metavar="DIR", help="Tasks of your own, in its YAML.")
]
Limit = Annotated[
    int | None, Option(min=1, metavar="N", help="Of --lm-eval: only the first N documents of a task.")
]

SHOWN = 3  # right and wrong answers of a task
SHORT, FEW = 100, 30  # characters of a line, and lines, that are shown unasked


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
    what_if: WhatIf = None,
    shapley: Shapley = False,
    predictions: Predictions = False,
    examples: Examples = None,
    lm_eval: LmEval = None,
    lm_eval_tasks: LmEvalTasks = None,
    limit: Limit = None,
    as_json: AsJson = False,
    allow_other_base: OtherBase = False,
) -> None:
    """Score a trained mixture: with the gate alone, by task id, and the base only.

    Example: molora eval runs/quickstart --task pig --fail-under 0.9
    """
    if lm_eval is not None:
        others = {
            "--mode": mode, "--recipe": recipe, "--checkpoint": checkpoint, "--out": out, "--what-if": what_if,
            "--shapley": shapley,
            "--fail-under": fail_under, "--predictions": predictions, "--examples": examples, "a.b=c": overrides,
        }  # fmt: skip
        _refuse_beside_lm_eval(others)
        _with_lm_eval(run, lm_eval, task, lm_eval_tasks, limit, as_json, allow_other_base)
        return
    if lm_eval_tasks is not None or limit is not None:
        raise ConfigError("--lm-eval-tasks and --limit belong to --lm-eval.", hint="--lm-eval arc_easy, say.")
    if shapley and what_if is None:
        raise ConfigError("--shapley belongs to --what-if.", hint="--what-if 50 --shapley, say.")
    given = [_floor(text) for text in fail_under or ()]
    floors = dict(given)
    if len(floors) < len(given):
        raise ConfigError("--fail-under gives a task two thresholds.", hint="give each task one.")

    from molora.evaluation.predictions import PREDICTIONS_FILE
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
        shapley=shapley,
        checkpoint=checkpoint,
        predictions=predictions,
    )
    if as_json:
        console().print(report.to_json(), markup=False, end="", soft_wrap=True)
    else:
        print_report(report)
        _show_examples(report, examples)
        if report.folder is not None:
            console().print(f"report: {report.folder / 'report.html'}", markup=False, soft_wrap=True)
            if predictions:
                console().print(
                    f"predictions: {report.folder / PREDICTIONS_FILE}", markup=False, soft_wrap=True
                )
    check_thresholds(report, floors)


def _refuse_beside_lm_eval(options: Mapping[str, object]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(
            f"--lm-eval scores other data than the run's own: {', '.join(given)} has no meaning beside it.",
            hint="--task NAME says whose experts answer; --limit, --lm-eval-tasks and --json go with it.",
        )


def _with_lm_eval(
    run: Path,
    names: str,
    routes: list[str] | None,
    include_path: Path | None,
    limit: int | None,
    as_json: bool,
    allow_other_base: bool,
) -> None:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ConfigError("--lm-eval names no task.", hint="such as --lm-eval arc_easy,piqa")

    import json
    from dataclasses import asdict

    from molora.report.tables import console, harness_table
    from molora.training.lm_eval import evaluate_with_lm_eval

    scores, file = evaluate_with_lm_eval(
        run,
        wanted,
        routes=routes or (),
        include_path=include_path,
        limit=limit,
        allow_other_base=allow_other_base,
    )
    if as_json:
        text = json.dumps([asdict(score) for score in scores], indent=1)
        console().print(text, markup=False, soft_wrap=True)
        return
    console().print(harness_table(scores))
    console().print(f"scores: {file}", markup=False, soft_wrap=True)


def _show_examples(report: Report, most: int | None) -> None:
    """Some right and wrong answers of each task; by default only where they fit a line and are few."""
    from molora.evaluation.predictions import examples
    from molora.report.tables import console, example_lines

    chosen = examples(report.predictions, SHOWN if most is None else most)
    lines = [line for kept in chosen.values() for line in example_lines(kept)]
    if most is None and (len(lines) > FEW or max(map(len, lines), default=0) > SHORT):
        return
    to = console()
    for line in lines:
        to.print(line, markup=False, soft_wrap=True)


def _floor(text: str) -> tuple[str, float]:
    """`TASK=VALUE`, or `VALUE` for every task."""
    task, _, value = text.rpartition("=")
    try:
        return task or "*", float(value)
    except ValueError:
        example = "such as 0.9 or mirror=0.9"
        raise ConfigError(f"--fail-under {text!r} is not VALUE or TASK=VALUE, {example}.") from None
