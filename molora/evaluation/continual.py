"""The accuracy matrix of tasks learned one after another, and what it says: average accuracy, forgetting, transfer.

`a[i, j]` is the accuracy on task j after the i-th task was learned, i = 0 is the base before any. Of T tasks.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any


@dataclass
class TurnScores:
    """Scores of tasks (columns) after each turn (rows), those of the base first.

    base: scores of the base alone, None where they were not measured.
    rows: one per turn so far; None in a row: not measured, as for a task that is still unknown.
    """

    tasks: list[str]
    base: list[float | None] = field(default_factory=list)
    rows: list[list[float | None]] = field(default_factory=list)

    @property
    def turn_names(self) -> list[str]:
        """What was learned in each turn."""
        raise NotImplementedError

    def turns(self) -> list[tuple[str, list[float | None]]]:
        """Every row with its name, that of the base first where it was measured."""
        base = [("base", self.base)] if self.base else []
        return [*base, *zip(self.turn_names, self.rows, strict=True)]

    def to_csv(self) -> str:
        """One line per turn; a score that was not measured is empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["after", *self.tasks])
        writer.writerows([name, *row] for name, row in self.turns())  # None is written as nothing
        return out.getvalue()


@dataclass
class StageScores(TurnScores):
    """The scores after each of these stages, of which each may learn several tasks."""

    stages: list[str] = field(default_factory=list)

    @property
    def turn_names(self) -> list[str]:
        """The stages so far."""
        return self.stages[: len(self.rows)]


@dataclass
class AccuracyMatrix(TurnScores):
    """Turns that learn one task each, in the order of the columns.

    joint: all tasks were learned at once, so there is one row, and nothing to forget.
    """

    joint: bool = False

    @property
    def turn_names(self) -> list[str]:
        """What was learned in each turn."""
        return ["all tasks"] if self.joint else self.tasks[: len(self.rows)]

    def average_accuracy(self) -> float:
        """AA: mean accuracy on the tasks seen, after the last turn."""
        seen = len(self.tasks) if self.joint else len(self.rows)
        return fmean(self._known(self.rows[-1][:seen]))

    def learning_accuracy(self) -> float:
        """LA: mean accuracy on each task right after it was learned, `mean a[i, i]`."""
        return fmean(self._known([row[i] for i, row in enumerate(self.rows)]))

    def forgetting(self) -> float:
        """Mean over old tasks of the best accuracy they ever had before the last turn minus the last; 0 for one task."""
        last = len(self.rows) - 1
        best = [max(self._known([row[j] for row in self.rows[:last]])) for j in range(last)]
        drops = [before - self._at(last, j) for j, before in enumerate(best)]
        return fmean(drops) if drops else 0.0

    def backward_transfer(self, over_all: bool = False) -> float:
        """BWT: sum of `a[T, i] - a[i, i]` over old tasks, divided by T - 1 (SLAO) or with `over_all` by T (SAPT)."""
        last = len(self.rows) - 1
        if last == 0:
            return 0.0
        changes = [self._at(last, j) - self._at(j, j) for j in range(last)]
        return sum(changes) / (last + 1 if over_all else last)

    def forward_transfer(self) -> float | None:
        """FWT: mean of `a[i-1, i] - a[0, i]`: what earlier tasks did for one before it was learned; None if unmeasured."""
        gains = [
            now - before
            for j in range(1, len(self.rows))
            if (now := self.rows[j - 1][j]) is not None and self.base and (before := self.base[j]) is not None
        ]
        return fmean(gains) if gains else None

    def summary(self) -> dict[str, float | None]:
        """Every number above by its short name; of joint training only AA."""
        if self.joint:
            return {"AA": self.average_accuracy()}
        return {
            "AA": self.average_accuracy(),
            "LA": self.learning_accuracy(),
            "forgetting": self.forgetting(),
            "BWT (T-1)": self.backward_transfer(),
            "BWT (T)": self.backward_transfer(over_all=True),
            "FWT": self.forward_transfer(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the summary once there is a row."""
        return {**asdict(self), **({"summary": self.summary()} if self.rows else {})}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> AccuracyMatrix:
        """The inverse of `to_dict`."""
        return cls(plain["tasks"], plain["base"], plain["rows"], plain["joint"])

    def _at(self, turn: int, task: int) -> float:
        value = self.rows[turn][task]
        return math.nan if value is None else value

    @staticmethod
    def _known(values: Sequence[float | None]) -> list[float]:
        return [value for value in values if value is not None]
