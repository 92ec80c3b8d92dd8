"""MoLoraModule: the LightningModule of a mixture, usable with any Lightning Trainer.

What happens in a step: Lightning draws a batch and calls `training_step`, where the objective runs the model and gives
the loss, that of the task plus auxiliary losses plus a companion's terms (objective.py), and the meter notes its parts.
Lightning divides by the number of accumulated batches (`_window_correction` corrects that where an epoch's last window
is short) and runs backward. At the end of a window `on_before_optimizer_step` averages gradients where the base is
sharded and drops those of parts that the current stage does not train; `configure_gradient_clipping` clips and notes
the norm; `optimizer_step` moves the weights, and the companion looks at them. Then the callbacks, in their order: the
random state is kept, a loss that is not finite stops the run, held-out batches are measured, the meter's means are reported every
`log_every` steps, a checkpoint is written, a signal ends the run (optimise.py, train.py). Under a Trainer of one's own,
`on_train_batch_end` reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from torch.optim import Optimizer

from molora.config import TrainConfig
from molora.config.objective import OBJECTIVES
from molora.data.loader import ResumableLoader
from molora.errors import ConfigError
from molora.training.checkpoint import of_every_process
from molora.training.growth import Growth
from molora.training.meter import Meter
from molora.training.objective import Companion, Objective, forward
from molora.training.optimizer import build_optimizer, build_scheduler, trained_parts
from molora.training.sharded import average_gradients, shard_base
from molora.tuner.after_step import (
    after_step,
    expert_rate,
    kind_states,
    looks_at_steps,
    restore_kinds,
    withhold,
)


class MoLoraModule(L.LightningModule):
    """Trains the adapter of a PEFT model; its state dict is the adapter and nothing else.

    Batches are dicts of model inputs with `labels` and, where the gate or a loss needs them, `routing_task_ids`. A
    companion, such as a continual strategy, adds terms of its own to the loss.
    """

    def __init__(self, model: PeftModel, settings: TrainConfig, companion: Companion | None = None) -> None:
        super().__init__()
        self.model = model
        self.companion = companion
        self.objective: Objective = OBJECTIVES[settings.objective.kind](companion, settings.objective)
        self.settings = settings
        self.meter = Meter()
        self._logged_step = 0
        self._metered: list[dict[str, Any]] = []  # what a checkpoint knew of the next means, one per process
        self._sharded = False
        self._rates: dict[str, float] = {}
        self._teaches = True  # whether the batch has a label
        self._steps = 0  # how many there will be
        self._watched_steps: int | None = None  # the same, where experts look at each
        self.growth = None if settings.rank_growth is None else Growth(settings.rank_growth)
        self._batch: dict[str, Tensor] = {}
        self._learns = False  # whether any gradient has been seen

    def forward(self, **inputs: Any) -> Any:
        """The model's own output; `out.loss` without auxiliary losses."""
        return forward(self.model, **inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        """The objective's loss of one batch (a scalar); None, which Lightning passes over, where the loader leaves it out."""
        self._batch = batch
        if self._left_out():
            return None
        if (
            not self._teaches
        ):  # the mean over no label is NaN; every parameter gets a gradient, which DDP waits for
            return 0.0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        loss, metrics = self.objective.loss(self.model, batch)
        self.meter.add(**metrics)
        self.meter.count_tokens(batch["attention_mask"].sum())
        return loss * self._window_correction(batch_idx)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Look for labels while the batch is on the host, where looking waits for no device."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if labels is not None:
            read = torch.as_tensor(labels)
            causal = str(getattr(self.model.active_peft_config, "task_type", "")).endswith("CAUSAL_LM")
            read = read[..., 1:] if causal else read  # a causal model never predicts the first token
        self._teaches = labels is None or bool((read != -100).any())
        return batch

    def _window_correction(self, batch_idx: int) -> float:
        """Lightning divides by `accumulate_grad_batches`; an epoch's last window may hold fewer batches."""
        accumulate, total = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        first = batch_idx - batch_idx % accumulate
        return accumulate / min(accumulate, total - first)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Task loss of a held-out batch, logged as `val_loss`."""
        loss, count = self.objective.held_out(self.model, batch)
        self.log("val_loss", loss, batch_size=int(count), prog_bar=True, sync_dist=True)
        return loss

    def configure_model(self) -> None:
        """Shard the frozen base where the strategy has a device mesh (fsdp2)."""
        if self.device_mesh is not None and not self._sharded:
            shard_base(self.model, self.device_mesh)
            self._sharded = True

    def configure_optimizers(self) -> Any:
        """AdamW over experts, gates and heads, with the recipe's schedule stepped per optimiser step."""
        # Fused AdamW would unscale float16 gradients itself, after clipping.
        fused = self.settings.precision != "16-mixed"
        if self.growth is not None:
            self.growth.check(self.model)
        optimizer = build_optimizer(self.model, self.settings, fused=fused)
        total = int(self.trainer.estimated_stepping_batches)
        self._watched_steps = total if looks_at_steps(self.model) else None
        self._steps = total
        rate = partial(expert_rate, self.model) if self._watched_steps is not None else None
        scheduler = build_scheduler(optimizer, self.settings, total, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, and what experts and the companion do after it: before any callback looks at the weights or saves them."""
        super().optimizer_step(*args, **kwargs)
        if self._watched_steps is not None:
            made = self.trainer.optimizers[0]
            after_step(self.model, self.global_step + 1, self._watched_steps, self._loss_again, made)
        if self.companion is not None:
            self.companion.after_step(self.model)

    def _loss_again(self) -> Tensor:
        """The objective's loss of the last batch, at the weights as they are now."""
        with self.trainer.precision_plugin.forward_context():
            return self.objective.loss(self.model, self._batch)[0]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note the learning rates; drop the gradients of what the current stage does not train.

        AdamW skips a parameter without a gradient altogether: no momentum, no decay. Switching
        `requires_grad` instead would break DDP, which fixes the set of gradients when it starts.
        """
        self._rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        if self._sharded:
            average_gradients([p for group in optimizer.param_groups for p in group["params"]])
        self._expect_a_gradient(optimizer)
        loader = self.trainer.train_dataloader
        if isinstance(loader, ResumableLoader) and loader.half is not None:
            withhold(self.model, loader.half)
        parts = trained_parts(self.settings.stages, self.global_step)
        for group in optimizer.param_groups:
            if group["name"].split("_")[0] not in parts:
                for parameter in group["params"]:
                    parameter.grad = None

    def _expect_a_gradient(self, optimizer: Optimizer) -> None:
        """Once: ConfigError where nothing that should learn got a gradient; it would train on without learning anything."""
        if self._learns:
            return
        self._learns = any(p.grad is not None for group in optimizer.param_groups for p in group["params"])
        if not self._learns and not self._left_out():
            raise ConfigError(
                f"no gradient reached experts, gates or heads at step {self.global_step}.",
                hint="gradient checkpointing that re-enters autograd (use_reentrant=True) over a frozen base does that: use "
                "train.gradient_checkpointing: true, or use_reentrant=False. So does code around the model that detaches.",
            )

    def _left_out(self) -> bool:
        """Whether the loader leaves out the batch it handed out last."""
        loader = self.trainer.train_dataloader
        return isinstance(loader, ResumableLoader) and loader.last in loader.left_out

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip to `gradient_clip_val` (or the recipe's `clip`) and note the norm before clipping."""
        limit = gradient_clip_val if gradient_clip_val is not None else self.settings.clip
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
        self.meter.add(grad_norm=norm)

    def on_train_start(self) -> None:
        """Start counting where the run starts, or go on where its checkpoint was."""
        self.meter, self._logged_step = Meter(), self.global_step
        if self.global_rank < len(self._metered):
            self.meter.load_state_dict(self._metered[self.global_rank])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let experts grow where it is their time, once the random state is that of this batch; tell the companion of it."""
        if self.growth is not None:
            self.growth.due(self.model, self.global_step, self.trainer.optimizers[0])
        if self.companion is not None:
            self.companion.at_step(self.model, self.global_step, self._steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next means are of: they shall not depend on where a run was interrupted."""
        checkpoint["meter"] = of_every_process(self.meter.state_dict())
        if states := kind_states(self.model):
            checkpoint["kinds"] = states
        if self.growth is not None:
            checkpoint["growth"] = self.growth.state(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo `on_save_checkpoint`; earlier versions kept nothing."""
        self._metered = checkpoint.get("meter", [])
        restore_kinds(self.model, checkpoint.get("kinds", {}))
        if self.growth is not None and "growth" in checkpoint:
            self.growth.restore(self.model, checkpoint["growth"])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """See `report_means`."""
        self.report_means()

    def report_means(self) -> None:
        """Report the means since the last report, every `log_every` optimiser steps; once per step."""
        step = self.global_step
        if step == self._logged_step or (step % self.settings.log_every and step != self.trainer.max_steps):
            return
        self._logged_step = step
        means = self.meter.take()
        if not means:  # every batch was left out
            return
        summed = self.trainer.strategy.reduce(
            torch.stack([v.to(self.device) for v in means.values()]), reduce_op="mean"
        )
        values = dict(zip(means, summed.tolist(), strict=True))
        if "tokens_per_second" in values:
            values["tokens_per_second"] *= self.trainer.world_size
        # The rate of the experts' A is `lr`, that of another group `lr/<group>` where it differs.
        lr = self._rates.get("experts_A", next(iter(self._rates.values())))
        others = {f"lr/{name}": rate for name, rate in self._rates.items() if rate != lr}
        self.report({**values, "lr": lr, **others})

    def report(self, values: dict[str, float]) -> None:
        """Send metrics to every logger and to callbacks that monitor one.

        Loggers are called directly: through `self.log`, Lightning numbers steps by batch from 0.
        """
        self.log_dict(values, logger=False)
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step=self.global_step)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The adapter's tensors under their names in an adapter folder."""
        return get_peft_model_state_dict(self.model, save_embedding_layers=False)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; AdapterError unless names, shapes and finiteness are as in the model."""
        # The digest noted at the last save is of other weights than those of this checkpoint.
        config: Any = self.model.peft_config[self.model.active_adapter]
        config.weights_sha256 = None
        return set_peft_model_state_dict(self.model, dict(state_dict))
