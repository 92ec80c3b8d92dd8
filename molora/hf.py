"""Train a mixture with transformers.Trainer, auxiliary losses exact under gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from molora.errors import ConfigError
from molora.tuner.after_step import after_step, looks_at_steps
from molora.tuner.api import aux_in_loss, aux_loss

_IDS = "routing_task_ids"


class MoLoraTrainerMixin:
    """Put before a Trainer class: `class MyTrainer(MoLoraTrainerMixin, transformers.Trainer): ...`.

    A stock Trainer trains the gate too, since `out.loss` contains the auxiliary losses. But it divides only the task
    loss by the tokens of all accumulated batches, so the others weigh more the more batches there are, and label
    smoothing loses them. This mixin keeps them out of `out.loss` and adds their mean over the accumulated batches.

    TRL's trainers work out their loss without `out.loss`, so with those the mixin is what makes auxiliary losses count.

    Task ids: set `remove_unused_columns=False` and name the column `routing_task_ids`; whole numbers, as the default
    collators drop text, or any with `trainer.data_collator = KeepTaskIds(trainer.data_collator)`. Where a data set has
    that column and its ids do not reach the model, this mixin says so.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss plus the weighted auxiliary losses (training only).

        Raises:
            ConfigError: the data set has task ids, and none arrived.

        GRPO's loss has no outputs to return, so they are asked for only where the caller does.
        """
        self._say_lost_ids(model, inputs)
        with aux_in_loss(model, False):
            found = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not model.training:
            return found
        aux = self._aux_share(aux_loss(model), num_items_in_batch)
        return (found[0] + aux, *found[1:]) if return_outputs else found + aux

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule; from here on, experts look at each step of the optimiser (`molora.after_step`)."""
        trainer: Any = self
        made = super().create_scheduler(num_training_steps, optimizer=optimizer)  # type: ignore[misc]

        given = trainer.optimizer if optimizer is None else optimizer
        inner = getattr(given, "optimizer", given)  # accelerate's is around torch's

        def look(*_: Any) -> None:
            step = trainer.state.global_step + 1
            after_step(trainer.model, step, num_training_steps, optimizer=inner)

        if looks_at_steps(trainer.model):
            inner.register_step_post_hook(look)
        return made

    def _say_lost_ids(self, model: Any, inputs: dict[str, Any]) -> None:
        trainer: Any = self
        data = trainer.train_dataset if model.training else trainer.eval_dataset
        if _IDS in inputs or _IDS not in (getattr(data, "column_names", None) or ()):
            return
        removed = trainer.args.remove_unused_columns
        raise ConfigError(
            f"the data set has a column {_IDS!r}, but it does not reach the model: "
            + ("the Trainer removes columns it does not know." if removed else "the data collator drops it."),
            hint="set remove_unused_columns=False."
            if removed
            else "trainer.data_collator = molora.hf.KeepTaskIds(trainer.data_collator). Trainers that build the batches "
            "themselves (DPO, GRPO) train one task at a time, inside `with molora.routing(model, task_ids=...)`.",
        )

    def _aux_share(self, aux: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """One batch's part of the mean over the accumulated batches.

        The Trainer divides the loss by the number of accumulated batches itself, unless the loss was
        already normalised over all of them; then the auxiliary part must be divided here.
        """
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or trainer.compute_loss_func is not None
        return aux / trainer.current_gradient_accumulation_steps if scaled else aux


class KeepTaskIds:
    """A data collator around another: it hands on the column `routing_task_ids`, names or numbers, that the other drops."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The other's batch, and each example's task."""
        others = [{name: value for name, value in row.items() if name != _IDS} for row in examples]
        return {**self.collator(others), _IDS: [row[_IDS] for row in examples]}
