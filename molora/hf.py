"""Train a mixture with transformers.Trainer, auxiliary losses exact under gradient accumulation."""

from __future__ import annotations

from typing import Any

import torch

from molora.errors import ConfigError
from molora.tuner.api import aux_in_loss, aux_loss

_IDS = "routing_task_ids"


class MoLoraTrainerMixin:
    """Put before a Trainer class: `class MyTrainer(MoLoraTrainerMixin, transformers.Trainer): ...`.

    A stock Trainer trains the gate too, since `out.loss` contains the auxiliary losses. But it divides only the task
    loss by the tokens of all accumulated batches, so the others weigh more the more batches there are, and label
    smoothing loses them. This mixin keeps them out of `out.loss` and adds their mean over the accumulated batches.

    Task ids: set `remove_unused_columns=False` and name the column `routing_task_ids`; whole numbers, as the default
    collators drop text. Where a data set has that column and its ids do not reach the model, this mixin says so.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss plus the weighted auxiliary losses (training only).

        Raises:
            ConfigError: the data set has task ids, and none arrived.
        """
        self._say_lost_ids(model, inputs)
        with aux_in_loss(model, False):
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training:
            loss = loss + self._aux_share(aux_loss(model), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

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
            else "give the ids as whole numbers (model.task_ids), not as text.",
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
