"""What is minimised: from a model and a batch to a loss, and the numbers that are worth watching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from molora.config.objective import ObjectiveConfig
from molora.data.collate import collate
from molora.data.tasks import Task
from molora.tuner.api import aux_in_loss, aux_loss, aux_losses


class Companion(Protocol):
    """What else takes part in training; `molora.continual.strategy.Strategy` says what each of these is."""

    def loss(self, model: Any) -> Mapping[str, Tensor]: ...

    def at_step(self, model: Any, step: int, steps: int) -> None: ...

    def after_step(self, model: Any) -> None: ...

    def as_it_was(self, model: Any) -> AbstractContextManager[None]: ...


class Objective:
    """The loss of a batch, auxiliary losses weighted and counted once, and what a companion adds.

    Subclasses say what the task's own loss is; `molora.config.objective` has them by name. Everything is a mean over the
    batch.
    """

    collate = staticmethod(collate)  # examples -> batch

    def __init__(self, companion: Companion | None = None, settings: ObjectiveConfig | None = None) -> None:
        self.companion = companion

    @staticmethod
    def check_tasks(tasks: Sequence[Task]) -> None:
        """Raise ConfigError for tasks that this cannot learn from, before anything is read."""

    def task_loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's own loss (a scalar with its graph), and more metrics by name (scalars)."""
        raise NotImplementedError

    def held_out(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The task's own mean loss of a held-out batch, and of how many it is the mean. Call it in eval mode."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch (a scalar with its graph), and metrics by name (scalars).

        Metrics are `loss`, that of the task alone, its own, `aux/<name>` unweighted, and `continual/<name>` of the companion.
        """
        task, own = self.task_loss(model, batch)
        metrics = {"loss": task} | own | {f"aux/{name}": value for name, value in aux_losses(model).items()}
        total = task + aux_loss(model)
        if self.companion is not None:
            terms = self.companion.loss(model)
            metrics |= {f"continual/{name}": value for name, value in terms.items()}
            total = total + sum(terms.values(), start=torch.zeros((), device=total.device))
        return total, metrics


class Supervised(Objective):
    """The targets' own loss. Batches are dicts of model inputs with `labels` as the base takes them."""

    def task_loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """As the base computes it."""
        return forward(model, **batch).loss, {}

    def held_out(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean loss per target."""
        return forward(model, **batch).loss, (batch["labels"] != -100).sum()


def forward(model: Any, **inputs: Any) -> Any:
    """The model's own output; `out.loss` without auxiliary losses."""
    with aux_in_loss(model, False):
        return model(**inputs)
