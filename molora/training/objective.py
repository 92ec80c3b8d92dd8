"""What is minimised: from a model and a batch to a loss, and the numbers that are worth watching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from molora.tuner.api import aux_in_loss, aux_loss, aux_losses


class Companion(Protocol):
    """What else takes part in training: it adds terms to the loss, and sees the model after every optimiser step."""

    def loss(self, model: Any) -> Mapping[str, Tensor]: ...

    def after_step(self, model: Any) -> None: ...


class Supervised:
    """The task's own loss, auxiliary losses weighted and counted once, and what a companion adds.

    Batches are dicts of model inputs with `labels` as the base takes them. Everything is a mean over the batch.
    """

    def __init__(self, companion: Companion | None = None) -> None:
        self.companion = companion

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch (a scalar with its graph), and metrics by name (scalars).

        Metrics are `loss`, that of the task alone, `aux/<name>` unweighted, and `continual/<name>` of the companion.
        """
        task = forward(model, **batch).loss
        metrics = {"loss": task} | {f"aux/{name}": value for name, value in aux_losses(model).items()}
        total = task + aux_loss(model)
        if self.companion is not None:
            terms = self.companion.loss(model)
            metrics |= {f"continual/{name}": value for name, value in terms.items()}
            total = total + sum(terms.values(), start=torch.zeros((), device=total.device))
        return total, metrics


def forward(model: Any, **inputs: Any) -> Any:
    """The model's own output; `out.loss` without auxiliary losses."""
    with aux_in_loss(model, False):
        return model(**inputs)


def held_out_loss(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean task loss of a batch, and the number of targets it is the mean of. Call it in eval mode."""
    return forward(model, **batch).loss, (batch["labels"] != -100).sum()
