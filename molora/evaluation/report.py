"""The result of an evaluation as plain data, to and from JSON and CSV, and the thresholds on it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora.config.suggest import options
from molora.config.types import fits, shown, type_problems
from molora.errors import AdapterError, ConfigError, ThresholdError
from molora.evaluation.counterfactual import Counterfactuals
from molora.evaluation.metrics import perplexity
from molora.evaluation.naming import Naming
from molora.evaluation.predictions import Prediction
from molora.evaluation.routing import STATISTICS, RoutingSummary
from molora.evaluation.similarity import Similarity

FORMAT = 1
LOWER_IS_BETTER = frozenset({"loss"})


@dataclass(frozen=True)
class Score:
    """One number: how `task` did in `mode` on `count` held-out records. A loss is in nats per token."""

    task: str
    mode: str
    metric: str
    value: float
    count: int

    def text(self) -> str:
        """For people: percent for shares, loss with its perplexity."""
        if self.metric in LOWER_IS_BETTER:
            return f"{self.value:.4f} (ppl {perplexity(self.value):.2f})"
        return f"{100 * self.value:.1f} %"


@dataclass
class Report:
    """Scores per task and mode, what the gates did, and whatever else is needed to read them later.

    before: the scores before an expert was added, else empty; added: the tasks it was added for. facts: named
    observations, not scores. naming: what the task router takes prompts for. similarity: how alike the experts are.
    counterfactuals: scores with experts changed, where asked for.
    notes: sentences for people, for instance why a mode was skipped. folder: where it was written, if it was; predictions:
    every record's answer; neither is kept.
    """

    scores: list[Score] = field(default_factory=list)
    before: list[Score] = field(default_factory=list)
    routing: RoutingSummary | None = None
    naming: Naming | None = None
    similarity: Similarity | None = None
    counterfactuals: Counterfactuals | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    folder: Path | None = field(default=None, compare=False)
    predictions: list[Prediction] = field(default_factory=list, compare=False, repr=False)

    @property
    def tasks(self) -> list[str]:
        """Task names in the order they were evaluated."""
        return list(dict.fromkeys(score.task for score in self.scores))

    @property
    def modes(self) -> list[str]:
        """Modes in the order they were run."""
        return list(dict.fromkeys(score.mode for score in self.scores))

    def score(self, task: str, mode: str) -> Score:
        """The score of one task in one mode; KeyError when it was not evaluated."""
        for score in self.scores:
            if (score.task, score.mode) == (task, mode):
                return score
        raise KeyError((task, mode))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. Perplexity, dead experts, specialisation are derived: written for readers, ignored when read."""
        plain = dataclasses.asdict(dataclasses.replace(self, folder=None, predictions=[]))
        del plain["folder"], plain["predictions"]
        for row in plain["scores"] + plain["before"]:
            if row["metric"] in LOWER_IS_BETTER:
                row["perplexity"] = perplexity(row["value"])
        dead = self.routing.dead_experts() if self.routing else []
        apart = self.routing.specialisation() if self.routing else None
        return _finite({"format": FORMAT, **plain, "dead_experts": dead, "specialisation": apart})

    def to_json(self) -> str:
        """Strict JSON (a value that is not finite becomes null), ending with a newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`. Raises AdapterError for a file that is not a report of this format."""
        try:
            data = json.loads(text)
            if data.get("format") != FORMAT:
                raise AdapterError(f"report format {data.get('format')!r}; this version reads {FORMAT}")
            routing = data["routing"]
            # Earlier reports have none of these.
            naming, alike, changed = (data.get(k) for k in ("naming", "similarity", "counterfactuals"))
            report = cls(
                scores=[_score(row) for row in data["scores"]],
                before=[_score(row) for row in data["before"]],
                added=data.get("added", []),
                routing=RoutingSummary(**routing) if routing else None,
                naming=Naming(**naming) if naming else None,
                similarity=Similarity(**alike) if alike else None,
                counterfactuals=Counterfactuals(**changed) if changed else None,
                facts=data["facts"],
                notes=data["notes"],
                environment=data["environment"],
            )
        except KeyError as error:
            raise AdapterError(
                f"not a molora report: it lacks {error}", hint="`molora eval RUN` makes one"
            ) from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterError(f"not a molora report: {type(error).__name__}: {error}") from error
        report._check_types()
        return report

    def _check_types(self) -> None:
        optional = self.routing, self.naming, self.similarity, self.counterfactuals
        parts = [self, *self.scores, *self.before, *[part for part in optional if part]]
        for part in parts:
            for name, message in type_problems(part, type(part)):
                raise AdapterError(f"not a molora report: {name}: {message}")
        for row in self.routing.gates if self.routing else ():
            numbers = {name: row.get(name) for name in STATISTICS}
            if not fits(numbers, dict[str, float]) or not fits(row.get("expert"), str) or "layer" not in row:
                raise AdapterError(
                    f"not a molora report: routing.gates: {shown(row)} is not statistics of a gate."
                )

    def to_csv(self) -> str:
        """One line per score: task,mode,metric,value,count; led by `stage` if there is a "before"."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = ["task", "mode", "metric", "value", "count"]
        writer.writerow(["stage", *head] if self.before else head)
        for stage, scores in (("before", self.before), ("after", self.scores)):
            for score in scores:
                row = dataclasses.astuple(score)
                writer.writerow([stage, *row] if self.before else row)
        return out.getvalue()


@dataclass(frozen=True)
class Difference:
    """One task and mode before and after; `before` is None for a task that did not exist."""

    task: str
    mode: str
    metric: str
    before: float | None
    after: float

    @property
    def change(self) -> float | None:
        """after - before, or None when there is nothing to compare with."""
        return None if self.before is None else self.after - self.before


def differences(before: Sequence[Score], after: Sequence[Score]) -> list[Difference]:
    """Pair the scores of two evaluations by task and mode, in the order of the later one."""
    old = {(score.task, score.mode): score.value for score in before}
    return [Difference(s.task, s.mode, s.metric, old.get((s.task, s.mode)), s.value) for s in after]


def check_thresholds(report: Report, floors: Mapping[str, float], *, mode: str | None = None) -> None:
    """Raise ThresholdError listing every score below its floor.

    floors: task name -> smallest allowed value (0..1); the name "*" stands for every task whose metric is
    a share. mode: which scores count; default the first mode the report has. Raises ConfigError as `check_floors`.
    """
    mode = mode or next(iter(report.modes), None)
    by_task = {score.task: score for score in report.scores if score.mode == mode}
    check_floors(floors, {task: score.metric for task, score in by_task.items()})
    missed = []
    for task, score in by_task.items():
        floor = floors.get(task, floors.get("*"))
        # written so that a NaN misses its floor too
        if floor is not None and score.metric not in LOWER_IS_BETTER and not score.value >= floor:
            missed.append(f"{task}: {score.metric} {score.value:.4f} < {floor:g}")
    if missed:
        raise ThresholdError(f"below the threshold in mode {mode!r}:\n  " + "\n  ".join(missed))


def check_floors(floors: Mapping[str, float], metrics: Mapping[str, str]) -> None:
    """Raise ConfigError for floors that no evaluation of these tasks (by name, their metric) could be compared with."""
    for task, floor in floors.items():
        if not 0 <= floor <= 1:
            raise ConfigError(
                f"--fail-under {floor:g} is not a share, from 0 to 1.",
                hint=f"{floor:g} % is {floor / 100:g}." if 1 < floor <= 100 else None,
            )
        if task == "*":
            continue
        if task not in metrics:
            raise ConfigError(f"--fail-under names the task {task!r}.{options(task, metrics, 'Tasks')}")
        if metrics[task] in LOWER_IS_BETTER:
            raise ConfigError(f"--fail-under needs a score that grows with quality; {task!r} has a loss")


def _score(row: Mapping[str, Any]) -> Score:
    value = math.nan if row["value"] is None else row["value"]
    return Score(row["task"], row["mode"], row["metric"], value, row["count"])


def _finite(value: Any) -> Any:
    """The same nested value with floats that JSON cannot carry replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
