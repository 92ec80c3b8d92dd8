"""Train a mixture with transformers.Trainer, auxiliary losses exact under gradient accumulation."""

from __future__ import annotations

from typing import Any

import torch

from molora.tuner.api import aux_in_loss, aux_loss


class MoLoraTrainerMixin:
    """Put before a Trainer class: `class MyTrainer(MoLoraTrainerMixin, transformers.Trainer): ...`.

    A stock Trainer trains the gate too, since `out.loss` contains the auxiliary losses. But it divides only the task
    loss by the tokens of all accumulated batches, so the others weigh more the more batches there are, and label
    smoothing loses them. This mixin keeps them out of `out.loss` and adds their mean over the accumulated batches.

    Task ids: set `remove_unused_columns=False` and name the column `routing_task_ids`.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's loss plus the weighted auxiliary losses (training only)."""
        with aux_in_loss(model, False):
            loss, outputs = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training:
            loss = loss + self._aux_share(aux_loss(model), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

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
