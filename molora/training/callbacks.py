"""What watches training: divergence, signals, validation with early stopping."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterable, Sized
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from molora.data.clusters import inference
from molora.errors import DivergedError, InterruptedRun
from molora.progress import Phase, give_back_terminal, phase
from molora.training.checkpoint import Checkpoints, StepCallback
from molora.training.module import MoLoraModule

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DivergenceGuard(Callback):
    """Stops training at a loss that is not finite, before anything of it is saved.

    It looks after every batch on a CPU, and every `every` batches where looking means waiting for the device.
    `blame`: it looks after every batch, at the gradient too, and the error says which batch it was.
    """

    def __init__(self, every: int, *, blame: bool = False) -> None:
        self.every = 1 if blame else every
        self.blame = blame
        self._loss: Tensor | None = None

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss  # one NaN or infinity stays in a sum
        if self.blame and not math.isfinite(total := loss.item()):
            raise self._diverged(trainer, f"the training loss is {total}")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._loss is None or (self._loss.device.type != "cpu" and (batch_idx + 1) % self.every):
            return
        total, self._loss = self._loss.item(), None
        if trainer.strategy.reduce_boolean_decision(not math.isfinite(total), all=False):
            raise self._diverged(trainer, f"the training loss is {total}")

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        scaled = trainer.precision == "16-mixed"  # an overflow there is the scaler's to mend
        if not self.blame or scaled:
            return
        if not all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters()):
            raise self._diverged(trainer, "a gradient is not finite")

    def _diverged(self, trainer: Trainer, what: str) -> DivergedError:
        error = DivergedError(
            f"{what} at step {trainer.global_step}.",
            hint="checkpoints up to here are intact; lower train.lr, set train.clip, look at the data, or set "
            "train.on_nonfinite: rollback, which leaves out the batch it comes from.",
        )
        if self.blame:
            error.batch = getattr(trainer.train_dataloader, "last", None)
        return error


class Interrupt(StepCallback):
    """SIGINT, SIGTERM, SIGHUP: finish the step, save once, raise InterruptedRun; a second signal exits at once.

    A signal that is ignored, as nohup ignores SIGHUP, stays ignored.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            heard = [s for s in _STOPPING if signal.getsignal(s) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._receive) for number in heard}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            give_back_terminal()
            os._exit(InterruptedRun.exit_code)
        self._received = number

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            path = self.checkpoints.save(trainer, module)
            raise InterruptedRun(
                f"stopped by a signal at step {step}; saved {path}.", hint="go on with --resume."
            )

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class Steps(StepCallback):
    """Counts optimiser steps in the phase that training is."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        self.phase.reach(step)


class Reports(StepCallback):
    """The means of a step are written before its checkpoint: a run that goes on from there does not write them again."""

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, MoLoraModule)
        module.report_means()


class Validation(StepCallback):
    """Mean loss on held-out batches every `every` steps; stops early after `patience` times without a gain.

    Unlike Lightning's validation loop it runs inside the training step, so that a checkpoint of the same step always
    contains its outcome and a resumed run never skips or repeats one.
    """

    def __init__(self, batches: Iterable[Any], every: int, patience: int | None) -> None:
        self.batches, self.every, self.patience = batches, every, patience
        self.best = math.inf
        self.without_gain = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._stop_if_stale(trainer)  # a run resumed after it had stopped early stays stopped

    def on_step(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        if step % self.every and step != trainer.max_steps:
            return
        assert isinstance(module, MoLoraModule)
        loss = self.loss(trainer, module)
        module.report({"val_loss": loss})
        self.without_gain = 0 if loss < self.best else self.without_gain + 1
        self.best = min(self.best, loss)
        self._stop_if_stale(trainer)

    def loss(self, trainer: Trainer, module: MoLoraModule) -> float:
        """Mean loss per target token (per sample for a classifier), without auxiliary losses."""
        totals = torch.zeros(2, dtype=torch.float64)
        size = len(self.batches) if isinstance(self.batches, Sized) else None
        with inference(module), phase("validating", size, "batches", minor=True) as shown:
            for batch in self.batches:
                batch = trainer.strategy.batch_to_device(batch)
                with trainer.precision_plugin.forward_context():
                    loss, count = module.objective.held_out(module.model, batch)
                summed = torch.where(count > 0, loss.double() * count, 0.0)  # the mean over nothing is NaN
                totals += torch.stack([summed, count.double()]).cpu()
                shown.advance()
        totals = trainer.strategy.reduce(totals.to(module.device), reduce_op="sum").cpu()
        return (totals[0] / totals[1].clamp(min=1)).item()

    def _stop_if_stale(self, trainer: Trainer) -> None:
        if self.patience is not None and self.without_gain >= self.patience:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "without_gain": self.without_gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.without_gain = state["best"], state["without_gain"]
