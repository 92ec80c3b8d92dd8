"""Scores of lm-evaluation-harness, out of what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from molora.evaluation.modes import MODE_TITLES


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one of the harness's tasks. mode: who decided, as `gate`, `task legal`, `base`."""

    task: str
    metric: str
    mode: str
    value: float
    stderr: float | None
    count: int | None

    def text(self) -> str:
        """For people: `0.412 ± 0.031`, one standard error."""
        return f"{self.value:.3f}" if self.stderr is None else f"{self.value:.3f} ± {self.stderr:.3f}"


def scores_of(results: Mapping[str, Any], mode: str) -> Iterator[HarnessScore]:
    """The rows of its `results`, which call a metric `acc,none` and its error `acc_stderr,none`; a group has its own row."""
    for task, row in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in row.items():
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{how}")
            named = metric if how == "none" else f"{metric} ({how})"
            error = float(stderr) if isinstance(stderr, int | float) else None
            yield HarnessScore(task, named, mode, float(value), error, count)


def titled(mode: str) -> str:
    """The mode as reports call it."""
    kind, _, route = mode.partition(" ")
    return MODE_TITLES[kind] if not route else f"as {route}"
