"""The ways a mixture is scored: the gate alone, each task's own experts by id, the base alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from molora.config.suggest import did_you_mean
from molora.errors import ConfigError
from molora.models.task_router import names_tasks
from molora.tuner.api import routing

MODE_TITLES = {"gate": "gate alone", "task": "task id given", "base": "base only"}
MODES = tuple(MODE_TITLES)


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
