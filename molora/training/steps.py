"""How many steps a training takes, and what of its recipe such a length leaves undone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from molora.config import RunConfig, TrainConfig
from molora.config.choices import KINDS
from molora.data.tasks import TaskSet


def total_steps(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Optimiser steps of a run over `batches_per_epoch` batches, which the processes share.

    An epoch's last window counts as a step even where it is not full.
    """
    if settings.max_steps is not None:
        return settings.max_steps
    assert settings.epochs is not None  # the schema wants one of the two
    share = math.ceil(batches_per_epoch / processes(settings))
    return settings.epochs * math.ceil(share / settings.accumulate)


def batches_of(tasks: TaskSet, batch_size: int) -> int:
    """Batches of one pass over the training records of all tasks."""
    return math.ceil(sum(len(task.train) for task in tasks) / batch_size)


def notes_on_length(config: RunConfig, batches_per_epoch: int) -> Iterator[str]:
    """What to say, before a training begins, of its last window and of what begins after its end."""
    settings, adapter = config.train, config.adapter
    if (short := _short_window(settings, batches_per_epoch)) is not None:
        yield short
    steps, growth = total_steps(settings, batches_per_epoch), settings.rank_growth
    if growth is not None and steps <= growth.every:
        yield f"training ends at step {steps}, and train.rank_growth.every is {growth.every}: no rank grows."
    kind = KINDS[adapter.kind]
    if (undone := kind.undone({**kind.settings, **adapter.kind_settings}, steps)) is not None:
        yield f"kind {adapter.kind}: training ends at step {steps}, and {undone}"


def _short_window(settings: TrainConfig, batches_per_epoch: int) -> str | None:
    """What to say of an epoch whose last step accumulates fewer batches than the others; None where it does not."""
    share = math.ceil(batches_per_epoch / processes(settings))
    rest = share % settings.accumulate
    if not rest:
        return None
    return (
        f"train.accumulate is {settings.accumulate}, and an epoch has {share} batches: its last step sees {rest} of them, "
        "and counts as much as the others."
    )


def processes(settings: TrainConfig) -> int:
    if isinstance(settings.devices, list):
        return len(settings.devices)
    if settings.devices == "auto":
        return torch.cuda.device_count() if settings.accelerator != "cpu" and torch.cuda.is_available() else 1
    return settings.devices
