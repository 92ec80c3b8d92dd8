"""evaluate_tasks: every task in every mode, scored by its metric, with what the gates did meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.calls.statistics import RoutingRecord
from molora.config.suggest import did_you_mean
from molora.data.clusters import inference
from molora.data.tasks import Task
from molora.errors import ConfigError
from molora.evaluation.modes import MODE_TITLES, MODES, in_mode, usable_modes
from molora.evaluation.predictions import Prediction, predictions
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import summarise
from molora.evaluation.score import AfterBatch, Limits, score_task
from molora.progress import phase
from molora.tuner.api import record_routing


def evaluate_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[Task],
    *,
    modes: Sequence[str] = MODES,
    limits: Limits | None = None,
    experts: bool = False,
) -> Report:
    """Score a PEFT model with a molora adapter on the held-out records of each task.

    modes: `gate` (no task ids: the gate alone decides, or the adapter's task router), `task` (routed by the task's id), `base`
    (the adapter switched off). A mode the adapter cannot run is skipped with a note. Routing is recorded in the first mode
    that uses the adapter. The report's `predictions` hold every record's answer; `experts`: with the experts it used.

    Raises ConfigError for an unknown mode, or a task the adapter does not know (mode `task`); DataError for a
    task without held-out records.
    """
    tasks = list(tasks)
    modes, notes = usable_modes(model, modes)
    unknown = [task.name for task in tasks if "task" in modes and task.name not in model.tasks]
    if unknown:
        known = ", ".join(model.tasks) or "none"
        meant = did_you_mean(unknown[0], model.tasks)
        raise ConfigError(
            f"unknown task {unknown[0]!r}.{meant} Known tasks: {known}.",
            hint="mode `task` gives the adapter a task's id: leave it out (eval.modes=[gate, base]; molora eval --mode gate).",
        )
    limits = limits or Limits()
    recorded_mode = next((mode for mode in modes if mode != "base"), None)
    scores: list[Score] = []
    recorded: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    found: list[Prediction] = []
    total = len(modes) * sum(len(task.eval) for task in tasks)
    with inference(model), phase("evaluating", total, "records") as shown:
        for mode in modes:
            for task in tasks:
                shown.now(f"{task.name}, {MODE_TITLES[mode]}")
                by_row = experts and mode != "base"
                recording = by_row or mode == recorded_mode
                used: dict[int, dict[str, float]] = {}
                with (
                    in_mode(model, task.name, mode),
                    record_routing(model, by_row=by_row) if recording else nullcontext() as record,
                ):
                    watch = _rows_into(used, record) if by_row and record is not None else None
                    value, results = score_task(model, tokenizer, task, limits, watch)
                if record is not None and mode == recorded_mode:
                    recorded[task.name] = (record.tokens, record.table())
                scores.append(Score(task.name, mode, task.metric, value, len(results)))
                found += predictions(task, mode, results, used or None)
    summary = summarise(recorded_mode, recorded) if recorded_mode else None
    return Report(scores=scores, routing=summary, notes=notes, predictions=found)


def _rows_into(used: dict[int, dict[str, float]], record: RoutingRecord) -> AfterBatch:
    def take(records: Sequence[int]) -> None:
        used.update(zip(records, record.take_rows(len(records)), strict=True))

    return take
