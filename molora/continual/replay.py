"""Replay: a few records of every old task are kept and trained on again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from molora.config.continual import StrategyConfig
from molora.continual.strategy import Strategy, Turn
from molora.data.tasks import Task


class Replay(Strategy):
    """One LoRA for all tasks; a random part of each task's records stays in the run and joins later training sets.

    `ratio` of a task's records, or `count` of them. Batches draw from new and kept records as if they were one
    set (`data.mixing` changes that).
    """

    softmax = "seen"

    def __init__(self, settings: StrategyConfig) -> None:
        super().__init__(settings)
        self.kept: dict[str, list[dict[str, Any]]] = {}

    def training_tasks(self, turn: Turn) -> Sequence[Task]:
        old = [replace(task, train=self.kept[task.name]) for task in turn.seen if task.name in self.kept]
        return [turn.task, *old]

    def after_task(self, model: nn.Module, turn: Turn) -> None:
        records, fields = turn.task.train, turn.task.fields
        ratio = self.settings.ratio
        count = self.settings.count if ratio is None else max(1, round(ratio * len(records)))
        chosen = random.Random(turn.seed).sample(range(len(records)), min(count or 1, len(records)))
        kept = [records[i] for i in sorted(chosen)]
        self.kept[turn.task.name] = [{name: r[name] for name in fields if name in r} for r in kept]

    def plain(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        self.kept = {name: list(records) for name, records in plain["kept"].items()}


class Joint(Strategy):
    """All tasks at once, the upper bound: not a way of learning one after another, but what it is measured by."""

    softmax = "all"

    def training_tasks(self, turn: Turn) -> Sequence[Task]:
        return turn.tasks
