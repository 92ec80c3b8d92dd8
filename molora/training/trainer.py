"""The Lightning Trainer of a run: devices, precision, callbacks and loggers from the recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from molora.config import TrainConfig
from molora.errors import ConfigError
from molora.training.callbacks import DivergenceGuard, Interrupt, Validation
from molora.training.checkpoint import Checkpoints, FolderIO, RandomState
from molora.training.loggers import build_loggers
from molora.training.sharded import ShardedBaseStrategy


def check_device(settings: TrainConfig) -> None:
    """Raise ConfigError for a precision the device cannot train in."""
    cuda = torch.cuda.is_available() and settings.accelerator in ("auto", "gpu", "cuda")
    if settings.precision == "16-mixed" and not cuda:
        raise ConfigError(
            "train.precision: 16-mixed scales gradients for CUDA devices, and none is used here.",
            hint="use bf16-mixed, which needs no scaling, or 32-true.",
        )


def total_steps(settings: TrainConfig, batches_per_epoch: int) -> int:
    """Optimiser steps of a run over `batches_per_epoch` batches, which the processes share.

    An epoch's last window counts as a step even where it is not full.
    """
    if settings.max_steps is not None:
        return settings.max_steps
    assert settings.epochs is not None  # the schema wants one of the two
    share = math.ceil(batches_per_epoch / _processes(settings))
    return settings.epochs * math.ceil(share / settings.accumulate)


def _processes(settings: TrainConfig) -> int:
    if isinstance(settings.devices, list):
        return len(settings.devices)
    if settings.devices == "auto":
        return torch.cuda.device_count() if settings.accelerator != "cpu" and torch.cuda.is_available() else 1
    return settings.devices


def build_callbacks(
    settings: TrainConfig, checkpoints: Path, steps: int, validation: Iterable[Any] | None
) -> list[Callback]:
    """Callbacks in the order they must run: nothing is saved before it was found good."""
    writer = Checkpoints(checkpoints, settings.save_every or steps, settings.keep_checkpoints)
    callbacks: list[Callback] = [RandomState(), DivergenceGuard(settings.log_every)]
    if validation is not None and settings.val_every is not None:
        callbacks.append(Validation(validation, settings.val_every, settings.patience))
    return [*callbacks, writer, Interrupt(writer)]


def build_trainer(
    settings: TrainConfig,
    folder: Path,
    steps: int,
    *,
    resume_step: int = 0,
    validation: Iterable[Any] | None = None,
) -> L.Trainer:
    """A Trainer that writes into the run folder `folder` and stops after `steps` optimiser steps."""
    return L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.clip,
        precision=settings.precision,
        accelerator=settings.accelerator,
        devices=settings.devices,
        strategy=_strategy(settings),
        plugins=[FolderIO()],
        callbacks=build_callbacks(settings, folder / "checkpoints", steps, validation),
        logger=build_loggers(folder, steps, resume_step),
        log_every_n_steps=settings.log_every,
        limit_val_batches=0,  # validation is a callback, see callbacks.Validation
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the loader shards itself
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(settings: TrainConfig) -> Any:
    return ShardedBaseStrategy(_processes(settings)) if settings.strategy == "fsdp2" else settings.strategy
