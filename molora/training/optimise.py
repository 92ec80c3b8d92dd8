"""optimise: train a model in memory. Where things are written is the caller's business, by callbacks and loggers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from peft import PeftModel

from molora.config import TrainConfig
from molora.errors import ConfigError
from molora.training.callbacks import DivergenceGuard, Reports, Validation
from molora.training.checkpoint import FolderIO, RandomState
from molora.training.ctrl_c import stays_ctrl_c
from molora.training.live_routing import EVERY, LiveRouting
from molora.training.lost_process import explained_loss_of_a_process
from molora.training.module import MoLoraModule
from molora.training.objective import Companion
from molora.training.sharded import ShardedBaseStrategy
from molora.training.steps import processes, total_steps


def check_device(settings: TrainConfig) -> None:
    """Raise ConfigError for a device that is not here, or a precision it cannot train in."""
    if not _is_here(settings.accelerator):
        here = [name for name in ("cpu", "cuda", "mps") if _is_here(name)]
        raise ConfigError(
            f"train.accelerator: {settings.accelerator} finds no such device. On this machine: auto, {', '.join(here)}.",
            hint="leave it out to take what there is; for a GPU, torch has to be a build that knows it.",
        )
    cuda = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu", "cuda")
    if settings.precision == "16-mixed" and not cuda:
        raise ConfigError(
            "train.precision: 16-mixed scales gradients for CUDA devices, and none is used here.",
            hint="use bf16-mixed, which needs no scaling, or 32-true.",
        )


def _is_here(accelerator: str) -> bool:
    if accelerator == "auto":
        return True
    names = ("cuda", "mps") if accelerator == "gpu" else (accelerator,)
    return any(AcceleratorRegistry.get(name).is_available() for name in names)


def optimise(
    model: PeftModel,
    data: L.LightningDataModule,
    settings: TrainConfig,
    *,
    companion: Companion | None = None,
    validation: Iterable[Any] | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    checkpoint: Path | None = None,
) -> L.Trainer:
    """Train a model in place, for as many steps as `settings` say; by itself it writes nothing.

    Args:
        companion: see MoLoraModule.
        validation: held-out batches, measured every `val_every` steps.
        callbacks: run after molora's own, so that nothing is saved before it was found good.
        checkpoint: a checkpoint folder to go on from.

    Raises DivergedError where the loss is not finite, InterruptedRun where a process of a distributed run is lost.
    """
    guard = DivergenceGuard(settings.log_every, blame=settings.on_nonfinite == "rollback")
    own: list[Callback] = [RandomState(), guard]
    if validation is not None and settings.val_every is not None:
        own.append(Validation(validation, settings.val_every, settings.patience))
    if LiveRouting.watches(model):
        own.append(LiveRouting(EVERY * settings.log_every))
    own.append(Reports())
    sharded = settings.strategy == "fsdp2"
    strategy = ShardedBaseStrategy(processes(settings)) if sharded else settings.strategy
    trainer = L.Trainer(
        max_steps=total_steps(settings, len(data.train_dataloader())),
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        precision=settings.precision,
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=strategy,
        plugins=[FolderIO()],
        callbacks=[*own, *callbacks],
        logger=list(loggers),
        log_every_n_steps=settings.log_every,
        limit_val_batches=0,  # validation is a callback, see callbacks.Validation
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the loader shards itself
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with stays_ctrl_c(), explained_loss_of_a_process(trainer):
        trainer.fit(
            MoLoraModule(model.train(), settings, companion),
            datamodule=data,
            ckpt_path=checkpoint,
            weights_only=True if checkpoint else None,
        )
    return trainer
