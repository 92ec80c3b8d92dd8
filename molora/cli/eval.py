"""`molora eval`: score a trained run or adapter, with thresholds for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from molora.errors import ConfigError


def run(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    recipe: Path | None = None,
    out: Path | None = None,
    fail_under: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Score, print tables or JSON, and raise ThresholdError (exit 6) for a score below its floor."""
    floors = dict(_floor(text) for text in fail_under)

    from molora.evaluation.report import check_thresholds
    from molora.report.tables import console, print_report
    from molora.training.evaluate import evaluate

    report = evaluate(path, tasks=tasks, modes=modes, recipe=recipe, overrides=overrides, out=out)
    if as_json:
        console().print(report.to_json(), markup=False, end="", soft_wrap=True)
    else:
        print_report(report)
    check_thresholds(report, floors)


def _floor(text: str) -> tuple[str, float]:
    """`TASK=VALUE`, or `VALUE` for every task."""
    task, _, value = text.rpartition("=")
    try:
        return task or "*", float(value)
    except ValueError:
        raise ConfigError(
            f"--fail-under {text!r} is not VALUE or TASK=VALUE, such as 0.9 or mirror=0.9."
        ) from None
