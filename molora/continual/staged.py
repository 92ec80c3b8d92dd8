"""Staged: the older stages' experts add up with the newest, at weights that may fall while it trains (a curriculum).

After `t` of `T` steps an older expert has `1 - (1 - gamma) t / T` of its weight; a step is taken at the weights of its end, so
that the last one trains what is saved. After several stages of one gamma the weights are `gamma ** age`. A rule of practice
rather than of a paper: the newest expert learns to stand on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from molora.config.continual import StrategyConfig
from molora.config.stages import ExpertStage
from molora.continual.strategy import Strategy, Turn


def stage_weights(stages: Sequence[ExpertStage]) -> list[dict[str, float]]:
    """Of each stage's tasks, the weight of every expert once the stage is done."""
    found: list[dict[str, float]] = []
    for stage in stages:
        older = found[-1] if found else {}
        found.append({**{name: weight * stage.gamma for name, weight in older.items()}, stage.name: 1.0})
    return found


class Staged(Strategy):
    """What sets the weights of a stage's tasks, before, during and after its training."""

    def __init__(self, stages: Sequence[ExpertStage]) -> None:
        super().__init__(StrategyConfig(kind="independent"))
        self.stages = stages
        self.weights = stage_weights(stages)
        self._index = 0
        self._tasks: list[str] = []
        self._share = 1.0  # of their weights that older experts have now

    @property
    def changes_weights(self) -> bool:  # type: ignore[override]
        """Those of the task map, where they fall: what is saved has those of the end."""
        return self.stages[self._index].gamma != 1

    def before_task(self, model: nn.Module, turn: Turn) -> None:
        """The new expert and all older ones, at the weights they had."""
        self._tasks = [task.name for task in turn.own]
        (self._index,) = (i for i, stage in enumerate(self.stages) if stage.tasks == self._tasks)
        self._weigh(model, 1.0)

    def at_step(self, model: nn.Module, step: int, steps: int) -> None:
        """The weights of the step to come."""
        gamma = self.stages[self._index].gamma
        if gamma != 1:
            self._weigh(model, 1 - (1 - gamma) * min(1.0, (step + 1) / steps))

    def after_task(self, model: nn.Module, turn: Turn) -> None:
        """Those of the end: of a run that is resumed after its last step, too."""
        self._weigh(model, self.stages[self._index].gamma)

    def as_it_was(self, model: nn.Module) -> AbstractContextManager[None]:
        """Older experts at the weights they had."""
        return nullcontext() if self._share == 1 else self._undone(model)

    @contextmanager
    def _undone(self, model: nn.Module) -> Iterator[None]:
        share = self._share
        self._weigh(model, 1.0)
        try:
            yield
        finally:
            self._weigh(model, share)

    def _weigh(self, model: Any, share: float) -> None:
        older = self.weights[self._index - 1] if self._index else {}
        given = {name: weight * share for name, weight in older.items()}
        own: Mapping[str, float] = {**given, self.stages[self._index].name: 1.0}
        self._share = share
        model.weigh_tasks(dict.fromkeys(self._tasks, own))
