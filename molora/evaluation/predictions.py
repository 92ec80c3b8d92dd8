"""What a model said to every held-out record: kept in memory by an evaluation, and as JSON lines on wish."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from molora.data.records import read_lines
from molora.data.render import render
from molora.data.tasks import Task
from molora.errors import AdapterError, DataError
from molora.evaluation.metrics import METRICS, Result

PREDICTIONS_FILE = "predictions.jsonl"


@dataclass(frozen=True)
class Prediction:
    """One record's answer in one mode.

    record: its place among the task's held-out records. answer: what it should have been; prediction: what was said, None
    where that names no label, where the metric is the loss of the answer, and where several answers were drawn. right: all of
    it; None for a loss and for several answers. score: the metric's value for this record alone, over `count` things (tokens
    of the answer for a loss, else 1). experts: mean gate weight over the record's tokens and all gates, None where it was not
    recorded.
    """

    task: str
    mode: str
    record: int
    prompt: str
    answer: str
    prediction: str | None
    right: bool | None
    score: float
    count: int = 1
    experts: dict[str, float] | None = None
    text: str | None = None  # what was written, where the prediction is the label that it names
    drawn: Sequence[tuple[str, bool]] | None = None  # several answers: each, and whether it is right


def predictions(
    task: Task, mode: str, results: Sequence[Result], experts: Mapping[int, dict[str, float]] | None = None
) -> list[Prediction]:
    """The results of one task in one mode, with their texts."""
    found = []
    for result in results:
        prompt, answer = render(task, task.eval[result.record])
        graded = task.metric == "loss" or result.drawn is not None
        score = METRICS[task.metric](result) / max(result.count, 1)
        found.append(
            Prediction(
                task.name, mode, result.record, prompt, answer, _said(task, result),
                None if graded else score > 1 - 1e-9, score, result.count,
                None if experts is None else experts.get(result.record), result.text, result.drawn,
            )
        )  # fmt: skip
    return found


def _said(task: Task, result: Result) -> str | None:
    """A classifier's class as the label it stands for; a text as it is."""
    if not isinstance(result.prediction, int):
        return result.prediction
    place = task.classes.index(result.prediction) if task.classes else result.prediction
    return task.labels[place] if place < len(task.labels) else None


def to_jsonl(found: Iterable[Prediction]) -> str:
    """One JSON object a line; a score that is not finite is null."""
    lines = []
    for prediction in found:
        plain = asdict(prediction)
        plain["score"] = prediction.score if math.isfinite(prediction.score) else None
        lines.append(json.dumps(plain, ensure_ascii=False, allow_nan=False))
    return "".join(line + "\n" for line in lines)


def from_jsonl(path: Path) -> list[Prediction]:
    """The inverse of `to_jsonl`; AdapterError for a file that is not of this form."""
    found = []
    try:
        for _, line in read_lines(path):  # no records: what a model writes may have NULs
            plain: dict[str, Any] = json.loads(line)
            plain["score"] = math.nan if plain["score"] is None else float(plain["score"])
            found.append(Prediction(**plain))
    except KeyError as error:
        raise AdapterError(f"{path} is not a file of predictions: a record lacks {error}.") from error
    except (DataError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} is not a file of predictions: {error}") from error
    return found


def examples(found: Sequence[Prediction], most: int) -> dict[str, list[Prediction]]:
    """Up to `most` right and as many wrong answers of each task in the first mode."""
    chosen: dict[str, list[Prediction]] = {}
    modes = [prediction.mode for prediction in found]
    for prediction in (answer for one in found for answer in _answers(one)):
        if prediction.mode == modes[0] and prediction.right is not None:
            same = chosen.setdefault(prediction.task, [])
            if sum(other.right == prediction.right for other in same) < most:
                same.append(prediction)
    return {task: sorted(kept, key=lambda p: not p.right) for task, kept in chosen.items()}


def _answers(one: Prediction) -> list[Prediction]:
    """The answer to one record; of several that were drawn, the first right and the first wrong one."""
    if one.drawn is None:
        return [one]
    first = {right: text for text, right in reversed(one.drawn)}
    return [replace(one, prediction=text, right=right, drawn=None) for right, text in first.items()]
