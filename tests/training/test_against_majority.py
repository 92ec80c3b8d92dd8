"""A classification that is no better than one answer to everything is named, with what to try."""

from __future__ import annotations

from dataclasses import replace

import pytest

from molora.data.tasks import Task
from molora.evaluation.report import Report, Score
from molora.training.evaluate import against_majority

TRAIN = [{"text": str(i), "label": "no" if i < 6 else "yes"} for i in range(10)]
HELD_OUT = [{"text": str(i), "label": "no" if i < 60 else "yes"} for i in range(100)]
TASK = Task("mood", 0, TRAIN, HELD_OUT, kind="classification", labels=("yes", "no"))


def report(value: float, mode: str = "gate", metric: str = "accuracy") -> Report:
    return Report(scores=[Score("mood", mode, metric, value, 100)])


@pytest.mark.parametrize(
    ("value", "named"), [(0.55, True), (0.60, True), (0.68, True), (0.69, False), (1.0, False)]
)
def test_within_chance_of_the_majority(value: float, named: bool) -> None:
    said = against_majority(report(value), TASK)  # 60 % are `no`; 1.645 standard errors more are 68.06 %
    assert (said is not None) == named
    if said is not None:
        assert said.startswith(f"mood: {100 * value:.1f} % is no better than always saying 'no' (60.0 %)")
        assert "base.head: match" in said


def test_where_it_says_nothing() -> None:
    assert against_majority(report(0.1, mode="base"), TASK) is None  # the base is not what was trained
    assert against_majority(report(0.1, metric="loss"), TASK) is None
    assert against_majority(Report(), TASK) is None
    assert (
        against_majority(report(0.1), Task("mood", 0, TRAIN, HELD_OUT, prompt="{text}", target="{label}"))
        is None
    )
    matched = against_majority(report(0.1), replace(TASK, classes=(0, 1)))
    assert matched is not None and "head" not in matched
