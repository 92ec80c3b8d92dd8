"""evaluate_tasks: every task in every mode, scored by its metric, with what the gates did meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.config.suggest import did_you_mean
from molora.data.clusters import inference
from molora.data.tasks import Task
from molora.errors import ConfigError
from molora.evaluation.report import Report, Score
from molora.evaluation.routing import summarise
from molora.evaluation.score import Limits, score_task
from molora.models.task_router import names_tasks
from molora.progress import phase
from molora.tuner.api import record_routing, routing

MODE_TITLES = {"gate": "gate alone", "task": "task id given", "base": "base only"}
MODES = tuple(MODE_TITLES)


def evaluate_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[Task],
    *,
    modes: Sequence[str] = MODES,
    limits: Limits | None = None,
) -> Report:
    """Score a PEFT model with a molora adapter on the held-out records of each task.

    modes: `gate` (no task ids: the gate alone decides, or the adapter's task router), `task` (routed by the task's id), `base`
    (the adapter switched off). A mode the adapter cannot run is skipped with a note. Routing is recorded in the first mode
    that uses the adapter.

    Raises ConfigError for an unknown mode, or a task the adapter does not know (mode `task`); DataError for a
    task without held-out records.
    """
    tasks = list(tasks)
    modes, notes = usable_modes(model, modes)
    unknown = [task.name for task in tasks if "task" in modes and task.name not in model.tasks]
    if unknown:
        known = ", ".join(model.tasks) or "none"
        meant = did_you_mean(unknown[0], model.tasks)
        raise ConfigError(f"unknown task {unknown[0]!r}.{meant} Known tasks: {known}.")
    limits = limits or Limits()
    recorded_mode = next((mode for mode in modes if mode != "base"), None)
    scores, recorded = [], {}
    total = len(modes) * sum(len(task.eval) for task in tasks)
    with inference(model), phase("evaluating", total, "records") as shown:
        for mode in modes:
            for task in tasks:
                shown.now(f"{task.name}, {MODE_TITLES[mode]}")
                recording = record_routing(model) if mode == recorded_mode else nullcontext()
                with in_mode(model, task.name, mode), recording as record:
                    value, results = score_task(model, tokenizer, task, limits)
                if record is not None:
                    recorded[task.name] = (record.tokens, record.table())
                scores.append(Score(task.name, mode, task.metric, value, len(results)))
    summary = summarise(recorded_mode, recorded) if recorded_mode else None
    return Report(scores=scores, routing=summary, notes=notes)


def usable_modes(model: Any, modes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The asked modes that the adapter can run, and a note for each it cannot; ConfigError where none is left."""
    check_modes(modes)
    notes = []
    by_id = model.active_peft_config.gate.scope == "task"
    if "gate" in modes and by_id and not names_tasks(model):
        why = "this adapter routes by task id, so it gives no answer without one."
        notes.append(f"mode `gate` skipped: {why}")
        modes = [mode for mode in modes if mode != "gate"]
    if not modes:
        raise ConfigError(
            "no evaluation mode is left to run.", hint=" ".join(notes) or f"choose from {', '.join(MODES)}."
        )
    return list(modes), notes


def check_modes(modes: Sequence[str]) -> None:
    """Raise ConfigError for an unknown mode, or one named twice."""
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(
                f"unknown evaluation mode {mode!r}.{did_you_mean(mode, MODES)} Modes: {', '.join(MODES)}."
            )
    if len(set(modes)) != len(modes):
        raise ConfigError(f"an evaluation mode is named twice: {', '.join(modes)}.")


def in_mode(model: Any, task: str | None, mode: str) -> AbstractContextManager[Any]:
    """The context in which the model answers for `task` in `mode`."""
    if mode == "base":
        return model.disable_adapter()
    return routing(model, task_ids=task, by="task") if mode == "task" else nullcontext()
